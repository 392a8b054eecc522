"""Checkpoints of everything that decides a result, verified when they are read.

Orbax stores the arrays; beside them lie a JSON record and a SHA-256 digest of the arrays. Without
the digest a flipped byte restores silently as other numbers.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from cpnas_jax.runtime import processes, stall
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.packing import digest, packed, shapes, unpacked

_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read and verified.

    Attributes:
        step: its number.
        state: the tree that was saved, leaves as numpy arrays.
        record: the JSON object saved with it.
    """

    step: int
    state: Any
    record: dict[str, Any]


def silence_orphans() -> None:
    """Keep a failed save or restore to the one error that is raised.

    When one write of a save fails, orbax closes its event loop under all the others; each of them
    then prints a traceback of its own, hundreds in all, and orbax logs what it also raises. Failed
    reads leave tasks behind, of which asyncio logs that nobody asked for their errors.
    """
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    usual, usual_unraisable = sys.excepthook, sys.unraisablehook

    def is_orphan(value: BaseException | None) -> bool:
        return isinstance(value, RuntimeError) and str(value) == "Event loop is closed"

    def hook(
        kind: type[BaseException], value: BaseException, traceback: TracebackType | None
    ) -> None:
        if not is_orphan(value):
            usual(kind, value, traceback)

    def unraisable(raised: "sys.UnraisableHookArgs") -> None:
        if not is_orphan(raised.exc_value):
            usual_unraisable(raised)

    sys.excepthook, sys.unraisablehook = hook, unraisable


def _record_digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _reason(error: Exception) -> str:
    """Return what an error says in part of a line."""
    return " ".join(str(error).split())[:200]


def holds_checkpoints(directory: epath.Path) -> bool:
    """Tell whether a directory is there and a checkpoint, damaged or not, is in it."""

    def holds() -> bool:
        return directory.exists() and any(child.name.isdigit() for child in directory.iterdir())

    return processes.from_first(holds)


