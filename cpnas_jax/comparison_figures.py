"""Figures of a comparison of strategies, as PNG and SVG files."""

import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from cpnas_jax.comparison import KINDS, Outcome, by_variant
from cpnas_jax.figures import CHILD_COLOUR, KIND_COLOURS, plain_axes, save_figure


def draw_comparison(
    outcomes: Sequence[Outcome], directory: str | os.PathLike[str]
) -> list[pathlib.Path]:
    """Draw accuracy, search time and kinds of operations of every variant.

    Args:
        outcomes: at least one.
        directory: where `compare.png` and `compare.svg` are written.

    Returns:
        The two paths.
    """
    groups = by_variant(outcomes)
    rows = range(len(groups))
    figure = Figure(figsize=(11, 1.4 + 0.5 * len(groups)), facecolor="white", layout="constrained")
    accuracy, cost, kinds = figure.subplots(1, 3, sharey=True)
    for row, group in enumerate(groups.values()):
        values = [100 * outcome.accuracy for outcome in group]
        accuracy.plot(values, [row] * len(values), "o", color=CHILD_COLOUR, ms=5, alpha=0.55)
        accuracy.plot(statistics.fmean(values), row, "|", color="black", ms=16, mew=2)
        left = 0.0
        for kind in KINDS:
            share = 100 * statistics.fmean(outcome.kinds[kind] for outcome in group)
            label = kind if row == 0 else None
            kinds.barh(row, share, 0.6, left, color=KIND_COLOURS[kind], label=label)
            left += share
    seconds = [statistics.fmean(o.seconds for o in group) / 60 for group in groups.values()]
    cost.barh(rows, seconds, 0.6, color="#9A9A9A")
    accuracy.set_yticks(rows, list(groups))
    accuracy.invert_yaxis()
    accuracy.set_xlabel("test accuracy of the child, %\n(a dot a seed, a bar the mean)")
    cost.set_xlabel("search, minutes")
    kinds.set_xlabel("operations of both cells, %")
    figure.legend(loc="outside upper right", ncols=len(KINDS), frameon=False)
    for axes in (accuracy, cost, kinds):
        plain_axes(axes, "x")
    return save_figure(figure, directory, "compare")


def draw_beta_curve(
    outcomes: Sequence[Outcome], betas: Mapping[str, float], directory: str | os.PathLike[str]
) -> list[pathlib.Path]:
    """Draw accuracy and share of convolutions against beta_P.

    Args:
        outcomes: of all variants; those without a beta_P are left out.
        betas: name of a variant -> its beta_P.
        directory: where `beta.png` and `beta.svg` are written.

    Returns:
        The two paths, or none where no variant with a beta_P is done.
    """
    groups = {betas[v]: group for v, group in by_variant(outcomes).items() if v in betas}
    if not groups:
        return []
    figure = Figure(figsize=(9, 3.6), facecolor="white", layout="constrained")
    accuracy, share = figure.subplots(1, 2)
    panels = (
        (accuracy, "test accuracy of the child, %", lambda outcome: outcome.accuracy),
        (share, "convolutions in both cells, %", lambda outcome: outcome.kinds["convolution"]),
    )
    order = sorted(groups)
    for axes, name, value in panels:
        values = {beta: [100 * value(outcome) for outcome in groups[beta]] for beta in order}
        for beta, found in values.items():
            axes.plot([beta] * len(found), found, "o", color=CHILD_COLOUR, alpha=0.55)
        means = [statistics.fmean(values[beta]) for beta in order]
        axes.plot(order, means, "-", color="black", lw=1.4)
        axes.set_xlabel("beta_P (line: mean, dots: seeds)")
        axes.set_ylabel(name)
        plain_axes(axes, "y")
    return save_figure(figure, directory, "beta")
