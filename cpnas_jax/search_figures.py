"""Figures of a search: its accuracies, what it compared and dropped, and what was left when."""

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from cpnas_jax.architecture.events import EpochEvent, Event, SampleEvent
from cpnas_jax.architecture.film import Frame
from cpnas_jax.architecture.parsing import parse_events
from cpnas_jax.figures import (
    CHILD_COLOUR,
    INK,
    KIND_COLOURS,
    PARENT_COLOUR,
    SHORT_NAMES,
    TITLES,
    kind,
    plain_axes,
    save_figure,
)
from cpnas_jax.models.space import CELL_TYPES, EDGES, OPERATIONS
from cpnas_jax.runtime.errors import UserError


def draw_accuracies(
    history_lines: Iterable[Mapping[str, Any]], directory: str | os.PathLike[str]
) -> list[pathlib.Path]:
    """Draw A_C and A_P over the sampled epochs of a search, with the stages' boundaries.

    Args:
        history_lines: the lines of history.jsonl as objects, of a finished search or not.
        directory: where `accuracies.png` and `accuracies.svg` are written.

    Returns:
        The two paths.

    Raises:
        UserError: if a line is damaged or there is no sampled epoch.
    """
    return save_figure(accuracies_figure(parse_events(history_lines)), directory, "accuracies")


def accuracies_figure(events: Iterable[Event]) -> Figure:
    """Make the figure that `draw_accuracies` writes; where both models are trained, with their gap.

    Raises:
        UserError: there is no sampled epoch.
    """
    samples = [event for event in events if isinstance(event, SampleEvent | EpochEvent)]
    if not samples:
        raise UserError("history.jsonl has no sampled epoch; it must have at least one")
    gaps = [
        100 * (event.parent_accuracy - event.child_accuracy)
        for event in samples
        if event.parent_accuracy is not None and event.child_accuracy is not None
    ]
    rows = 2 if gaps else 1
    figure = Figure(figsize=(10, 2.6 + 1.6 * rows), facecolor="white")
    panels = figure.subplots(
        *(rows, 1),
        sharex=True,
        squeeze=False,
        height_ratios=[3, 1.5][:rows],
        # Fixed: a layout that is looked for takes several times as long as the drawing.
        gridspec_kw={"left": 0.06, "right": 0.985, "top": 0.87, "bottom": 0.12, "hspace": 0.12},
    ).ravel()
    axes, last = panels[0], panels[-1]
    epochs = range(1, len(samples) + 1)
    for values, colour, name in (
        ([event.parent_accuracy for event in samples], PARENT_COLOUR, "parent (float), $A_P$"),
        ([event.child_accuracy for event in samples], CHILD_COLOUR, "child (1-bit), $A_C$"),
    ):
        known = [100 * value for value in values if value is not None]
        if not known:
            continue
        marker = "o" if len(samples) <= 150 else ""
        axes.plot(epochs, known, color=colour, lw=1.6, marker=marker, ms=3, label=name)
    stages = [event.stage for event in samples if isinstance(event, SampleEvent)]
    if stages:
        _mark_stages(axes, stages)
    if gaps:
        last.bar(epochs, gaps, 0.6, color=PARENT_COLOUR)
        last.axhline(0, color=INK, lw=0.8)
        last.set_ylabel("$A_P - A_C$, points")
    last.set_xlim(0.5, len(samples) + 0.5)
    last.set_xlabel("sampled epoch" if isinstance(samples[0], SampleEvent) else "epoch")
    axes.set_ylabel("validation accuracy, %")
    for panel in panels:
        plain_axes(panel)
    figure.legend(loc="upper center", ncols=2, frameon=False)
    return figure


def _mark_stages(axes: Axes, stages: list[int]) -> None:
    """Draw a line between stages and name each by its K."""
    starts = [n for n, stage in enumerate(stages) if n == 0 or stages[n - 1] != stage]
    for start, end in zip(starts, [*starts[1:], len(stages)], strict=True):
        if start:
            axes.axvline(start + 0.5, color="#BBBBBB", lw=0.9, ls=(0, (4, 3)), zorder=0)
        axes.text(
            *((start + end + 1) / 2, 1.01),
            f"K = {stages[start]}",
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=9,
            color="#777777",
        )


_GAP = 1.5
"""Between two frames, in cells of the film."""