class Checkpoints:
    """Numbered checkpoints in a directory; the newest `keep` are kept.

    Of several processes the first alone reads and writes, and tells the others what it found or
    what failed; all of them call the same methods.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int) -> None:
        """Open or make the directory.

        Raises:
            UserError: it cannot be written.
        """
        self._directory = epath.Path(directory).absolute()
        self._manager: Any = None
        processes.first_alone(lambda: self._open(keep))

    def _open(self, keep: int) -> None:
        # The first process would otherwise wait in orbax for the others.
        alone = ocp.options.MultiprocessingOptions(
            active_processes={0} if processes.several() else None,
            barrier_sync_key_prefix=f"{self._directory.parent.name}-{self._directory.name}",
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=False, multiprocessing_options=alone
        )
        try:
            # Orbax would only notice while it saves, and hang.
            self._directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        except OSError as error:
            raise UserError(
                f"checkpoints cannot be written to {self._directory}: {error}"
            ) from error

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Save in the background; an earlier save is finished first.

        Args:
            step: number, above all earlier ones.
            state: tree of arrays.
            record: JSON object.

        Raises:
            UserError: this save or the one before cannot be written.
        """
        with stall.waiting(f"checkpoint {step} to be saved in {self._directory}"):
            processes.first_alone(lambda: self._save(step, state, record))

    def _save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        host = jax.tree.map(np.asarray, state)
        checks = {
            "step": step,
            "digest": digest(host),
            "shapes": shapes(host),
            "record_digest": _record_digest(record),
        }
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(packed(jax.tree.leaves(host))),
            record=ocp.args.JsonSave({**checks, "record": record}),
        )
        with self._writing():
            saved = self._manager.save(step, args=arguments)
        if not saved:
            raise ValueError(f"step {step} is not above the newest checkpoint")

    def restore_newest(self, like: Any, config_hash: str | None = None) -> Restored | None:
        """Read the newest checkpoint that is whole; None where there is none at all.

        A damaged one is passed over with a warning that names it, and put aside under another
        name once an older one has been read: its number is needed again.

        Args:
            like: tree of arrays with the structure, shapes and dtypes of what was saved.
            config_hash: what the records must hold under this name, if given.

        Raises:
            UserError: there are checkpoints, but they are of another config, or none of them can
                be used.
            OSError: a damaged one cannot be put aside.
        """
        return self._told(like, lambda: self._newest_whole(like, config_hash))

    def restore_only_newest(
        self, like: Any, config_hash: str | None, remedy: str
    ) -> Restored | None:
        """Read the newest checkpoint and no other in its place; None where there is none.

        Args:
            like: see `restore_newest`.
            config_hash: see `restore_newest`.
            remedy: what the user can do about a damaged one.

        Raises:
            UserError: it is damaged or of another config; nothing is put aside.
        """

        def newest() -> Restored | None:
            steps = self._steps()
            if not steps:
                return None
            try:
                return self._restore(steps[-1], like, config_hash)
            except UserError:
                raise
            except Exception as error:
                raise UserError(
                    f"the checkpoint {self._directory / str(steps[-1])} is damaged "
                    f"({_reason(error)}); {remedy}"
                ) from error

        return self._told(like, newest)

    def _told(self, like: Any, read: Callable[[], Restored | None]) -> Restored | None:
        """Return in all processes what the first one reads."""
        structure = jax.tree.structure(like)

        def told() -> tuple[int, list[np.ndarray], dict[str, Any]] | None:
            newest = read()
            if newest is None:
                return None
            return newest.step, jax.tree.leaves(newest.state), newest.record

        with stall.waiting(f"a checkpoint to be read from {self._directory}"):
            found = processes.from_first(told)
        if found is None:
            return None
        step, leaves, record = found
        return Restored(step, jax.tree.unflatten(structure, leaves), record)

    def _newest_whole(self, like: Any, config_hash: str | None) -> Restored | None:
        steps = self._steps()[::-1]
        reason, damaged = "", list[int]()
        for step in steps:
            try:
                restored = self._restore(step, like, config_hash)
            except UserError:
                raise
            # Damage shows in as many ways as there are layers below: any of them means the same.
            except Exception as error:
                reason = _reason(error)
                damaged.append(step)
                _LOGGER.warning(
                    "checkpoint %s is damaged and passed over: %s",
                    self._directory / str(step),
                    reason,
                )
            else:
                # What fails here is the directory's fault, not this checkpoint's.
                self._put_aside(damaged)
                return restored
        if steps:
            raise UserError(
                f"no checkpoint in {self._directory} can be read (last reason: {reason}); "
                "delete the directory to start again"
            )
        return None

    def steps(self) -> list[int]:
        """Return the numbers of what is there, ascending."""
        return processes.from_first(self._steps)

    def _steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def last_good(self, held: dict[int, str]) -> str:
        """Finish the save under way; name the newest checkpoint, for the error that ends a run.

        Args:
            held: number -> what that checkpoint holds, in words, as far as it is known.
        """
        # It is not this save's failure that the run ends with.
        with contextlib.suppress(UserError):
            self.wait()
        steps = self.steps()
        if not steps:
            return "no checkpoint was written yet"
        told = f"the last good checkpoint is {self._directory / str(steps[-1])}"
        return f"{told}, {held[steps[-1]]}" if steps[-1] in held else told

    def forget_above(self, step: int) -> None:
        """Delete every checkpoint with a number above `step`."""

        def forget() -> None:
            for number in self._steps():
                if number > step:
                    self._manager.delete(number)

        processes.first_alone(forget)

    def _put_aside(self, steps: list[int]) -> None:
        for step in steps:
            path = self._directory / str(step)
            path.rename(self._directory / f"damaged-{step}-{time.time_ns()}")
        if steps:
            self._manager.reload()

    def _record(self, step: int, config_hash: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the record and what the arrays must be; before them, whose shapes it explains."""
        found = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))
        record, checks = found["record"]["record"], found["record"]
        if _record_digest(record) != checks["record_digest"]:
            raise ValueError("its record does not have the digest that was saved")
        # A directory that was renamed or copied is whole but for its number.
        if checks.get("step") != step:
            raise ValueError(f"it was not saved under this number but {checks.get('step')}")
        if config_hash is not None and record["config_hash"] != config_hash:
            raise UserError(
                f"the checkpoints in {self._directory} are not of this config (config_hash "
                f"{record['config_hash']!r}, here {config_hash!r}); use its config or another "
                "--workdir"
            )
        return record, checks

    def _restore(self, step: int, like: Any, config_hash: str | None) -> Restored:
        record, checks = self._record(step, config_hash)
        leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, like))
        if checks.get("shapes") != shapes(leaves):
            raise ValueError(
                "its arrays have other dtypes or shapes than this run's; another version of "
                "cpnas_jax may have written it"
            )
        found = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(packed(leaves)))
        )
        state = jax.tree.unflatten(structure, unpacked(found["state"], leaves))
        if digest(state) != checks["digest"]:
            raise ValueError(f"its arrays do not have the digest {checks['digest']} that was saved")
        return Restored(step, state, record)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        # A full disk shows as an OSError or as an error of tensorstore, by what was being written.
        except Exception as error:
            # What failed and in which file comes last.
            reason = " ".join(str(error).split())[-200:]
            raise UserError(
                f"a checkpoint cannot be written to {self._directory} ({reason}); mend that or "
                "free space, then the same command resumes from the one before"
            ) from error

    def wait(self) -> None:
        """Finish the save under way.

        Raises:
            UserError: it cannot be written.
        """
        with stall.waiting(f"the last save in {self._directory}"):
            processes.first_alone(self._wait)

    def _wait(self) -> None:
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish the save under way; nothing can be saved afterwards.

        Raises:
            UserError: it cannot be written.
        """
        with stall.waiting(f"the last save in {self._directory}"):
            processes.first_alone(self._close)

    def _close(self) -> None:
        try:
            self._wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close; an error that is already under way is the one to be told."""
        if not kind:
            self.close()
        elif processes.is_first():
            # Without the others, which need not have this error.
            with contextlib.suppress(Exception):
                self._close()
