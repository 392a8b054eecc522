"""launch/tpu_worker.sh on two worker's home directories, called by launch/tpu.sh."""

import pathlib
import shutil
import signal
import subprocess
import time

import pytest
from conftest import STAND_INS, recorded

POD = ["--name=pod", "--project=p", "--zone=z"]
RUN = [*POD, "--workdir=gs://bucket/run 1"]


@pytest.fixture
def homes(cloud):
    found = [cloud.directory / "workers" / name for name in ("0", "1")]
    for home in found:
        programs = home / ".local" / "bin"
        programs.mkdir(parents=True)
        for name in ("uv", "worker_python"):
            shutil.copy(STAND_INS / name, programs)
    return found


@pytest.fixture
def ready(cloud, homes):
    done = cloud.tpu("setup", *POD, "--data=gs://bucket/data")
    assert done.returncode == 0, done.stderr
    yield homes
    for home in homes:
        worker(home, "stop", "KILL", "5")


def worker(home, *arguments):
    return subprocess.run(
        ["bash", home / "tpu_worker.sh", *arguments],
        env={"HOME": str(home), "PATH": "/usr/local/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )


def state(home):
    tag, _, *rest = worker(home, "status").stdout.split()
    assert tag == "cpnas-worker"
    return " ".join(rest)


def wait_for(home, wanted):
    deadline = time.monotonic() + 20
    while state(home) != wanted and time.monotonic() < deadline:
        time.sleep(0.05)
    assert state(home) == wanted


def pid_of(home):
    file = home / "cpnas_run" / "pid"
    deadline = time.monotonic() + 20
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return int(file.read_text())


def wait_until_trapped(home):
    """The stand-in for main has begun to wait for its signal."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        caught = pathlib.Path(f"/proc/{pid_of(home)}/status").read_text()
        if int(caught.split("SigCgt:")[1].split()[0], 16) & (1 << (signal.SIGUSR1 - 1)):
            return
        time.sleep(0.02)
    raise AssertionError("it did not begin")


def test_setting_up_installs_the_commit_with_what_a_pod_needs(cloud, ready):
    for home in ready:
        calls = (home / "uv-calls").read_text().splitlines()
        assert calls == [
            f"venv --quiet --allow-existing --python 3.11 {home}/cpnas_venv",
            f"pip install --quiet --python {home}/cpnas_venv/bin/python {home}/cpnas_jax[tpu,demo]",
        ]
        assert recorded(home / "main-calls") == [["-m", "cpnas_jax.main", "--help"]]
        assert (home / "cpnas_jax" / "setup.cfg").exists()
        assert state(home) == "idle"
    rsync = ["storage", "rsync", "--recursive", "gs://bucket/data"]
    assert [call for call in cloud.calls() if call[0] == "storage"] == [
        [*rsync, f"{home}/tensorflow_datasets"] for home in ready
    ]


def test_a_worker_whose_installation_fails_stays_bare(cloud, homes):
    (homes[1] / ".local" / "bin" / "uv").write_text("#!/bin/sh\nexit 4\n")
    done = cloud.tpu("setup", *POD)
    assert done.returncode == 4
    assert [state(home) for home in homes] == ["idle", "bare"]
    done = cloud.tpu("run", *RUN, "--", "--config=x")
    assert done.returncode == 1
    assert "not set up; launch/tpu.sh setup does that" in done.stderr


def test_a_run_is_detached_watched_and_its_status_kept(cloud, ready):
    flags = ["--config=a b'c\"", "--config.search.reductions=(1, 3)", "--status=5"]
    # Where ssh would wait for the end of the run's output, this call would too.
    assert cloud.tpu("run", *RUN, "--", *flags).returncode == 0
    for home in ready:
        wait_for(home, "ended 5")
        main = ["-m", "cpnas_jax.main", "--workdir=gs://bucket/run 1", *flags]
        assert recorded(home / "main-calls")[-1] == main
        assert (home / "cpnas_run" / "log").read_text().splitlines()[-1].endswith("exit status 5")
    done = cloud.tpu("resume", *RUN, "--type=v4-16", "--poll=0", "--", *flags)
    assert done.returncode == 5
    assert "exit status 5" in done.stderr


def test_stopping_is_one_signal_and_is_waited_for(cloud, ready):
    assert cloud.tpu("run", *RUN, "--", "--until=TERM").returncode == 0
    for home in ready:
        assert state(home) == "running"
        wait_until_trapped(home)
    for verb in (["run", *RUN, "--", "--status=0"], ["setup", *POD]):
        done = cloud.tpu(*verb)
        assert done.returncode in (1, 3)
        assert "a run is active here" in done.stderr
    done = cloud.tpu("stop", *POD, "--grace=10")
    assert done.returncode == 0, done.stderr
    for home in ready:
        assert state(home) == "ended 75"
        assert (home / "cpnas_run" / "log").read_text().count("heard TERM") == 1


def test_the_machines_own_signal_reaches_main_once(ready):
    """At a shutdown every process of the session gets SIGTERM, the one that waits as well."""
    home = ready[0]
    worker(home, "start", "--until=TERM")
    wait_until_trapped(home)
    parent = int(pathlib.Path(f"/proc/{pid_of(home)}/stat").read_text().split()[3])
    assert "supervise" in pathlib.Path(f"/proc/{parent}/cmdline").read_text()
    for number in (parent, pid_of(home)):
        subprocess.run(["kill", "-TERM", str(number)], check=True)
    wait_for(home, "ended 75")
    assert (home / "cpnas_run" / "log").read_text().count("heard TERM") == 1


def test_a_run_that_left_no_status_has_vanished(ready):
    home = ready[0]
    worker(home, "start", "--until=TERM")
    wait_until_trapped(home)
    main = pid_of(home)
    parent = pathlib.Path(f"/proc/{main}/stat").read_text().split()[3]
    subprocess.run(["kill", "-KILL", parent], check=True)
    # What is left of a run still counts as one.
    assert state(home) == "running"
    subprocess.run(["kill", "-KILL", str(main)], check=True)
    wait_for(home, "vanished")


def test_what_does_not_end_is_reported_and_can_be_killed(ready):
    home = ready[0]
    worker(home, "start", "--until=USR2")
    wait_until_trapped(home)
    done = worker(home, "stop", "CONT", "0")
    assert done.returncode == 1
    assert "still running 0 s after SIGCONT" in done.stderr
    assert worker(home, "stop", "KILL", "10").returncode == 0
    assert state(home) == "ended 137"


def test_a_verb_that_is_none(ready):
    done = worker(ready[0], "begin")
    assert done.returncode == 2
    assert "there is no verb 'begin'" in done.stderr
