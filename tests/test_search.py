"""Whole searches: files, exact repetition, exact resume, what is compiled and what is read."""

import io
import json
import pathlib
import shutil
import time

import jax
import pytest
import stand_in
from command_line import kill_after_a_line
from outcomes import lines, search_outcome
from rich.console import Console
from searches import SMALL, finish, start_search

from cpnas_jax import config as configs
from cpnas_jax.architecture.genotype import Genotype
from cpnas_jax.architecture.parsing import parse_history
from cpnas_jax.architecture.replay import replay
from cpnas_jax.architecture.strategy import ChildParent
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.search import search

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The data and compiled programs, shared by all processes of these tests."""
    return tmp_path_factory.mktemp("searches")


@pytest.fixture(scope="session")
def data_dir(base):
    return base / "data"


@pytest.fixture(scope="session")
def shell(base):
    """Start the command line in a process of its own, on one device."""

    def start(workdir, *arguments, **settings):
        return start_search(base, workdir, *SMALL, *arguments, **settings)

    return start


@pytest.fixture(scope="session")
def undisturbed(shell, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, finish(shell(workdir))


def test_the_files_hold_what_scripts_rely_on(undisturbed):
    workdir, output = undisturbed
    lines = list(parse_history((workdir / "search/history.jsonl").read_text()))
    samples = [line for line in lines if line["event"] == "sample"]
    assert len(samples) == 3 + 2
    expected = {"event", "stage", "round", "sample", "architecture", "seconds"}
    assert set(samples[0]) == expected | {"child_accuracy", "parent_accuracy", "z"}
    for line in samples:
        child, parent = line["child_accuracy"], line["parent_accuracy"]
        assert line["z"] == 2 * (parent - child) + child
    stages = [line for line in lines if line["event"] == "stage"]
    assert [line["stage"] for line in stages] == [3, 2]
    assert set(stages[0]) == {"event", "stage", "indicator", "dropped"}
    operations = ("none", "skip_connect", "sep_conv_3x3")
    checked = replay(lines, ChildParent(seed=0, rounds=1, beta_p=2.0, operations=operations))
    genotype = Genotype.load(workdir / "genotype.json")
    results = json.loads((workdir / "results.json").read_text())["search"]
    # Every edge is what the log leaves, except those that are told to be restored.
    assert checked.finished
    differing = (genotype.architecture() != checked.operations).sum()
    assert differing == len(results["restored"])
    assert dict(genotype.provenance)["dataset"] == "mnist5k"
    assert results["sampled_epochs"] == 5
    assert results["operation_counts"] == genotype.operation_counts()
    config = json.loads((workdir / "config.json").read_text())
    assert config["config"]["search.beta_p"] == 2.0
    assert config["search"]["versions"]["jax"] == jax.__version__
    for name in ("cells.png", "cells.svg", "accuracies.png", "accuracies.svg"):
        assert (workdir / name).stat().st_size > 1000
    for words in (
        "320 training and 320 validation",
        "estimated memory",
        "Stage 3 is over",
        " left",
    ):
        assert words in output


def test_the_same_seed_gives_bitwise_the_same_search(shell, undisturbed, tmp_path):
    finish(shell(tmp_path, "--config.runtime.steps_per_call=3"))
    assert search_outcome(tmp_path) == search_outcome(undisturbed[0])


@pytest.mark.slow
def test_another_seed_gives_other_permutations(shell, undisturbed, tmp_path):
    finish(shell(tmp_path, "--config.seed=1"))
    logs = (lines(path / "search/history.jsonl") for path in (tmp_path, undisturbed[0]))
    pairs = zip(*logs, strict=True)
    assert all(a["architecture"] != b["architecture"] for a, b in pairs if a["event"] == "sample")


@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_killed_search_ends_bitwise_as_if_it_had_not_been(shell, undisturbed, tmp_path, kills):
    log = tmp_path / "search/history.jsonl"
    for number in range(kills):
        process = shell(tmp_path)
        # At another moment of the epoch and of the save each time.
        kill_after_a_line(process, log, delay=0.07 * number)
    with log.open("a") as file:
        file.write('{"event": "sample", "sta')
    output = finish(shell(tmp_path))
    assert search_outcome(tmp_path) == search_outcome(undisturbed[0])
    assert output


def test_a_full_disk_is_one_line_and_the_search_goes_on_later(shell, undisturbed, tmp_path):
    process = shell(tmp_path, largest_file=64)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 1
    assert error.startswith("error: a checkpoint cannot be written")
    assert error.count("\n") == 1
    finish(shell(tmp_path))
    assert search_outcome(tmp_path) == search_outcome(undisturbed[0])


def test_a_closed_output_is_one_line(shell, tmp_path):
    process = shell(tmp_path)
    process.stdout.close()
    with process.stderr as stream:
        error = stream.read()
    assert process.wait(timeout=300) == 1
    assert "standard output was closed" in error
    assert error.count("\n") == 1


def test_checkpoints_that_cannot_be_read_are_one_line(shell, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed[0], workdir)
    (workdir / "genotype.json").unlink()
    for path in (workdir / "search/checkpoints").rglob("d/*"):
        path.write_bytes(b"")
    before = (workdir / "search/history.jsonl").read_text()
    process = shell(workdir)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 1
    assert error.splitlines()[-1].startswith("error: no checkpoint in ")
    assert "Traceback" not in error
    assert (workdir / "search/history.jsonl").read_text() == before


def test_a_finished_search_is_not_run_again(shell, undisturbed):
    workdir, _ = undisturbed
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    assert "nothing is run again" in finish(shell(workdir))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def small_config(data_dir, name="mnist5k"):
    config = configs.base_config()
    config.dataset.name = name
    config.dataset.data_dir = str(data_dir)
    configs.shrink(config)
    operations = ("none", "skip_connect", "sep_conv_3x3")
    config.search.update(operations=operations, cells=1, reductions=())
    config.runtime.optimization_level = 0
    return config


def quiet():
    return Reporter(Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def on_eight_devices(tmp_path_factory):
    """A search of CIFAR stand-ins over all devices, its test split destroyed beforehand."""
    data = tmp_path_factory.mktemp("cifar")
    stand_in.main([str(data)])
    destroyed = [path for path in data.rglob("*test*record*") if "cifar10-" in path.name]
    assert destroyed
    for path in destroyed:
        path.write_bytes(b"not a record")
    compiled_in, moments = [], []

    def note(event, _duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled_in.append(time.monotonic())

    jax.monitoring.register_event_duration_secs_listener(note)
    workdir = tmp_path_factory.mktemp("eight")
    reporter = quiet()
    advance = reporter.advance

    def advanced(completed, text):
        moments.append(time.monotonic())
        advance(completed, text)

    reporter.advance = advanced
    genotype = search(small_config(data, "cifar10"), workdir, reporter)
    jax.monitoring.clear_event_listeners()
    return genotype, compiled_in, moments


def test_nothing_is_compiled_after_the_first_epoch(on_eight_devices):
    _, compiled_in, moments = on_eight_devices
    assert len(moments) == 5
    assert compiled_in, "the listener heard nothing"
    assert [moment for moment in compiled_in if moments[0] < moment < moments[-1]] == []


def test_the_test_split_is_never_touched(on_eight_devices):
    genotype, _, _ = on_eight_devices
    assert len(genotype.normal) == 14


def test_an_empty_validation_part_is_refused(data_dir, tmp_path):
    config = small_config(data_dir)
    config.search.validation_fraction = 1e-9
    with pytest.raises(UserError, match=r"search.validation_fraction"):
        search(config, tmp_path, quiet())


def test_a_batch_larger_than_the_training_part_is_refused(data_dir, tmp_path):
    config = small_config(data_dir)
    config.search.batch_size = 4000
    with pytest.raises(UserError, match=r"config.search.batch_size is 4000"):
        search(config, tmp_path, quiet())
