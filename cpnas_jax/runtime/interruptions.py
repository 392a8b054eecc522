"""Ctrl-C and SIGTERM: a run saves and stops, and none of them is lost.

While a run takes steps, the first signal is noted and the run saves after the step it is in; a
second one stops at once. At any other time there is nothing to save, and the first one stops.
SIGTERM is how a platform announces that it takes a machine away.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from cpnas_jax.runtime.processes import RESUME_STATUS, any_process, several

_DELAY = 0.1
"""Seconds until a lost interruption is repeated; by then Python is out of the callback."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A run was asked to stop and has saved, in all processes; the same command resumes it."""

    in_all_processes = True


class _Wish:
    """Whether signals are only noted now, and which one was."""

    noted: str | None = None
    noting: bool = False


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM interrupt wherever they fall.

    Python drops what is raised in a destructor or in the callback of a weak reference, of which JAX
    has many: a run would go on as if nothing had been pressed. To be called after the processes of
    a run have joined: JAX takes SIGTERM for itself then.
    """
    before = {number: signal.signal(number, _handle) for number in SIGNALS}
    usual = sys.unraisablehook

    def hook(raised: "sys.UnraisableHookArgs") -> None:
        if not isinstance(raised.exc_value, KeyboardInterrupt):
            usual(raised)
            return
        # Raised from here it would be dropped again.
        again = threading.Timer(_DELAY, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = usual
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(number: int, frame: FrameType | None) -> None:
    del frame
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    if not _Wish.noting:
        # A process that left the others alone would keep them waiting.
        if several():
            _leave(name)
        raise KeyboardInterrupt(name)
    if _Wish.noted is not None:
        _leave(name)
    _Wish.noted = name
    _write(f"{name}: saving after the step that is under way; once more stops at once\n")


def _leave(name: str) -> None:
    _write(f"error: stopped at once by {name}; the same command resumes from the last checkpoint\n")
    os._exit(RESUME_STATUS)


def _write(text: str) -> None:
    # Python's own streams may be in the middle of a write of the code that was interrupted.
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Only note the first signal; whoever takes steps asks `stop_wished` before each call.

    Raises:
        Stopped: at the end, where a signal was noted in any process after the last step.
    """
    _Wish.noting, _Wish.noted = True, None
    try:
        yield
        if any_process(stop_wished()):
            raise Stopped("after the last step of this phase")
    finally:
        _Wish.noting = False


def stop_wished() -> bool:
    """Tell whether a signal was noted in this process."""
    return _Wish.noted is not None
