"""The smallest search and training by the command line: one process, and two of two devices each.

In the deterministic mode both have the same bits, also when they are stopped in the middle.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
import stand_in
from command_line import ROOT
from outcomes import OUTCOMES
from pod import run_together
from small_training import GENOTYPE, SMALL

SHARED = (
    *("--config.runtime.deterministic=4", "--config.runtime.optimization_level=0"),
    "--config.runtime.steps_per_call=2",
)
MODES = {
    "search": (
        *("--config.search.cells=1", "--config.search.reductions=()"),
        *("--config.search.operations=('none', 'skip_connect')", "--config.search.rounds=4"),
    ),
    "train": (*SMALL[:-1], "--config.train.epochs=8"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    files = tmp_path_factory.mktemp("files")
    stand_in.prepare(stand_in.Cifar10, files / "data")
    GENOTYPE.save(files / "cells.json")
    return files


def command(files, mode, workdir):
    genotype = [f"--config.genotype={files / 'cells.json'}"] if mode == "train" else []
    return [
        *("-m", "cpnas_jax.main", f"--config=configs/cifar10.py:{mode},smoke"),
        *(f"--config.dataset.data_dir={files / 'data'}", f"--workdir={workdir}"),
        *(*SHARED, *MODES[mode], *genotype),
    ]


def together(files, mode, workdir):
    """Run two processes of two devices; return status and texts of both."""
    return run_together(
        lambda coordinator, index: [
            *command(files, mode, workdir),
            *(f"--coordinator={coordinator}", "--num_processes=2", f"--process_id={index}"),
        ],
        *(2, 2),
        XDG_CACHE_HOME=str(files / "cache"),
    )


def alone(files, mode, workdir, devices):
    """Run one process; return its status and texts."""
    return run_together(
        lambda *_: command(files, mode, workdir), 1, devices, XDG_CACHE_HOME=str(files / "cache")
    )[0]


# A training on two processes is among the slow tests of faults too (kills.py, 2 x 2).
@pytest.fixture(scope="module", params=["search", pytest.param("train", marks=pytest.mark.slow)])
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def undisturbed(files, mode, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    status, _, errors = alone(files, mode, workdir, 1)
    assert status == 0, errors
    return workdir


# The short form leaves it to the run that is stopped below, which shows the same.
@pytest.mark.slow
def test_two_processes_of_two_devices_have_the_same_bits(files, mode, undisturbed, tmp_path):
    first, second = together(files, mode, tmp_path)
    assert [first[0], second[0]] == [0, 0], (first, second)
    assert "4 cpu devices of 2 processes, batch 32 in all, 8 a device" in first[1]
    # The first alone speaks; what gloo says of its connections is not the project's.
    said = [line for line in second[1].splitlines() if "Gloo" not in line and "Rank" not in line]
    assert said == []
    assert OUTCOMES[mode](tmp_path) == OUTCOMES[mode](undisturbed)
    assert {path.name for path in tmp_path.iterdir()} == {
        path.name for path in undisturbed.iterdir()
    }


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_several_devices_of_a_process_have_the_same_bits(
    files, mode, undisturbed, tmp_path, devices
):
    status, _, errors = alone(files, mode, tmp_path, devices)
    assert status == 0, errors
    assert OUTCOMES[mode](tmp_path) == OUTCOMES[mode](undisturbed)


def test_one_sigterm_stops_both_processes_at_the_same_step(files, mode, undisturbed, tmp_path):
    """Resumed by one process: the number of processes is no part of the result."""
    log = tmp_path / "out"
    arguments = command(files, mode, tmp_path / "run")
    with log.open("w") as file:
        pod = subprocess.Popen(
            [ROOT / "launch/local_pod.sh", "2", "2", *arguments[2:]],
            cwd=ROOT,
            env={
                **os.environ,
                "XLA_FLAGS": "",
                "PYTHON": sys.executable,
                "PYTHONPATH": str(ROOT),
                "XDG_CACHE_HOME": str(files / "cache"),
            },
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for(log, "epoch 1/", pod)
            pod.send_signal(signal.SIGTERM)
            assert pod.wait(timeout=120) == 75, log.read_text()
        finally:
            pod.kill()
    said = log.read_text()
    assert "4 cpu devices of 2 processes, batch 32 in all, 8 a device" in said
    assert "and saved; the same command resumes" in said
    status, output, errors = alone(files, mode, tmp_path / "run", 1)
    assert status == 0, errors
    assert "Resumed " in output
    assert "Begun elsewhere: devices was" in output
    found, expected = OUTCOMES[mode](tmp_path / "run"), OUTCOMES[mode](undisturbed)
    assert found == expected


def wait_for(log, text, process):
    deadline = time.monotonic() + 280
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(1, 4), (2, 2)])
def test_collectives_of_small_layers_keep_their_order(files, tmp_path, processes, devices):
    """Statistics over all devices, many and small: at the second start each met its own order."""
    keys = [
        *("--config.search.cells=1", "--config.search.reductions=(0,)"),
        *("--config.dataset.image_size=12", "--config.search.rounds=1", "--config.seed=3"),
    ]
    for name in ("first", "second"):
        workdir = tmp_path / name
        ended = run_together(
            lambda coordinator, index, workdir=workdir: [
                *("-m", "cpnas_jax.main", "--config=configs/cifar10.py:search,smoke"),
                *(f"--config.dataset.data_dir={files / 'data'}", f"--workdir={workdir}", *keys),
                *(f"--coordinator={coordinator}", f"--num_processes={processes}"),
                f"--process_id={index}",
            ],
            *(processes, devices),
            XDG_CACHE_HOME=str(tmp_path / "cache"),
        )
        assert [status for status, *_ in ended] == [0] * processes, ended
    assert OUTCOMES["search"](tmp_path / "second") == OUTCOMES["search"](tmp_path / "first")
