"""Several processes of one run: started together, in agreement, with all files in one hand.

Every process computes on its own devices; the first alone reads what a run left behind and writes
its files. What it found, and what went wrong, all of them learn, so that all decide alike.
"""

import glob
import hashlib
import importlib.util
import os
import pickle
import re
import secrets
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from cpnas_jax.runtime import stall
from cpnas_jax.runtime.errors import UserError

T = TypeVar("T")

RESUME_STATUS = 75
"""Exit status of a run that was stopped and goes on by the same command (EX_TEMPFAIL)."""

DETECTION = ("auto", "on", "off")
"""`auto`: JAX finds the other processes on a TPU; `on`: wherever it can, such as under Slurm or
Open MPI; `off`: this process is alone."""

_LONGEST_PIECE = 2**26
"""Bytes that are told at once."""

_started = False
_first_calls = False
"""Whether the first process is inside a function that it calls for all."""


def start(
    coordinator: str | None, num_processes: int | None, process_id: int | None, detection: str
) -> None:
    """Join the other processes of the run, if there are any; before JAX is asked anything.

    Args:
        coordinator: host:port where the first process listens, or None.
        num_processes: of the run, or None.
        process_id: of this process, from 0, or None.
        detection: one of `DETECTION`, for a run without the three above.

    Raises:
        UserError: the numbers do not fit each other, or the others are not found.
    """
    global _started
    given = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if detection == "off" or (detection == "auto" and not _on_tpu()):
            return
        arguments: dict[str, Any] = {}
    elif missing:
        raise UserError(f"{missing[0]} is missing; {', '.join(given)} are given together")
    else:
        assert coordinator is not None
        assert num_processes is not None
        assert process_id is not None
        if not re.fullmatch(r"[^\s:]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}", coordinator):
            raise UserError(f"--coordinator is {coordinator!r}; it must be HOST:PORT")
        if num_processes < 1:
            raise UserError(f"--num_processes is {num_processes}; it must be at least 1")
        if not 0 <= process_id < num_processes:
            raise UserError(
                f"--process_id is {process_id}; with --num_processes={num_processes} it must be "
                f"0 to {num_processes - 1}"
            )
        arguments = {
            "coordinator_address": coordinator,
            "num_processes": num_processes,
            "process_id": process_id,
        }
    try:
        jax.distributed.initialize(**arguments)
    # What is missing shows as a ValueError, who cannot be reached as errors of the layers below.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the processes of this run do not find each other ({reason}); see --coordinator, "
            "--num_processes, --process_id and --distributed"
        ) from error
    _started = True
    # The collectives that follow wait for 30 seconds when they are used for the first time.
    meet("the start")


