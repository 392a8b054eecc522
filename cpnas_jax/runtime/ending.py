"""How a process ends: with which exit status, and with which line on stderr."""

import io
import os
import sys
import traceback
from collections.abc import Callable

from absl import flags

from cpnas_jax.runtime import interruptions, processes
from cpnas_jax.runtime.checkpoints import silence_orphans
from cpnas_jax.runtime.errors import UserError


def exit_status(function: Callable[[], object]) -> int:
    """Call what the process is for; return its exit status.

    0 is done, 1 a mistake, 2 usage, 75 stopped: the same command resumes. An error that not all
    processes of a run have ends this one at once: the others wait for it, and it cannot tell them.
    """
    _prepare()
    try:
        return _ended(function)
    except Exception as error:
        if processes.is_everywhere(error):
            raise
        traceback.print_exc()
        return _leave(1)


def _prepare() -> None:
    """Let mistakes be one line each: of orbax, of the terminal's encoding."""
    silence_orphans()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _ended(function: Callable[[], object]) -> int:
    try:
        function()
    except (UserError, flags.Error) as error:
        status = 1 if isinstance(error, UserError) else 2
        return _say(f"error: {' '.join(str(error).split())}", error, status)
    except interruptions.Stopped as stopped:
        text = f"stopped {stopped}, and saved; the same command resumes"
        return _say(text, stopped, processes.RESUME_STATUS)
    except KeyboardInterrupt as interrupt:
        text = f"stopped by {interrupt or 'Ctrl-C'}; the same command resumes"
        return _say(text, interrupt, processes.RESUME_STATUS)
    except OSError as error:
        shown = " ".join(str(error).split())
        if isinstance(error, BrokenPipeError):
            # Python would complain at its end that what is left cannot be written.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _say(f"error: {shown}; mend that, then the same command resumes", error, 1)
    return 0


def _say(text: str, error: BaseException, status: int) -> int:
    if processes.is_everywhere(error):
        if processes.is_first():
            print(text, file=sys.stderr)
        return status
    print(f"{processes.name()}: {text}", file=sys.stderr)
    return _leave(status)


def _leave(status: int) -> int:
    """End without waiting for the other processes, as JAX does at the usual end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
