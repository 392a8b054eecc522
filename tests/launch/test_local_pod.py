"""launch/local_pod.sh with a stand-in for the processes: what they get, and that none is left."""

import os
import pathlib
import signal
import subprocess
import time

import pytest
from conftest import ROOT, STAND_INS, recorded

LONG = "sleep 300 & note pid $!; wait"
HEEDS = "trap 'note heard TERM; exit 75' TERM; trap 'note heard INT; exit 75' INT; note ready; "
WAITS = "while :; do sleep 0.02; done"


class Pod:
    """A running launcher in a session of its own, as a terminal would have it."""

    def __init__(self, directory, *arguments, **variables):
        self.directory = directory
        self.process = subprocess.Popen(
            [ROOT / "launch" / "local_pod.sh", *map(str, arguments)],
            env={
                **os.environ,
                "PYTHON": str(STAND_INS / "python"),
                "STAND_IN": str(directory),
                "LOCAL_POD_GRACE": "0.2",
                **variables,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def notes(self, index):
        file = self.directory / f"process-{index}"
        return file.read_text().splitlines() if file.exists() else []

    def wait_for(self, note, *indices):
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if all(any(note in line for line in self.notes(index)) for index in indices):
                return
            time.sleep(0.01)
        raise AssertionError([self.notes(index) for index in indices])

    def end(self):
        """Return the exit status when the launcher has ended and nothing of the pod is left."""
        self.output, self.errors = self.process.communicate(timeout=30)
        numbers = [
            int(line.split()[1])
            for file in self.directory.glob("process-*")
            for line in file.read_text().splitlines()
            if line.startswith("pid ")
        ]
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and any(map(runs, numbers)):
            time.sleep(0.01)
        assert numbers
        assert not [number for number in numbers if runs(number)]
        return self.process.returncode


def runs(number):
    try:
        state = pathlib.Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.fixture
def start(tmp_path):
    started = []

    def begin(*arguments, **variables):
        started.append(Pod(tmp_path, *arguments, **variables))
        return started[-1]

    yield begin
    for pod in started:
        pod.process.kill()
        pod.process.communicate()


def test_each_process_knows_the_pod_and_has_forced_devices(start, tmp_path):
    flags = ["--config=configs/a b.py", "--config.search.reductions=(1, 3)", '--it\'s="x"']
    pod = start(2, 4, *flags, XLA_FLAGS="--xla_dump_to=/nowhere")
    assert pod.end() == 0
    ((first,), (second,)) = (recorded(tmp_path / f"calls-{index}") for index in range(2))
    assert first[:2] == ["-m", "cpnas_jax.main"]
    address = first[2].removeprefix("--coordinator=127.0.0.1:")
    assert 1024 <= int(address) < 65536
    assert first[3:] == ["--num_processes=2", "--process_id=0", *flags]
    assert second == [*first[:4], "--process_id=1", *flags]
    for index in range(2):
        assert pod.notes(index)[1:] == [
            "XLA_FLAGS --xla_dump_to=/nowhere --xla_force_host_platform_device_count=4",
            "JAX_PLATFORMS cpu",
        ]


def test_one_process_is_no_pod(start, tmp_path):
    assert start(1, 2, "--config=x").end() == 0
    assert recorded(tmp_path / "calls-0") == [["-m", "cpnas_jax.main", "--config=x"]]


def test_lines_of_the_others_bear_their_number(start):
    pod = start(
        3,
        1,
        BEHAVIOUR_0="printf 'bar  50%%\\tbar 100%%\\n'; echo problem >&2",
        BEHAVIOUR_1="printf 'one\\n\\ntwo'; echo trouble >&2",
    )
    assert pod.end() == 0
    lines = pod.output.split("\n")
    assert sorted(lines) == sorted(["bar  50%\tbar 100%", "[1] one", "[1] ", "[1] two", ""])
    assert sorted(pod.errors.splitlines()) == ["[1] trouble", "problem"]


@pytest.mark.parametrize(
    ("behaviours", "status"),
    [
        ({"BEHAVIOUR_0": LONG, "BEHAVIOUR_1": "exit 3"}, 3),
        ({"BEHAVIOUR_0": "sleep 5; exit 4", "BEHAVIOUR_1": "exit 3"}, 3),
        ({"BEHAVIOUR_0": "exit 75", "BEHAVIOUR_1": "sleep 5; exit 1"}, 75),
        ({"BEHAVIOUR_0": LONG, "BEHAVIOUR_1": "kill -KILL $$"}, 137),
        # Who has finished is not waited for, so the others may take longer than the grace.
        ({"BEHAVIOUR_0": "sleep 0.6", "BEHAVIOUR_1": "exit 0"}, 0),
    ],
)
def test_the_first_failure_is_the_status(start, behaviours, status):
    assert start(2, 1, **behaviours).end() == status


def test_the_others_have_some_time(start):
    ends = "trap 'note heard TERM' TERM; sleep 0.5; note done; exit 9"
    pod = start(2, 1, BEHAVIOUR_0=ends, BEHAVIOUR_1="exit 3", LOCAL_POD_GRACE="20")
    assert pod.end() == 3
    assert pod.notes(0)[-1] == "done"


def test_children_of_a_process_do_not_outlive_it(start):
    assert start(2, 1, BEHAVIOUR="sleep 300 & note pid $!").end() == 0


@pytest.mark.parametrize(
    ("number", "heard"),
    [(signal.SIGTERM, "TERM"), (signal.SIGINT, "INT"), (signal.SIGHUP, "TERM")],
)
def test_a_signal_to_the_terminals_group_reaches_each_process_once(start, number, heard):
    pod = start(2, 1, BEHAVIOUR=HEEDS + WAITS)
    pod.wait_for("ready", 0, 1)
    os.killpg(pod.process.pid, number)
    assert pod.end() == 75
    for index in range(2):
        assert pod.notes(index).count(f"heard {heard}") == 1


def test_who_saves_is_not_hurried(start):
    saves = "trap 'note heard; sleep 0.6; note saved; exit 75' TERM; note ready; " + WAITS
    pod = start(2, 1, BEHAVIOUR_0=saves, BEHAVIOUR_1=HEEDS + WAITS)
    pod.wait_for("ready", 0, 1)
    pod.process.terminate()
    assert pod.end() == 75
    assert pod.notes(0)[-1] == "saved"


def test_stopped_before_it_can_heed_is_resumable(start):
    pod = start(2, 1, BEHAVIOUR="note ready; " + WAITS)
    pod.wait_for("ready", 0, 1)
    pod.process.terminate()
    assert pod.end() == 75


def test_a_second_signal_kills(start):
    pod = start(2, 1, BEHAVIOUR="trap 'note heard' TERM; note ready; " + WAITS)
    pod.wait_for("ready", 0, 1)
    pod.process.terminate()
    pod.wait_for("heard", 0, 1)
    pod.process.terminate()
    assert pod.end() == 137


def test_nothing_outlives_a_launcher_that_is_killed(start):
    pod = start(2, 1, BEHAVIOUR="note ready; " + LONG)
    pod.wait_for("ready", 0, 1)
    os.killpg(pod.process.pid, signal.SIGKILL)
    assert pod.end() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the numbers of processes and of devices are missing"),
        (["2"], "the numbers of processes and of devices are missing"),
        (["0", "1"], "the number of processes is '0', not a positive whole number"),
        (["1", "--config=x"], "the number of devices is '--config=x', not a positive"),
    ],
)
def test_wrong_usage_is_one_line(start, arguments, message):
    pod = start(*arguments)
    _, errors = pod.process.communicate()
    assert pod.process.returncode == 2
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1


def test_other_mistakes_are_one_line(start):
    for variables, status in (({"LOCAL_POD_GRACE": "soon"}, 2), ({"PYTHON": "/no/python"}, 1)):
        pod = start(2, 1, **variables)
        _, errors = pod.process.communicate()
        assert pod.process.returncode == status
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1
