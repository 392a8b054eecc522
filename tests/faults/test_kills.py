"""The script that kills runs, on a stand-in for a search that starts in no time.

The real ones are killed in tests/test_search.py and tests/test_train_killed.py.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys

import attempts
import kills as script
import pytest

STAND_IN = """
import json, os, pathlib, signal, subprocess, sys, time
workdir, fault, last = pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
if fault == "needs one start":
    last = workdir
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
log, found = workdir / "search/history.jsonl", workdir / "search/checkpoints"
found.mkdir(parents=True, exist_ok=True)
numbers = [int(path.name) for path in found.iterdir() if path.name.isdigit()]
number, total, state = max(numbers, default=0), 30, 0.0
print(f"Resumed after sampled epoch {number}." if number else "Searching", flush=True)
if number:
    state = json.loads((found / str(number) / "record/metadata").read_text())["digest"]
log.with_suffix(".new").write_text("".join(log.open().readlines()[:number] if number else []))
log.with_suffix(".new").rename(log)
time.sleep(0.5)
print("Compiled in 0.5 s", flush=True)
if fault == "leaves a child":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], stdout=2)
# However late the kills come, it is not over before the start after the last.
while number < total or not last.exists():
    time.sleep(0.07 if fault == "takes its time" else 0.01)
    if fault == "hangs" and number == 9:
        continue
    if stop:
        sys.exit(1 if fault == "fails when stopped" else 75)
    if number == total:
        continue
    number, state = number + 1, state + (time.time() if fault == "forgets" else number)
    with log.open("a") as file:
        file.write(json.dumps({"epoch": number, "seconds": time.time()}) + "\\n")
    part = found / f"{number}.orbax-checkpoint-tmp"
    (part / "record").mkdir(parents=True, exist_ok=True)
    (part / "record/metadata").write_text(json.dumps({"digest": state}))
    time.sleep(0.01)
    part.rename(found / str(number))
(workdir / "genotype.json").write_text("{}")
(workdir / "results.json").write_text(json.dumps({"search": {"seconds": time.time()}}))
"""


@pytest.fixture
def killed(tmp_path, capsys):
    """Have the stand-in killed; return the JSON object and the table's rows."""

    def call(fault="none", **changes):
        (tmp_path / "run.py").write_text(STAND_IN)
        options = {"mode": "search", "kills": 6, "terms": 0, "target": "one", "seed": 0}
        options |= {"processes": 1, "devices": 1, **changes}
        command = [sys.executable, "-S", str(tmp_path / "run.py")]
        last = {"killed": tmp_path / f"output{options['kills'] + options['terms']}"}
        runs = script.Runs(
            "search",
            lambda workdir: [*command, str(workdir), fault, str(last.get(workdir.name, workdir))],
            dict(os.environ),
            lambda line: "run.py" in line,
        )
        result = script.examine(runs, tmp_path, argparse.Namespace(**options))
        return json.loads(json.dumps(result)), capsys.readouterr().out.splitlines()[1:]

    return call


@pytest.mark.parametrize("signals", [{"KILL": 6}, {"TERM": 6}, {"KILL": 2, "TERM": 4}])
def test_kills_of_a_run_that_resumes(killed, signals):
    result, rows = killed(kills=signals.get("KILL", 0), terms=signals.get("TERM", 0))
    assert result["failures"] == []
    assert (result["signals"], result["bitwise_equal"]) == (signals, True)
    assert sum(result["phases"].values()) == len(rows) == 6
    # Kills fell into the start and into the work, and some of what was done was kept.
    assert set(result["phases"]) & {"importing", "reading, restoring, compiling"}
    assert set(result["phases"]) & {"first epoch", "epochs", "saving"}
    assert any("Resumed after sampled epoch" in row for row in rows)


def test_a_run_that_resumes_otherwise_is_seen(killed):
    result, _ = killed("forgets")
    assert not result["bitwise_equal"]
    assert "two runs left alone differ in state" in result["failures"]
    assert "the killed run differs in state" in result["failures"]


