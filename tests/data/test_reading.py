import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading

import photos
import pytest
from stream_cases import SIZE, assert_same, gone, refusal, training

from cpnas_jax.data import stream


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    directory = tmp_path_factory.mktemp("photos")
    photos.prepare(directory)
    return directory


@pytest.fixture(scope="module")
def train(root):
    return stream.open_stream("photos", "train", root, SIZE)


def threads_of_grain():
    return [thread for thread in threading.enumerate() if "grain" in thread.name]


def test_a_closed_generator_leaves_no_thread(train):
    batches = training(train)
    next(batches)
    assert threads_of_grain()
    batches.close()
    assert gone(threads_of_grain)


def test_worker_processes_give_the_same_and_end(train):
    expected = list(training(train, epochs=2, first_step=1))
    batches = training(train, epochs=2, first_step=1, workers=2)
    assert_same([next(batches) for _ in range(3)], expected[:3])
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    assert_same(batches, expected[3:])
    assert gone(multiprocessing.active_children)


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="looks for shared memory in /dev/shm")
def test_workers_leave_no_shared_memory(train):
    before = set(os.listdir("/dev/shm"))

    def left():
        return [name for name in set(os.listdir("/dev/shm")) - before if name.startswith("psm_")]

    batches = training(train, epochs=1000, workers=1)
    next(batches)
    assert left()
    batches.close()
    assert gone(left)


def test_worker_that_is_killed(train):
    batches = training(train, epochs=1000, workers=1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    message = refusal(lambda: list(batches))
    assert "-9" in message
    assert "workers" in message


SCRIPT = """
import json, multiprocessing, sys
from cpnas_jax.data import stream
from cpnas_jax.runtime.interruptions import handled, noted, stop_wished

def main():
    opened = stream.open_stream("photos", "train", sys.argv[1], 24)
    batches = opened.training_batches(seed=0, epoch=0, first_step=0, batch_size=12,
                                      process_index=0, process_count=1, epochs=100000, workers=1)
    next(batches)
    with handled(), noted():
        print(json.dumps([child.pid for child in multiprocessing.active_children()]), flush=True)
        for _ in batches:
            if stop_wished():
                break
        batches.close()
        sys.exit("interrupted")

if __name__ == "__main__":
    main()
"""


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in /proc")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(root, tmp_path, end):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    parent = subprocess.Popen(
        [sys.executable, script, root],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    try:
        workers = json.loads(parent.stdout.readline())
        assert len(workers) == 1
        assert all(map(alive, workers))
        if end == signal.SIGINT:  # a terminal sends it to all processes
            os.killpg(parent.pid, end)
        else:
            parent.send_signal(end)
        _, errors = parent.communicate(timeout=60)
        assert gone(lambda: any(map(alive, workers)))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.communicate()
    if end == signal.SIGINT:
        lines = errors.splitlines()
        assert lines[0].startswith("Ctrl-C: ")
        # Python's tracker may add that it cleans up what a worker was handing over.
        assert lines[1] == "interrupted"
        assert "Traceback" not in errors