def _on_tpu() -> bool:
    """Tell whether this machine has TPU chips and the library for them."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    if asked and "tpu" not in asked.split(","):
        return False
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def several() -> bool:
    """Tell whether other processes belong to this run."""
    return _started and jax.process_count() > 1


def is_first() -> bool:
    """Tell whether this process is the one that writes."""
    return not several() or jax.process_index() == 0


def name() -> str:
    """Return which process this is, for messages."""
    return f"process {jax.process_index()} of {jax.process_count()}"


def from_first(function: Callable[[], T]) -> T:
    """Call a function in the first process; return its result, or raise its error, in all.

    To be called by all processes at the same place. A result is told by pickle; alone, or inside
    such a function, a process just calls.
    """
    global _first_calls
    if not several() or _first_calls:
        return function()
    if is_first():
        _first_calls = True
        try:
            outcome: tuple[Any, Exception | None] = (function(), None)
        except Exception as error:
            outcome = (None, error)
        finally:
            _first_calls = False
        with stall.waiting("the other processes"):
            _tell(pickle.dumps(outcome))
        result, raised = outcome
    else:
        with stall.waiting("process 0"):
            result, raised = pickle.loads(_tell(b""))
    if raised is not None:
        raise _everywhere(raised)
    return result


def first_alone(function: Callable[[], object]) -> None:
    """Call a function in the first process; raise its error in all."""

    def without_result() -> None:
        function()

    from_first(without_result)


def first_before_others(function: Callable[[], T]) -> T:
    """Call a function in every process, in the others once it is done in the first.

    For what the first one prepares where the others find it. An error of any is raised in all.
    """
    if not several():
        return function()
    done: list[T] = []
    first_alone(lambda: done.append(function()))
    return together(lambda: done[0] if done else function())


def together(function: Callable[[], T]) -> T:
    """Call a function in every process; where it fails in one, raise that error in all."""
    result: list[T] = []
    failed: Exception | None = None
    try:
        result.append(function())
    except Exception as error:
        if not several():
            raise
        failed = error
    share_error(failed)
    return result[0]


def share_error(error: Exception | None) -> None:
    """Raise the error of the first process that has one in all; to be called by all.

    Where some have none, the message says which one it is from.
    """
    if not several():
        if error is not None:
            raise error
        return
    failed = _gathered("whether all could go on", np.asarray(error is not None))
    if not failed.any():
        return
    source = int(np.argmax(failed))
    if jax.process_index() == source and isinstance(error, UserError) and not failed.all():
        error = UserError(f"{name()}: {error}")
    raise _everywhere(pickle.loads(_tell(pickle.dumps(error), source)))


def _tell(data: bytes, source: int = 0) -> bytes:
    """Return the bytes of a process, of the first usually, in all."""
    is_source = jax.process_index() == source
    length = int(
        multihost_utils.broadcast_one_to_all(np.asarray(len(data), np.int32), is_source=is_source)
    )
    # Few lengths, because the broadcast is compiled for each.
    piece = min(_LONGEST_PIECE, max(1024, 1 << max(0, length - 1).bit_length()))
    told = bytearray()
    for offset in range(0, max(length, 1), piece):
        part = np.zeros(piece, np.uint8)
        own = np.frombuffer(data[offset : offset + piece], np.uint8)
        part[: len(own)] = own
        told += np.asarray(
            multihost_utils.broadcast_one_to_all(part, is_source=is_source)
        ).tobytes()
    return bytes(told[:length])


def meet(place: str) -> None:
    """Wait until all processes have come to a place; without their devices, and for an hour.

    For where some may be much later than others, such as after compiling: a collective between
    CPUs that is used for the first time waits for 30 seconds only.
    """
    if several():
        with stall.waiting(f"the other processes at {place!r}"):
            multihost.sync_global_processes(place, timeout=3600)


def require_agreement(when: str, **values: Any) -> None:
    """See that values are the same in all processes.

    Args:
        when: for the message, such as `sampled epoch 3`.
        **values: what pickles the same when it is the same, or trees of arrays.

    Raises:
        UserError: they are not; the first name that differs, and in which processes.
    """
    if not several():
        return
    digests = np.stack([_digest(value) for value in values.values()])
    gathered = _gathered(f"what they have at {when}", digests)
    for number, name in enumerate(values):
        others = [
            str(process)
            for process in range(len(gathered))
            if not np.array_equal(gathered[process, number], gathered[0, number])
        ]
        if others:
            raise _everywhere(
                UserError(
                    f"the processes disagree at {when}: {name} is another in process "
                    f"{', '.join(others)} than in process 0. All must run the same command, "
                    "versions and data; the last checkpoint is kept"
                )
            )


def any_process(flag: bool) -> bool:
    """Tell whether a flag is set in any process; to be called by all."""
    if not several():
        return flag
    return bool(_gathered("whether they go on", np.asarray(flag)).any())


def _gathered(what: str, own: np.ndarray) -> np.ndarray:
    """Return arrays of one shape from all processes, stacked."""
    with stall.waiting(f"the other processes to say {what}"):
        return np.asarray(multihost_utils.process_allgather(own))


def union(numbers: Iterable[int], what: str) -> set[int]:
    """Return the numbers, from 0 to 2**31 - 1, that any process gives; to be called by all.

    Args:
        numbers: of this process.
        what: they are, for who waits for them.
    """
    own = set(numbers)
    if not several():
        return own
    longest = int(np.max(_gathered(what, np.asarray(len(own), np.int32))))
    if not longest:
        return own
    padded = np.full(longest, -1, np.int32)
    padded[: len(own)] = sorted(own)
    return set(np.unique(_gathered(what, padded)).tolist()) - {-1}


def _digest(value: Any) -> np.ndarray:
    leaves, structure = jax.tree.flatten(value)
    sha = hashlib.sha256(str(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, np.ndarray | jax.Array):
            array = np.ascontiguousarray(np.asarray(leaf))
            sha.update(f"{array.dtype} {array.shape};".encode() + array.tobytes())
        else:
            sha.update(f"{leaf!r};".encode())
    return np.frombuffer(sha.digest(), np.uint8)


def require_shared(directory: epath.Path) -> None:
    """See that what the first process writes into a directory is there for all of them.

    The first process of a resumed run may be on another machine.

    Raises:
        UserError: a process does not see it.
    """
    if not several():
        return

    def leave_token() -> str:
        token = f".shared.{secrets.token_hex(8)}"
        (directory / token).write_text(token)
        return token

    token = from_first(leave_token)
    try:
        sees = (directory / token).exists()
    except OSError:
        sees = False
    seen = _gathered("whether they see the workdir", np.asarray(sees))
    first_alone((directory / token).unlink)
    if not seen.all():
        blind = ", ".join(str(process) for process in np.flatnonzero(~seen))
        raise _everywhere(
            UserError(
                f"--workdir={directory} is not shared: process {blind} does not see what process "
                "0 writes there; give a directory that all processes share, such as "
                "gs://BUCKET/NAME"
            )
        )


def _everywhere(error: Exception) -> Exception:
    """Mark an error that all processes raise."""
    error.in_all_processes = True  # type: ignore[attr-defined]
    return error


def is_everywhere(error: BaseException) -> bool:
    """Tell whether all processes raise this error: then one of them says it, and none waits."""
    return not several() or getattr(error, "in_all_processes", False)
