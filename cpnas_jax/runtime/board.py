"""Scalars and images for TensorBoard, written by the first process alone."""

import importlib.util
import math
import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from cpnas_jax.runtime import processes
from cpnas_jax.runtime.errors import UserError, writing


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("tensorboardX") is not None
    except ValueError:
        # Hidden by an entry None in sys.modules.
        return False


def require_package() -> None:
    """See that TensorBoard's files can be written.

    Raises:
        UserError: the package for it is missing.
    """
    if not _is_installed():
        raise UserError(
            "config.runtime.tensorboard is True, and the package tensorboardX is missing; "
            'pip install -e ".[tensorboard]", or set it to False'
        )


def board_directory(workdir: epath.Path, phase: str) -> epath.Path:
    """Return where in a workdir the event files of a phase are."""
    return workdir / "tb" / phase


class Board:
    """A directory of event files; one that is not wanted, or of a later process, takes all in."""

    def __init__(self, path: str | os.PathLike[str], first_step: int, *, wanted: bool) -> None:
        """Begin an event file beside those of the run before it was interrupted.

        Args:
            path: directory, made if needed.
            first_step: that is written here. What the interrupted run has from there on is hidden,
                so that no step is shown twice.
            wanted: `runtime.tensorboard`.

        Raises:
            UserError: the package is missing, or the directory cannot be written.
        """
        self._writer: Any = None
        if not wanted or not processes.is_first():
            return
        require_package()
        # Not before it is wanted: an extra.
        from tensorboardX import SummaryWriter

        with writing(path):
            # Files are named after the second, and one of the same second would be overwritten.
            self._writer = SummaryWriter(
                os.fspath(path), purge_step=first_step, filename_suffix=f".{time.time_ns()}"
            )

    @property
    def is_open(self) -> bool:
        """Tell whether what it is given is written."""
        return self._writer is not None

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the finite numbers among some values, those of inner mappings as `outer/inner`."""
        if self._writer is None:
            return
        for name, value in values.items():
            if isinstance(value, Mapping):
                self.scalars(step, {f"{name}/{inner}": own for inner, own in value.items()})
            elif isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def image(self, name: str, step: int, pixels: np.ndarray) -> None:
        """Write an image, uint8[height, width, 3]."""
        if self._writer is not None:
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        """Bring to the disk what was given so far."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """End the event file."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None
