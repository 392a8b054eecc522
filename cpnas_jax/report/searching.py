"""What a search compared and dropped, for its report: tables of the edges."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cpnas_jax.architecture.film import Frame, dropped_in, film, thinned
from cpnas_jax.architecture.genotype import Genotype
from cpnas_jax.figures import SHORT_NAMES, TITLES
from cpnas_jax.models.space import CELL_TYPES, EDGES, NODE_NAMES, NUM_INPUTS, OPERATIONS
from cpnas_jax.report.contents import Contents
from cpnas_jax.search_figures import relative

MOST_FRAMES = 10
"""Frames of an edge that a page shows."""


def frames_of(contents: Contents) -> tuple[Frame, ...]:
    """Return the film of the search; none where nothing was searched here."""
    if not contents.events:
        return ()
    operations = contents.keys.get("search.operations", OPERATIONS)
    return film(contents.events, operations)


_INPUT_NODES = ("c\u2096\u208b\u2082", "c\u2096\u208b\u2081")
"""`c_{k-2}` and `c_{k-1}` in the letters of Unicode."""


def node_name(node: int) -> str:
    """Return how a page writes a node."""
    return (*_INPUT_NODES, *NODE_NAMES[NUM_INPUTS:])[node]


def cells_of(frames: Sequence[Frame], genotype: Genotype | None) -> list[dict[str, Any]]:
    """Return the edges of both cells, each with a row for every operation and a column for a frame.

    Args:
        frames: of the whole film, at least one.
        genotype: what came out, or None.
    """
    gone, shown = dropped_in(frames), thinned(frames, MOST_FRAMES)
    shades = [relative(frame.values, frame.present) for frame in shown]
    cells = []
    for row, cell in enumerate(CELL_TYPES):
        own = getattr(genotype, cell) if genotype is not None else ()
        kept = {(edge.source, edge.target): edge.operation for edge in own}
        edges = []
        for column, edge in enumerate(EDGES):
            operations = np.flatnonzero(frames[0].present[row, column])
            rows = [
                {
                    "name": OPERATIONS[k],
                    "short": SHORT_NAMES[OPERATIONS[k]],
                    "kept": kept.get(edge) == OPERATIONS[k],
                    "fate": _fate(frames, gone[row, column], OPERATIONS[k], edge, kept),
                    "cells": [
                        _box(frame, shade, (row, column, k))
                        for frame, shade in zip(shown, shades, strict=True)
                    ],
                }
                for k in operations.tolist()
            ]
            edges.append(
                {
                    "source": node_name(edge[0]),
                    "target": node_name(edge[1]),
                    "rows": rows,
                    "kept": kept.get(edge),
                    "unused": genotype is not None and edge not in kept,
                }
            )
        cells.append({"name": cell, "title": TITLES[cell], "edges": edges})
    return cells


def _fate(
    frames: Sequence[Frame],
    gone: np.ndarray,
    operation: str,
    edge: tuple[int, int],
    kept: Mapping[tuple[int, int], str],
) -> str:
    """Say what became of an operation, in the words that the page explains.

    Args:
        frames: of the whole film.
        gone: int[8], the number of the frame that dropped each operation of the edge, or -1.
        operation: that is asked for.
        edge: source and target.
        kept: what the cell has on its edges.
    """
    dropped = int(gone[OPERATIONS.index(operation)])
    if kept.get(edge) == operation:
        # Or taken back in place of `none`, which outlasted it.
        return "kept" if dropped < 0 else "restored"
    if dropped >= 0:
        return frames[dropped].name
    if edge in kept and gone[OPERATIONS.index(kept[edge])] >= 0:
        return "replaced"
    # `unused`: on an edge without which the cell does, or as in DARTS nothing is dropped before
    # the end; `left`: there are no cells yet.
    return "unused" if kept else "left"


def _box(frame: Frame, shade: np.ndarray, place: tuple[int, int, int]) -> dict[str, Any]:
    return {
        "present": bool(frame.present[place]),
        "dropped": bool(frame.dropped[place]),
        "text": _digits(float(frame.values[place])),
        "shade": round(float(shade[place]), 2),
    }


def lateness(frames: Sequence[Frame]) -> dict[str, float]:
    """Return name -> 0 for the first frame that drops anything, to 1 for the last."""
    names = [frame.name for frame in frames if frame.dropped.any()]
    return {name: n / max(len(names) - 1, 1) for n, name in enumerate(names)}


def frame_names(frames: Sequence[Frame]) -> list[str]:
    """Return the heads of the columns of `cells_of`, short."""
    short = {"K = ": "K", "epoch ": "e", ", under way": "\N{HORIZONTAL ELLIPSIS}"}
    names = [frame.name for frame in thinned(frames, MOST_FRAMES)]
    for long, text in short.items():
        names = [name.replace(long, text) for name in names]
    return names


def _digits(value: float) -> str:
    """Write a value in four characters or so: .125, 1.00, -.02."""
    if math.isnan(value):
        return ""
    text = f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text
