"""Figures for people as PNG and SVG files: the cells of a genotype, and what all figures share.

Only matplotlib's figure objects are used, never pyplot, so that nothing here needs a display.
"""

import contextlib
import io
import os
import pathlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import matplotlib
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

from cpnas_jax.architecture.genotype import Edge, Genotype
from cpnas_jax.models.space import (
    CELL_TYPES,
    NODE_NAMES,
    NUM_INPUTS,
    NUM_NODES,
    OPERATIONS,
    node_text,
)
from cpnas_jax.runtime.atomic import write_atomically

_TIMES = "\N{MULTIPLICATION SIGN}"

SHORT_NAMES = {
    "none": "none",
    "max_pool_3x3": f"max 3{_TIMES}3",
    "avg_pool_3x3": f"avg 3{_TIMES}3",
    "skip_connect": "skip",
    "sep_conv_3x3": f"sep 3{_TIMES}3",
    "sep_conv_5x5": f"sep 5{_TIMES}5",
    "dil_conv_3x3": f"dil 3{_TIMES}3",
    "dil_conv_5x5": f"dil 5{_TIMES}5",
}
"""Labels of the edges in a figure."""

"""Names of a cell's nodes, as the literature writes them."""

TITLES = {"normal": "Normal cell", "reduce": "Reduction cell"}
# Okabe and Ito's colours, which differ for colour-blind readers too.
KIND_COLOURS = {
    "convolution": "#0072B2",
    "pooling": "#D55E00",
    "skip": "#009E73",
    "none": "#9A9A9A",
}
INK, _PALE = "#333333", "#C4C4C4"
GRID = "#E6E6E6"
CHILD_COLOUR, PARENT_COLOUR = "#0072B2", "#E69F00"
_SVG_OPTIONS = {"svg.hashsalt": "cpnas_jax", "svg.fonttype": "none"}
# matplotlib takes the options above from global state only.
_LOCK = threading.Lock()

# Geometry of a cell, in inches. Nodes stand on one line; an edge is an arc whose top is over the
# middle of its ends, at a height that grows with its span. No two arcs of a side share both middle
# and span, so labels at or near the tops do not overlap.
_STEP = 1.72
_NODE_WIDTH, _NODE_HEIGHT = 0.92, 0.42
_LEVEL = 0.52
_FIRST_LEVEL = 0.28
_MARGIN = 0.3


def kind(operation: str) -> str:
    """Tell what an operation is: `convolution`, `pooling`, `skip` or `none`."""
    if "conv" in operation:
        return "convolution"
    return {"skip_connect": "skip", "none": "none"}.get(operation, "pooling")


