"""What a run waits for, told on stderr where nothing has been finished for long.

Whoever waits says for what by `waiting`, whoever takes steps says where it is by `at`; a thread
looks on. It never ends a run: what is slow may be the machine, and a process that is stuck is the
user's or the launcher's to end.
"""

import contextlib
import dataclasses
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from cpnas_jax.runtime.console import duration

Clock = Callable[[], float]
Write = Callable[[str], None]


@dataclasses.dataclass
class _Now:
    """What the main thread is doing; other threads only read it.

    Attributes:
        where: phase and step.
        waits: what is waited for, the outermost first, each with the time of its beginning.
        moved: when something was finished for the last time.
        clock: in seconds.
    """

    where: str = "starting"
    waits: list[tuple[str, float]] = dataclasses.field(default_factory=list)
    moved: float = 0.0
    clock: Clock = time.monotonic

    def move(self) -> None:
        self.moved = self.clock()


_now = _Now()


def at(where: str) -> None:
    """Say which step of which phase begins; what was before it is finished."""
    _now.where = where
    _now.move()


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what is waited for until the block ends; may be nested, as 'a checkpoint: process 0'."""
    _now.waits.append((what, _now.clock()))
    try:
        yield
    finally:
        _now.waits.pop()
        _now.move()


class Watch:
    """Tells a stall once it has lasted `seconds`, and again after 2, 4, 8, ... times as long."""

    def __init__(self, seconds: float, name: str, write: Write, main: int | None = None) -> None:
        """Begin with the first interval.

        Args:
            seconds: above 0.
            name: of this process.
            write: takes a line.
            main: identifier of the thread that is looked at; None: the one that calls.
        """
        self._seconds, self._name, self._write = seconds, name, write
        self._main = main or threading.get_ident()
        self._told, self._moved = 0, _now.moved

    def look(self) -> float:
        """Tell a stall that is due; return the seconds until the next look."""
        moved = _now.moved
        if moved != self._moved:
            self._moved, self._told = moved, 0
        idle = _now.clock() - moved
        due = self._seconds * 2**self._told
        if idle < due:
            return due - idle
        self._told += 1
        self._write(self._text(idle))
        return self._seconds * 2**self._told - idle

    def _text(self, idle: float) -> str:
        waits = list(_now.waits)
        if waits:
            names = ": ".join(what for what, _ in waits)
            waited = duration(_now.clock() - waits[-1][1])
            reason = f"it has waited {waited} for {names}"
        else:
            reason = f"it waits for nothing that is known, and is {self._place()}"
        return (
            f"stalled: {self._name} on {socket.gethostname()} (pid {os.getpid()}), {_now.where}: "
            f"nothing was finished for {duration(idle)}; {reason}. The run goes on; see "
            "config.runtime.stall_seconds\n"
        )

    def _place(self) -> str:
        frame: FrameType | None = sys._current_frames().get(self._main)
        if frame is None:
            return "nowhere"
        code = frame.f_code
        return f"in {code.co_name} ({os.path.basename(code.co_filename)}, line {frame.f_lineno})"


def _to_stderr(text: str) -> None:
    # Python's own stream may be held by the thread that is stuck.
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


@contextlib.contextmanager
def watched(seconds: float, name: str) -> Iterator[None]:
    """Look on until the block ends.

    Args:
        seconds: without anything finished, until it is told; 0 tells nothing.
        name: of this process.
    """
    if not seconds:
        yield
        return
    at("starting")
    over, watch = threading.Event(), Watch(seconds, name, _to_stderr)

    def look_on() -> None:
        while not over.wait(watch.look()):
            pass

    thread = threading.Thread(target=look_on, name="stall watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
