"""A training in a process of its own ends bitwise the same after a SIGKILL at any moment."""

import os
import signal
import subprocess
import sys

import pytest
import stand_in
from command_line import ROOT, kill_after_a_line
from outcomes import train_outcome
from small_training import GENOTYPE, SMALL


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Start a training of six epochs of ten steps on one device; programs come from a cache."""
    files = tmp_path_factory.mktemp("files")
    stand_in.prepare(stand_in.Cifar10, files / "data")
    GENOTYPE.save(files / "cells.json")
    arguments = [
        *("--config=configs/cifar10.py:train,smoke", f"--config.dataset.data_dir={files / 'data'}"),
        *(f"--config.genotype={files / 'cells.json'}", "--config.train.epochs=6", *SMALL),
        *("--config.runtime.compilation_cache=True", "--config.runtime.checkpoint_every=3"),
    ]

    def call(workdir):
        return subprocess.Popen(
            [sys.executable, "-m", "cpnas_jax.main", *arguments, f"--workdir={workdir}"],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": "", "XDG_CACHE_HOME": str(files / "cache")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return call


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    finish(start(workdir))
    return workdir


def finish(process):
    output, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return output


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_killed_training_ends_bitwise_as_if_it_had_not_been(start, undisturbed, tmp_path, kills):
    log = tmp_path / "train/metrics.jsonl"
    for number in range(kills):
        process = start(tmp_path)
        # At another moment of the epoch and of the save each time.
        kill_after_a_line(process, log, 0.03 * number)
        assert process.returncode == -signal.SIGKILL
    assert "Resumed " in finish(start(tmp_path))
    assert train_outcome(tmp_path) == train_outcome(undisturbed)