def test_a_stopped_run_with_another_status_is_seen(killed):
    result, _ = killed("fails when stopped", kills=0, terms=6)
    assert not result["bitwise_equal"]
    assert "TERM in " in result["failures"][0]
    assert "ended it with 1" in result["failures"][0]


def test_a_process_that_is_left_is_seen_and_ended(killed, monkeypatch):
    monkeypatch.setattr(attempts, "LINGERING", 0.2)
    result, _ = killed("leaves a child")
    assert not result["bitwise_equal"]
    assert "processes are left" in result["failures"][0]
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert "time.sleep(100)" not in listed.stdout


def test_a_run_that_works_longer_than_one_waits_for_a_hanging_one(killed, monkeypatch):
    monkeypatch.setattr(attempts, "PATIENCE", 1.5)
    result, _ = killed("takes its time", kills=0)
    assert result["failures"] == []
    assert result["work_seconds"] > attempts.PATIENCE


def test_a_run_that_hangs_is_seen(killed, monkeypatch):
    monkeypatch.setattr(attempts, "PATIENCE", 1.5)
    result, _ = killed("hangs", kills=0)
    assert "nothing happened in 2 s; its output ends with: " in result["failures"][0]


def test_a_run_that_ends_too_soon_is_seen(killed, monkeypatch):
    monkeypatch.setattr(script, "moment", lambda *_: script.Moment(True, 0, 100.0))
    result, _ = killed("needs one start")
    assert result["failures"] == ["the run ended after 0 kills; give it more epochs"]


def test_moments_leave_enough_for_all_kills_and_little_after_the_last():
    alone = script.Alone({}, lines=100, start_seconds=10.0, work_seconds=50.0)
    left = []
    for seed in range(50):
        rng, done, in_work = random.Random(seed), 0, 0
        for later in reversed(range(30)):
            when = script.moment(rng, alone, done, later)
            in_work += when.compiled
            assert 0 <= when.seconds <= (0.5 if when.compiled else 10)
            done += when.lines
            assert done < 100
        assert 5 <= in_work <= 25
        left.append(100 - done)
    assert sorted(left)[25] < 30


@pytest.mark.parametrize(
    ("number", "status", "phase", "several", "fine"),
    [
        (signal.SIGKILL, -9, "saving", False, True),
        (signal.SIGKILL, 0, "saving", False, False),
        (signal.SIGKILL, 1, "saving", False, False),
        (signal.SIGKILL, 137, "saving", True, True),
        (signal.SIGKILL, 0, "saving", True, False),
        (signal.SIGTERM, 75, "epochs", False, True),
        (signal.SIGTERM, -15, "epochs", False, False),
        (signal.SIGTERM, 143, "epochs", True, False),
        (signal.SIGTERM, -15, "importing", False, True),
        (signal.SIGTERM, 143, "importing", True, True),
        (signal.SIGTERM, 1, "importing", True, False),
    ],
)
def test_how_a_run_may_end(number, status, phase, several, fine):
    assert script.allowed(number, status, phase, several) == fine


def test_the_command_line(monkeypatch, tmp_path, capsys):
    """One process runs main itself, several go through the launcher; other flags go to main."""
    asked = []

    def examine(runs, scratch, options):
        asked.append((runs.command(scratch / "run"), runs.environment))
        return {"bitwise_equal": len(asked) == 1}

    monkeypatch.setattr(script, "examine", examine)
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: None)
    arguments = ["--mode=train", f"--keep={tmp_path}", "--config.train.epochs=9"]
    assert script.main(arguments) == 0
    assert script.main([*arguments, "--processes=2", "--devices=3"]) == 1
    (one, environment), (pod, _) = asked
    assert one[:3] == [sys.executable, "-m", "cpnas_jax.main"]
    assert environment["XLA_FLAGS"].endswith("_device_count=1")
    assert pod[:3] == ["launch/local_pod.sh", "2", "3"]
    for command in (one, pod):
        assert command[-2:] == ["--config.train.epochs=9", f"--workdir={tmp_path / 'run'}"]
        assert f"--config.dataset.data_dir={tmp_path / 'data'}" in command
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"bitwise_equal": True},
        {"bitwise_equal": False},
    ]
