"""Figure of trainings: each term of the loss and the accuracies, over the epochs."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cpnas_jax.figures import CHILD_COLOUR, PARENT_COLOUR, plain_axes

Lines = Sequence[Mapping[str, Any]]
"""Of `metrics.jsonl`, as objects."""

_COLUMNS = 3
_NAMES = {"train": "child (1-bit)", "parent": "parent (float)"}
_COLOURS = {"train": CHILD_COLOUR, "parent": PARENT_COLOUR}
_TITLES = {
    "accuracy": "accuracy, %",
    "learning_rate": "learning rate",
    "reconstruction": "reconstruction, eq. 4.17",
    "center": "center, eq. 4.18",
}


def training_figure(trainings: Mapping[str, Lines], terms: Sequence[str]) -> Figure:
    """Draw accuracies, the loss and each of its terms that is not always 0, a panel each.

    Args:
        trainings: `train` and `parent`, or one of them -> at least one line.
        terms: names of the loss's terms.
    """
    shown = [
        term
        for term in terms
        if any(line.get(term, 0) for lines in trainings.values() for line in lines)
    ]
    panels = ["accuracy", "loss", *shown, "learning_rate"]
    rows = -(-len(panels) // _COLUMNS)
    height = 2.5 * rows + 0.4
    figure = Figure(figsize=(10, height), facecolor="white")
    places = {
        **{"left": 0.06, "right": 0.985, "wspace": 0.24, "hspace": 0.5},
        **{"top": 1 - 0.7 / height, "bottom": 0.5 / height},
    }
    grid = figure.subplots(rows, _COLUMNS, squeeze=False, gridspec_kw=places).ravel()
    for axes, name in zip(grid, panels, strict=False):
        for training, lines in trainings.items():
            _plot(axes, name, training, lines)
        axes.set_title(_TITLES.get(name, name.replace("_", " ")), fontsize=10)
        axes.set_xlabel("epoch", fontsize=8)
        axes.tick_params(labelsize=8)
        plain_axes(axes)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def _plot(axes: Axes, name: str, training: str, lines: Lines) -> None:
    scale = 100 if name == "accuracy" else 1
    label, colour = _NAMES[training], _COLOURS[training]
    # A single epoch would be a line without length.
    marker = "o" if len(lines) == 1 else ""
    known = [line for line in lines if name in line]
    if name in ("reconstruction", "center") and not any(line[name] for line in known):
        return
    own = f"{label}, training" if name == "accuracy" else None
    axes.plot(
        [line["epoch"] for line in known],
        [scale * line[name] for line in known],
        color=colour,
        lw=1.5,
        ls="--" if name == "accuracy" else "-",
        marker=marker,
        ms=3,
        label=own,
    )
    test = {"accuracy": "test_accuracy", "loss": "test_loss"}.get(name, "")
    evaluated = [line for line in lines if test in line]
    if name == "accuracy" and evaluated:
        axes.plot(
            [line["epoch"] for line in evaluated],
            [scale * line[test] for line in evaluated],
            color=colour,
            lw=1.8,
            marker="o",
            ms=3,
            label=f"{label}, evaluated",
        )
