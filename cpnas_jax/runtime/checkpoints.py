"""Checkpoints of everything that decides a result, verified when they are read.

Orbax stores the arrays; beside them lie a JSON record and a SHA-256 digest of the arrays. Without
the digest a flipped byte restores silently as other numbers.
"""

import dataclasses
import hashlib
import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from cpnas_jax.runtime.errors import UserError


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


def digest(state: Any) -> str:
    """Return the SHA-256 of a tree's structure, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape};".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


class Checkpoints:
    """Numbered checkpoints in a directory; the newest `keep` are kept."""

    def __init__(self, directory: str | os.PathLike[str], keep: int) -> None:
        """Open or make the directory.

        Raises:
            UserError: it cannot be written.
        """
        self._directory = epath.Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        try:
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
        """
        host = jax.tree.map(np.asarray, state)
        # Leaves by position: optimizer states are tuples of types that a file need not know.
        leaves = {f"leaf{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(host))}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(leaves),
                record=ocp.args.JsonSave({"digest": digest(host), "record": record}),
            ),
        )

    def restore_newest(self, like: Any) -> Restored | None:
        """Read the newest checkpoint that is whole; None where there is none at all.

        A damaged one is passed over with a warning that names it.

        Args:
            like: tree of arrays with the structure, shapes and dtypes of what was saved.

        Raises:
            UserError: there are checkpoints, but none of them can be used.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        reason = ""
        for step in steps:
            try:
                return self._restore(step, like)
            # Damage shows in as many ways as there are layers below: any of them means the same.
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                logging.warning(
                    "checkpoint %s is damaged and passed over: %s",
                    self._directory / str(step),
                    reason,
                )
        if steps:
            raise UserError(
                f"no checkpoint in {self._directory} can be read (last reason: {reason}); "
                "delete the directory to start again"
            )
        return None

    def _restore(self, step: int, like: Any) -> Restored:
        leaves, structure = jax.tree.flatten(like)
        template = {
            f"leaf{i:05d}": np.zeros(np.shape(leaf), np.asarray(leaf).dtype)
            for i, leaf in enumerate(leaves)
        }
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(template), record=ocp.args.JsonRestore()
            ),
        )
        state = jax.tree.unflatten(structure, [np.asarray(found["state"][k]) for k in template])
        expected = found["record"]["digest"]
        if digest(state) != expected:
            raise ValueError(f"its arrays do not have the digest {expected} that was saved")
        # Orbax takes the stored shapes, whatever the template says.
        for name, leaf in zip(template, jax.tree.leaves(state), strict=True):
            if leaf.shape != template[name].shape:
                raise ValueError(
                    f"an array has the shape {leaf.shape}, not {template[name].shape}; "
                    "another version of cpnas_jax may have written it"
                )
        return Restored(step, state, found["record"]["record"])

    def close(self) -> None:
        """Finish the save under way."""
        self._manager.wait_until_finished()
        self._manager.close()