def draw_cells(genotype: Genotype, directory: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Draw both cells of a genotype.

    In the SVG every edge is a group with the id `<cell>-<source>-<target>-<operation>`.

    Args:
        genotype: what to draw.
        directory: where `cells.png` and `cells.svg` are written.

    Returns:
        The two paths.
    """
    return save_figure(cells_figure(genotype), directory, "cells")


def cells_figure(genotype: Genotype) -> Figure:
    """Make the figure that `draw_cells` writes."""
    heights = [_extent(edges) for _, edges in genotype.cells()]
    width = _STEP * NUM_NODES + _NODE_WIDTH + 2 * _MARGIN
    title, legend = 0.42, 0.5
    total = sum(above + below + title for above, below in heights) + legend
    figure = Figure(figsize=(width, total), facecolor="white")
    top = total
    for (cell, edges), (above, below) in zip(genotype.cells(), heights, strict=True):
        top -= above + below + title
        axes = figure.add_axes((0, top / total, 1, (above + below + title) / total))
        axes.set_xlim(-_NODE_WIDTH / 2 - _MARGIN, width - _NODE_WIDTH / 2 - _MARGIN)
        axes.set_ylim(-below, above + title)
        axes.set_axis_off()
        axes.text(
            *(-_NODE_WIDTH / 2, above + title * 0.3),
            TITLES[cell],
            fontsize=14,
            fontweight="bold",
            color=INK,
        )
        axes.text(
            *(_STEP * NUM_NODES + _NODE_WIDTH / 2, above + title * 0.3),
            f"{len(edges)} edges",
            ha="right",
            fontsize=10,
            color="#777777",
        )
        _draw_cell(axes, cell, edges, below)
    present = {kind(edge.operation) for _, edges in genotype.cells() for edge in edges}
    handles = [
        Line2D([], [], color=colour, lw=2, ls=_line_style(name), label=name)
        for name, colour in KIND_COLOURS.items()
        if name in present
    ]
    handles.append(Line2D([], [], color=_PALE, lw=1.4, label="concatenation"))
    figure.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 0.06 / total),
        ncols=len(handles),
        frameon=False,
        fontsize=10,
        labelcolor=INK,
    )
    return figure


def plain_axes(axes: Axes, axis: Literal["x", "y", "both"] = "y") -> None:
    """Leave of the frame what carries the scales, and put a pale grid behind the data."""
    axes.grid(axis=axis, color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def cell_tables(genotype: Genotype) -> str:
    """List both cells and their operation counts as plain text for a terminal.

    Returns:
        Lines without a final line end.
    """
    lines = [f"edge policy: {genotype.edge_policy}"]
    for cell, edges in genotype.cells():
        lines += ["", f"{TITLES[cell].lower()}:"]
        for target in range(NUM_INPUTS, NUM_NODES):
            incoming = [edge for edge in edges if edge.target == target]
            parts = [f"{edge.operation}({node_text(edge.source)})" for edge in incoming]
            for start in range(0, len(parts), 3):
                head = f"  node {NODE_NAMES[target]} =" if start == 0 else " " * 10
                tail = " +" if start + 3 < len(parts) else ""
                lines.append(f"{head} {' + '.join(parts[start : start + 3])}{tail}")
    counts = genotype.operation_counts()
    lines += ["", f"{'operation':<14}{''.join(f'{cell:>8}' for cell in CELL_TYPES)}"]
    for operation in OPERATIONS:
        row = [counts[cell][operation] for cell in CELL_TYPES]
        if any(row):
            lines.append(f"{operation:<14}{''.join(f'{count:>8}' for count in row)}")
    return "\n".join(lines)


def _is_above(edge: Edge) -> bool:
    """Edges from a cell's inputs go over the line of nodes, inner ones under it."""
    return edge.source < NUM_INPUTS


def _height(edge: Edge) -> float:
    return _NODE_HEIGHT / 2 + _FIRST_LEVEL + _LEVEL * (edge.target - edge.source - 1)


def _extent(edges: tuple[Edge, ...]) -> tuple[float, float]:
    """Give the room a cell needs above and below its nodes."""
    above = [_height(edge) for edge in edges if _is_above(edge)]
    below = [_height(edge) for edge in edges if not _is_above(edge)]
    return max(above, default=0.4) + 0.3, max(below, default=0.3) + 0.55


def _line_style(name: str) -> Any:
    return (0, (3, 2)) if name == "none" else "-"


def _draw_cell(axes: Axes, cell: str, edges: tuple[Edge, ...], below: float) -> None:
    bus = -below + 0.22
    output = _STEP * NUM_NODES
    for node in range(NUM_INPUTS, NUM_NODES):
        # Not from the middle, where a single arrow would come in on top of it.
        drop = _STEP * node + _NODE_WIDTH * 0.42
        axes.plot([drop] * 2, [-_NODE_HEIGHT / 2, bus], color=_PALE, lw=1.4, zorder=1)
    left = _STEP * NUM_INPUTS + _NODE_WIDTH * 0.42
    axes.plot([left, output], [bus, bus], color=_PALE, lw=1.4, zorder=1)
    arrow = Path([(output, bus), (output, -_NODE_HEIGHT / 2)])
    _add_arrow(axes, arrow, _PALE, "-", zorder=1)
    # Long arcs first, so that the labels of the short ones are never crossed by them.
    for edge in sorted(edges, key=lambda edge: edge.source - edge.target):
        _draw_edge(axes, cell, edge, edges)
    for node, name in enumerate((*NODE_NAMES, "output")):
        _draw_node(axes, _STEP * node, name, is_inner=NUM_INPUTS <= node < NUM_NODES)


def _port(edge: Edge, edges: tuple[Edge, ...], node: int) -> float:
    """Give the x at which an edge meets a node: arcs of a node are nested, they do not cross."""
    meeting = [
        other
        for other in edges
        if node in (other.source, other.target) and _is_above(other) == _is_above(edge)
    ]

    def order(other: Edge) -> tuple[bool, int]:
        # From the left: arriving arcs, the shortest first; then leaving ones, the longest first.
        leaves = other.source == node
        span = other.target - other.source
        return leaves, -span if leaves else span

    meeting.sort(key=order)
    width = _NODE_WIDTH * 0.72
    gap = min(0.17, width / max(len(meeting) - 1, 1))
    return _STEP * node + (meeting.index(edge) - (len(meeting) - 1) / 2) * gap


def _draw_edge(axes: Axes, cell: str, edge: Edge, edges: tuple[Edge, ...]) -> None:
    side = 1 if _is_above(edge) else -1
    start, end = _port(edge, edges, edge.source), _port(edge, edges, edge.target)
    foot, top = side * _NODE_HEIGHT / 2, side * _height(edge)
    # The curve's top is at 3/4 of the way to its control points.
    control = foot + (top - foot) * 4 / 3
    path = Path(
        [(start, foot), (start, control), (end, control), (end, foot)],
        [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4],
    )
    # Labels of edges from c_{k-2} stand before the top, clear of the arcs that rise from c_{k-1}.
    t = 0.37 if edge.source == 0 else 0.5
    label = (start + (end - start) * t**2 * (3 - 2 * t), foot + (top - foot) * 4 * t * (1 - t))
    name = kind(edge.operation)
    patch = _add_arrow(axes, path, KIND_COLOURS[name], _line_style(name), zorder=2)
    patch.set_gid(f"{cell}-{edge.source}-{edge.target}-{edge.operation}")
    axes.text(
        *label,
        SHORT_NAMES[edge.operation],
        ha="center",
        va="center",
        fontsize=9.5,
        color=KIND_COLOURS[name] if name != "none" else "#6E6E6E",
        bbox={"boxstyle": "round,pad=0.16", "fc": "white", "ec": "none"},
        zorder=4,
    )


def _add_arrow(axes: Axes, path: Path, colour: str, style: Any, zorder: int) -> FancyArrowPatch:
    patch = FancyArrowPatch(
        path=path,
        arrowstyle="-|>,head_length=5,head_width=2.4",
        color=colour,
        lw=1.6 if zorder > 1 else 1.4,
        ls=style,
        shrinkA=0,
        shrinkB=0,
        zorder=zorder,
    )
    axes.add_patch(patch)
    return patch


def _draw_node(axes: Axes, x: float, name: str, *, is_inner: bool) -> None:
    width, height = _NODE_WIDTH, _NODE_HEIGHT
    box = FancyBboxPatch(
        (x - width / 2, -height / 2),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.1",
        fc="#EAF2F8" if is_inner else "#F3F3F3",
        ec=INK,
        lw=1.1,
        zorder=3,
    )
    axes.add_patch(box)
    text = f"${name}$" if "_" in name else name
    axes.text(x, 0, text, ha="center", va="center", fontsize=12, color=INK, zorder=5)


@contextlib.contextmanager
def _svg_options() -> Iterator[None]:
    with _LOCK, matplotlib.rc_context(_SVG_OPTIONS):  # type: ignore[arg-type]
        yield


def save_figure(
    figure: Figure,
    directory: str | os.PathLike[str],
    name: str,
    extensions: Sequence[str] = ("png", "svg"),
) -> list[pathlib.Path]:
    """Write a figure as PNG and SVG; the bytes of the SVG depend on the figure only."""
    paths = []
    for extension in extensions:
        path = epath.Path(directory) / f"{name}.{extension}"
        write_atomically(path, figure_bytes(figure, extension))
        paths.append(path)
    return paths


def figure_bytes(figure: Figure, extension: str) -> bytes:
    """Return the content of a figure's file."""
    options: dict[str, Any] = {"metadata": {"Date": None}} if extension == "svg" else {"dpi": 160}
    buffer = io.BytesIO()
    with _svg_options():
        figure.savefig(buffer, format=extension, **options)
    return buffer.getvalue()
