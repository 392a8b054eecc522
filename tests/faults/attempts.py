"""A run in processes of its own that signals are sent to: where it is, and how it ends."""

import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Callable

from outcomes import LOGS

ROOT = pathlib.Path(__file__).parents[2]
PATIENCE = 600.0
"""Seconds without a word or a line of the log, after which a run is taken for one that hangs."""
LINGERING = 20.0
"""Seconds in which all processes of a run must follow the one that was started."""
MARK = "CPNAS_JAX_FAULTS"
"""Environment variable that all processes of a run have in common."""

COMPILED = re.compile(r"^Compiled in ", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Runs:
    """How runs are started and looked at.

    Attributes:
        mode: "search" or "train".
        command: of a run in a workdir.
        environment: of its processes.
        is_worker: tells by the command line of a process whether a signal may go to it.
    """

    mode: str
    command: Callable[[pathlib.Path], list[str]]
    environment: dict[str, str]
    is_worker: Callable[[str], bool]


class Attempt:
    """A started run: its processes, its output and its log."""

    def __init__(self, runs, workdir, output):
        self.runs, self.workdir, self.output = runs, workdir, output
        self.mark = uuid.uuid4().hex
        self.started = time.monotonic()
        self.lines_before = self.lines()
        self.saves_before = self.saves_under_way()
        with output.open("w") as file:
            self.process = subprocess.Popen(
                runs.command(workdir),
                cwd=ROOT,
                env={**runs.environment, MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def seconds(self):
        """Return how long it has been running."""
        return time.monotonic() - self.started

    def said(self):
        """Return its output so far."""
        return self.output.read_text(errors="replace")

    def lines(self):
        """Return how many lines its log has."""
        log = self.workdir / LOGS[self.runs.mode]
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def saves_under_way(self):
        """Return what a checkpoint leaves that is not yet, or never will be, whole."""
        found = self.workdir.glob("*/*/*.orbax-checkpoint-tmp*")
        pairs = set()
        for path in found:
            with contextlib.suppress(FileNotFoundError):
                pairs.add((path, path.stat().st_ino))
        return pairs

    def phase(self):
        """Tell what it is doing, after it was killed or just before a gentler signal."""
        said = self.said()
        if self.saves_under_way() - self.saves_before:
            return "saving"
        if not said:
            return "importing"
        if not COMPILED.search(said):
            return "reading, restoring, compiling"
        return "epochs" if self.lines() > self.lines_before else "first epoch"

    def wait_for(self, condition):
        """Wait until a condition holds or it has ended; return whether it still runs."""
        progress = deadline = None
        while self.process.poll() is None and not condition():
            before, progress = progress, (self.output.stat().st_size, self.lines())
            if progress != before:
                deadline = time.monotonic() + PATIENCE
            elif time.monotonic() > deadline:
                raise Failure(f"nothing happened in {PATIENCE:.0f} s", self)
            time.sleep(0.02)
        return self.process.poll() is None

    def processes(self):
        """Return pid -> command line of all that it has started and that is still there."""
        found = {}
        for path in pathlib.Path("/proc").glob("[0-9]*"):
            # Processes end while one looks, and those of other users are not to be read.
            with contextlib.suppress(OSError):
                if f"{MARK}={self.mark}".encode() in (path / "environ").read_bytes().split(b"\0"):
                    words = (path / "cmdline").read_bytes().split(b"\0")
                    found[int(path.name)] = b" ".join(words).decode(errors="replace")
        return found

    def send(self, number, target, rng):
        """Send a signal to one worker, to all or to the launcher."""
        is_worker = self.runs.is_worker
        workers = sorted(pid for pid, line in self.processes().items() if is_worker(line))
        if target == "launcher" or not workers:
            workers = [self.process.pid]
        for pid in workers if target == "all" else [rng.choice(workers)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self):
        """Wait for its end; return its status. Nothing of it may be left."""
        try:
            self.wait_for(lambda: False)
        except Failure:
            self.kill_all()
            raise
        status = self.process.wait()
        deadline = time.monotonic() + LINGERING
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        left = self.processes()
        if left:
            self.kill_all()
            raise Failure(f"processes are left: {left}", self)
        return status

    def kill_all(self):
        """End every process of it."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


class Failure(Exception):
    """A run did what it must not; with the end of what it said."""

    def __init__(self, text, attempt):
        super().__init__(f"{text}; its output ends with: {attempt.said()[-500:]!r}")
