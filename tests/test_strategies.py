"""Whole searches by every strategy, with real networks: killed, on two processes, and in full."""

import json

import numpy as np
import pytest
from command_line import kill_after_a_line
from outcomes import search_outcome
from pod import run_together
from searches import SMALL, finish, start_search

from cpnas_jax.architecture.genotype import Genotype
from cpnas_jax.strategies import check_search

# `cp` has tests of its own, `random` trains nothing.
TRAINED = ("child", "cp_plus", "random_search", "darts", "pc_darts", "cp_gradient")
GRADIENT = ("darts", "pc_darts", "cp_gradient")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("searches")


def flags(strategy):
    """Return the flags of a search of seconds."""
    own = {
        "random_search": ("--config.search.candidates=3",),
        "cp_plus": ("--config.search.max_scored=24", "--config.search.plus_score_examples=100"),
        # All that happens when alpha moves, and something before.
        **dict.fromkeys(GRADIENT, ("--config.search.epochs=6", "--config.search.alpha_warmup=2")),
    }
    return [*SMALL, f"--config.search.strategy={strategy}", *own.get(strategy, ())]


@pytest.fixture(scope="module", params=TRAINED)
def strategy(request):
    return request.param


@pytest.fixture(scope="module")
def undisturbed(base, strategy, tmp_path_factory):
    workdir = tmp_path_factory.mktemp(strategy)
    finish(start_search(base, workdir, *flags(strategy)))
    return workdir


def test_killed_it_ends_bitwise_as_if_it_had_not_been(base, strategy, undisturbed, tmp_path):
    log = tmp_path / "search/history.jsonl"
    for number in range(3):
        # At another moment of the epoch and of the save each time.
        kill_after_a_line(start_search(base, tmp_path, *flags(strategy)), log, 0.1 * number)
    finish(start_search(base, tmp_path, *flags(strategy)))
    assert search_outcome(tmp_path) == search_outcome(undisturbed)


def test_two_processes_end_with_one_genotype(base, strategy, tmp_path):
    """Each asserts what is sampled, dropped and derived to be the other's, or stops."""
    ended = run_together(
        lambda coordinator, index: [
            *("-m", "cpnas_jax.main", "--config=configs/mnist5k.py:search,smoke"),
            *(f"--config.dataset.data_dir={base / 'data'}", f"--workdir={tmp_path}"),
            *flags(strategy),
            *(f"--coordinator={coordinator}", "--num_processes=2", f"--process_id={index}"),
        ],
        *(2, 2),
        XDG_CACHE_HOME=str(base / "cache"),
    )
    assert [status for status, *_ in ended] == [0, 0], ended
    assert "4 cpu devices of 2 processes" in ended[0][1]
    assert check_search(tmp_path).finished


@pytest.mark.parametrize("name", ["cp", *TRAINED, "random"])
def test_the_whole_search_of_mnist5k(base, tmp_path, name):
    """Minutes each. Killed once on its way, which the log must not show."""
    arguments = [f"--config.search.strategy={name}"]
    if name != "random":
        process = start_search(base, tmp_path, *arguments, words="search")
        kill_after_a_line(process, tmp_path / "search/history.jsonl", 2.0)
    finish(start_search(base, tmp_path, *arguments, words="search"), seconds=3600)
    found = check_search(tmp_path)
    assert found.finished
    genotype = Genotype.load(tmp_path / "genotype.json")
    assert dict(genotype.provenance)["strategy"] == name
    assert all(len(edges) == 8 for _, edges in genotype.cells())
    results = json.loads((tmp_path / "results.json").read_text())["search"]
    assert results["operation_counts"] == genotype.operation_counts()
    log = (tmp_path / "search/history.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in log]
    scored = [line["child_accuracy"] for line in lines if line["event"] in ("sample", "epoch")]
    assert len(scored) == results["sampled_epochs"]
    if name != "random":
        # Ten digits; a supernet of a few hundred steps knows some of them.
        assert np.mean(scored[-5:]) > 0.15
