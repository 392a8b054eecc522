"""What TensorBoard shows of a search: numbers of its log, heat maps of what it compares, cells."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure
from PIL import Image

from cpnas_jax.architecture.film import film
from cpnas_jax.architecture.genotype import Genotype
from cpnas_jax.architecture.parsing import parse_events
from cpnas_jax.figures import cells_figure, figure_bytes
from cpnas_jax.runtime.board import Board, board_directory
from cpnas_jax.search_figures import film_figure

_PLACES = ("event", "round", "sample", "epoch", "candidate")
"""Keys of a line that say where it belongs, and are no measurements."""


def pixels(figure: Figure) -> np.ndarray:
    """Draw a figure: uint8[height, width, 3]."""
    with Image.open(io.BytesIO(figure_bytes(figure, "png"))) as image:
        return np.asarray(image.convert("RGB"))


def tell_line(
    board: Board,
    step: int,
    lines: Sequence[Mapping[str, Any]],
    operations: Sequence[str],
    survivors: np.ndarray,
    **values: Any,
) -> None:
    """Write the numbers of a log's last line, and a heat map where it compares operations.

    Args:
        board: of the search.
        step: epochs done.
        lines: of the log so far.
        operations: that the search started with.
        survivors: bool[2, 14, 8], the operations left after the line.
        values: more that is known of the epoch.
    """
    if not board.is_open:
        return
    line = lines[-1]
    numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
    if line["event"] in ("sample", "epoch"):
        own = {key: value for key, value in numbers.items() if key not in _PLACES}
        board.scalars(step, {**own, "losses": line.get("losses", {}), **values})
        child, parent = line["child_accuracy"], line["parent_accuracy"]
        if child is not None and parent is not None:
            board.scalars(step, {"gap": parent - child})
    board.scalars(step, {"operations_left": int(survivors.sum())})
    if line["event"] in ("stage", "pruning", "epoch"):
        frame = film(parse_events(lines), operations)[-1]
        board.image("indicator", step, pixels(film_figure([frame])))
    board.flush()


def tell_cells(workdir: epath.Path, genotype: Genotype, step: int, *, wanted: bool) -> None:
    """Write the cells that a search ended with as an image.

    Args:
        workdir: of the search.
        genotype: what it ended with.
        step: epochs done.
        wanted: `runtime.tensorboard`.
    """
    with contextlib.closing(
        Board(board_directory(workdir, "search"), step + 1, wanted=wanted)
    ) as board:
        if board.is_open:
            # One more than the last line's step, so that nothing of the search is hidden.
            board.image("cells", step + 1, pixels(cells_figure(genotype)))
