"""What a run that finishes nothing says: once in a while, and for what it waits."""

import re
import threading
import time

import pytest
from pod import run_together

from cpnas_jax.runtime import stall

HINT = "The run goes on; see config.runtime.stall_seconds"


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    time_is = [100.0]
    monkeypatch.setattr(stall._now, "clock", lambda: time_is[0])
    stall.at("search in sampled epoch 3 of 35, after step 50 of the child")

    def after(seconds):
        time_is[0] += seconds

    return after


@pytest.fixture
def told():
    return []


@pytest.fixture
def watch(clock, told):
    del clock
    return stall.Watch(10, "process 1 of 2", told.append)


def test_a_stall_is_told_at_growing_intervals(clock, watch, told):
    with stall.waiting("the last save in /run"), stall.waiting("process 0"):
        assert watch.look() == 10
        clock(9.5)
        assert watch.look() == 0.5
        assert told == []
        clock(0.5)
        assert watch.look() == 10
        assert len(told) == 1
        clock(5)
        assert watch.look() == 5
        clock(5)
        assert watch.look() == 20
        clock(20)
        assert watch.look() == 40
    assert len(told) == 3
    assert told[0].startswith("stalled: process 1 of 2 on ")
    assert "search in sampled epoch 3 of 35, after step 50 of the child: nothing was fin" in told[0]
    assert f"for 10 s; it has waited 10 s for the last save in /run: process 0. {HINT}" in told[0]
    assert "for 40 s; it has waited 40 s for" in told[2]
    assert [text.count("\n") for text in told] == [1] * 3


@pytest.mark.parametrize("finish", [lambda: stall.at("train in epoch 2"), lambda: wait_shortly()])
def test_what_is_finished_begins_the_interval_anew(clock, watch, told, finish):
    for _ in range(5):
        clock(9)
        finish()
        assert watch.look() == 10
    assert told == []
    clock(10)
    watch.look()
    finish()
    assert watch.look() == 10
    clock(10)
    watch.look()
    assert len(told) == 2
    assert all("nothing was finished for 10 s" in text for text in told)


def wait_shortly():
    with stall.waiting("the compiler"):
        pass


def test_how_long_the_wait_itself_has_lasted(clock, watch, told):
    clock(6)
    with stall.waiting("the compiler"):
        clock(4)
        watch.look()
    assert "finished for 10 s; it has waited 4 s for the compiler" in told[0]


def test_without_a_wait_the_place_of_the_main_thread_is_told(clock, watch, told):
    """Looked at from another thread, for which this one waits in `threading`."""
    clock(10)
    thread = threading.Thread(target=watch.look)
    thread.start()
    thread.join()
    assert "it waits for nothing that is known, and is in " in told[0]
    assert re.search(r" is in \S+ \(threading\.py, line \d+\)\. The run", told[0])


def test_a_wait_that_fails_is_over():
    with pytest.raises(ValueError, match="no"), stall.waiting("process 0"):
        raise ValueError("no")
    assert stall._now.waits == []


def test_a_run_is_watched(capfd):
    with stall.watched(0.1, "process 0 of 1"), stall.waiting("the compiler"):
        time.sleep(0.5)
    said = capfd.readouterr().err.splitlines()
    assert 1 <= len(said) <= 3
    assert all(line.startswith("stalled: process 0 of 1 on ") for line in said)
    assert "starting: nothing was finished for 0 s; it has waited 0 s for the compiler" in said[0]
    assert not any(thread.name == "stall watch" for thread in threading.enumerate())


def test_a_run_need_not_be_watched(capfd):
    with stall.watched(0, "process 0 of 1"):
        assert not any(thread.name == "stall watch" for thread in threading.enumerate())
    assert capfd.readouterr().err == ""


SCRIPT = """
import sys, time
from cpnas_jax.runtime import processes, stall

coordinator, index = sys.argv[1], int(sys.argv[2])
processes.start(coordinator, 2, index, "off")
processes.meet("the start")
with stall.watched(1, processes.name()):
    if index == 0:
        time.sleep(2.5)
    processes.meet("the crossing")
"""


def test_the_process_that_keeps_the_others_waiting_is_seen(tmp_path):
    script = tmp_path / "sleeps.py"
    script.write_text(SCRIPT)
    ended = run_together(lambda coordinator, index: (script, coordinator, index), 2)
    assert [status for status, *_ in ended] == [0, 0], ended
    sleeping, waiting = (
        [line for line in errors.splitlines() if line.startswith("stalled: ")]
        for *_, errors in ended
    )
    assert sleeping[0].startswith("stalled: process 0 of 2 on ")
    assert (
        "it waits for nothing that is known, and is in <module> (sleeps.py, line 10)"
        in (sleeping[0])
    )
    assert waiting[0].startswith("stalled: process 1 of 2 on ")
    assert re.search(r"it has waited \d s for the other processes at 'the crossing'\. ", waiting[0])