def film_figure(frames: Sequence[Frame]) -> Figure:
    """Draw frames side by side, the normal cell above the reduction cell.

    A row is an edge, a column an operation; the darker, the larger is the value among those of
    its edge. A cross is what the frame drops.

    Args:
        frames: at least one; each takes its place in the width.
    """
    edges, operations = len(EDGES), len(OPERATIONS)
    across, down = operations + _GAP, edges + 2 * _GAP
    width, height = across * len(frames) + 5, down * len(CELL_TYPES) + 7
    scale = 0.135
    figure = Figure(figsize=(scale * width, scale * height), facecolor="white")
    # One pair of axes for all: a pair for each would take most of a report's time.
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-5, width - 5), ylim=(height - 3, -3))
    axes.set_axis_off()
    text: dict[str, Any] = {"fontsize": 6.5, "color": INK}
    corners, colours, crosses = [], [], []
    for row, cell in enumerate(CELL_TYPES):
        top = row * down
        axes.text(-4.6, top + edges / 2, TITLES[cell], rotation=90, va="center", fontsize=8.5)
        for edge, (source, target) in enumerate(EDGES):
            label = f"{source}\N{RIGHTWARDS ARROW}{target}"
            axes.text(-0.4, top + edge + 0.5, label, ha="right", va="center", **text)
        for number, frame in enumerate(frames):
            left = number * across
            axes.text(left + operations / 2, top - 0.5, frame.name, ha="center", fontsize=8)
            shades = relative(frame.values, frame.present)[row]
            for edge, operation in np.argwhere(frame.present[row]):
                x, y = left + operation, top + edge
                corners.append([(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1)])
                colours.append(_tint(CHILD_COLOUR, 0.12 + 0.78 * shades[edge, operation]))
                if frame.dropped[row, edge, operation]:
                    crosses.append((x + 0.5, y + 0.5))
    axes.add_collection(PolyCollection(corners, facecolors=colours, edgecolors="white", lw=0.5))
    axes.plot(*np.reshape(crosses, (-1, 2)).T, "x", color=INK, ms=3.5, mew=1)
    bottom = len(CELL_TYPES) * down - 2 * _GAP + 0.3
    for number in range(len(frames)):
        for operation, name in enumerate(OPERATIONS):
            x = number * across + operation + 0.5
            axes.text(x, bottom, SHORT_NAMES[name], rotation=90, ha="center", va="top", **text)
    return figure


def relative(values: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Return f64[2, 14, 8], values from 0, an edge's smallest, to 1, its largest.

    Args:
        values: f64[2, 14, 8], NaN where there is none.
        present: bool[2, 14, 8]; a present operation without a value, or like all others of its
            edge, gets 0.5, the others 0.
    """
    known = present & np.isfinite(values)
    low = np.where(known, values, np.inf).min(axis=-1, keepdims=True)
    high = np.where(known, values, -np.inf).max(axis=-1, keepdims=True)
    spread = high > low
    scaled = (np.where(known, values, 0) - np.where(spread, low, 0)) / np.where(
        spread, high - low, 1
    )
    return np.where(known & spread, scaled, np.where(present, 0.5, 0.0))


def _tint(colour: str, share: float) -> tuple[float, ...]:
    """Mix a colour into white."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    return tuple(1 - share * (1 - part) for part in parts)


def operations_left_figure(frames: Sequence[Frame], epochs: int) -> Figure:
    """Draw which share of the operations left is of each kind, over the epochs of a search.

    Args:
        frames: of the whole film, at least one.
        epochs: sampled epochs so far.
    """
    figure = Figure(figsize=(10, 3.2), facecolor="white")
    axes = figure.add_axes((0.06, 0.16, 0.92, 0.66))
    starts = [0, *(frame.epoch for frame in frames if frame.dropped.any())]
    left = [frames[0].present, *(frame.left for frame in frames if frame.dropped.any())]
    ends = [*starts[1:], max(epochs, starts[-1] + 1)]
    kinds = list(KIND_COLOURS)
    shares = np.array([kind_shares(mask) for mask in left]).T
    x = np.ravel(list(zip(starts, ends, strict=True)))
    axes.stackplot(
        x,
        100 * np.repeat(shares, 2, axis=1),
        colors=[KIND_COLOURS[name] for name in kinds],
        labels=kinds,
        alpha=0.85,
        lw=0,
    )
    for start, mask in zip(starts, left, strict=True):
        axes.text(
            *(start, 101), f" {mask.sum()}", fontsize=8, color="#777777", ha="left", va="bottom"
        )
    axes.set_xlim(0, ends[-1])
    axes.set_ylim(0, 100)
    axes.set_xlabel("epochs of the search (above: operations left on all edges)")
    axes.set_ylabel("share of what is left, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="upper center", ncols=len(kinds), frameon=False)
    return figure


def kind_shares(mask: np.ndarray) -> list[float]:
    """Return which share of some operations, bool[2, 14, 8], is of each kind of `KIND_COLOURS`."""
    counts = mask.sum(axis=(0, 1))
    own = [kind(name) for name in OPERATIONS]
    return [
        float(sum(count for count, k in zip(counts, own, strict=True) if k == name) / mask.sum())
        for name in KIND_COLOURS
    ]
