"""The mode `report` from the command line."""

import fcntl
import json
import subprocess
import sys

import made_runs
import pytest
from command_line import ROOT, call_main

from cpnas_jax import config as configs
from cpnas_jax import main
from cpnas_jax.runtime import environment
from cpnas_jax.runtime.errors import UserError

REPORT = "--config=configs/mnist5k.py:report"


@pytest.fixture
def call(monkeypatch):
    return lambda *arguments: call_main(monkeypatch, *arguments)


@pytest.fixture
def run(tmp_path):
    config = configs.base_config()
    config.search.operations = ("none", "skip_connect", "sep_conv_3x3")
    made_runs.put_search(tmp_path / "run", config)
    return tmp_path / "run"


def test_it_says_what_it_wrote(run, call, capsys):
    assert call(REPORT, f"--workdir={run}") == 0
    output = capsys.readouterr().out
    for name in ("report.html", "cells.svg", "accuracies.svg", "operations.svg", "film.svg"):
        assert f"{run / name}" in output
        assert (run / name).stat().st_size > 1000


def test_it_looks_at_a_run_that_another_process_works_on(run, call):
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert call(REPORT, f"--workdir={run}") == 0
    assert (run / "report.html").exists()


def test_a_workdir_without_a_run_is_one_line_and_nothing_is_made(tmp_path, call, capsys):
    (tmp_path / "empty").mkdir()
    for name, message in (("none", "there is no --workdir="), ("empty", "holds no run")):
        assert call(REPORT, f"--workdir={tmp_path / name}") == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_a_damaged_run_is_one_line_and_nothing_is_made(run, call, capsys):
    (run / "results.json").write_text('{"search": ')
    assert call(REPORT, f"--workdir={run}") == 1
    error = capsys.readouterr().err
    assert f"error: {run / 'results.json'} is damaged" in error
    assert error.count("\n") == 1
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("mode", main._REPORTED)
def test_each_phase_ends_with_a_report(run, call, monkeypatch, mode):
    monkeypatch.setitem(main._MODES, mode, lambda *_: None)
    assert call(f"--config=configs/cifar10.py:{mode}", f"--workdir={run}") == 0
    assert (run / "report.html").exists()


def test_a_phase_that_fails_leaves_the_report_as_it_was(run, call, monkeypatch):
    def failing(*_):
        raise UserError("a mistake")

    monkeypatch.setitem(main._MODES, "search", failing)
    assert call("--config=configs/mnist5k.py:search", f"--workdir={run}") == 1
    assert not (run / "report.html").exists()


def test_the_command_is_noted_as_a_shell_takes_it(tmp_path):
    """What is noted, run by a shell, has the same arguments."""
    script = "from cpnas_jax.runtime.environment import command; print(command())"
    arguments = ["--workdir=a b", "--config.search.operations=('none','skip_connect')", "$HOME"]
    noted = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert noted.startswith("python -c ")
    again = noted.replace(script, "import sys, json; print(json.dumps(sys.argv[1:]))", 1)
    shell = again.replace("python", sys.executable, 1)
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == arguments
    assert environment.record()["command"] == environment.command()
