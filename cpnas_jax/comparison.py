"""What several searches found, side by side: tables, paired tests, and what may be claimed."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

SIGNIFICANCE = 0.05
"""Largest adjusted p of a paired test that counts as a difference."""

_ROUNDING = 1e-9
"""Spread of accuracies that is none."""

KINDS = ("convolution", "pooling", "skip", "none")
"""What operations are counted by, see `figures.kind`."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one search and the training of the cells that it found.

    Attributes:
        variant: name of the strategy, with its beta_P where several are compared.
        seed: of search and training.
        accuracy: test accuracy of the child in [0, 1].
        seconds: of the search, apart from starting and compiling.
        epochs: sampled epochs, or epochs, of the search.
        flops: of the search's training and scoring; None where they were not counted, because the
            search was not run by a comparison.
        kinds: kind of operation -> share of the edges of both cells.
        parameters: of the child.
        ops: operations of the child, see `models/summary.py`.
        train_seconds: of the child's training.
    """

    variant: str
    seed: int
    accuracy: float
    seconds: float
    epochs: int
    flops: float | None
    kinds: Mapping[str, float]
    parameters: int
    ops: float
    train_seconds: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """A paired comparison of two variants over the seeds that both have.

    Attributes:
        first: name.
        second: name.
        mean: mean difference of the accuracies, first minus second.
        low: of the 95 % confidence interval of the mean, by Student's t; NaN for one seed, or
            where all seeds differ by the same.
        high: likewise.
        p: of the paired t test, adjusted over all pairs (Holm 1979); NaN likewise.
        seeds: how many.
    """

    first: str
    second: str
    mean: float
    low: float
    high: float
    p: float
    seeds: int

    def claim(self) -> str:
        """Say what the test allows to say."""
        if self.seeds < 2:
            return "one seed: nothing can be said"
        if math.isnan(self.p):
            return "equal differences: nothing can be said"
        if self.p > SIGNIFICANCE:
            return "no difference is shown"
        return f"{self.first if self.mean > 0 else self.second} is better"


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Return mean, standard deviation (None for one value), least, largest and n."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def _column(group: Sequence[Outcome], name: str) -> dict[str, float | int | None] | None:
    values = [getattr(outcome, name) for outcome in group]
    return None if None in values else spread(values)


def by_variant(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Group outcomes, in the order in which the variants come first."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.variant, []).append(outcome)
    return groups


def differences(outcomes: Sequence[Outcome]) -> list[Difference]:
    """Compare every pair of variants by the seeds that both have."""
    accuracies = {
        variant: {outcome.seed: outcome.accuracy for outcome in group}
        for variant, group in by_variant(outcomes).items()
    }
    found = []
    for first, second in itertools.combinations(accuracies, 2):
        seeds = sorted(accuracies[first].keys() & accuracies[second].keys())
        if not seeds:
            continue
        paired = np.array([accuracies[first][s] - accuracies[second][s] for s in seeds])
        found.append(_difference(first, second, paired))
    return _adjusted(found)


def _difference(first: str, second: str, paired: np.ndarray) -> Difference:
    mean, count = float(paired.mean()), len(paired)
    if count < 2:
        return Difference(first, second, mean, math.nan, math.nan, math.nan, count)
    error = float(paired.std(ddof=1)) / math.sqrt(count)
    if error < _ROUNDING:
        # All seeds differ by the same, as counts of right answers do by chance: no spread is known
        # that the mean could be held against.
        return Difference(first, second, mean, math.nan, math.nan, math.nan, count)
    half = float(stats.t.ppf(0.975, count - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, count - 1))
    return Difference(first, second, mean, mean - half, mean + half, p, count)


def _adjusted(found: list[Difference]) -> list[Difference]:
    """Adjust p by Holm's step-down method: so many comparisons find something by chance."""
    tested = sorted((d for d in found if not math.isnan(d.p)), key=lambda d: d.p)
    adjusted, least = {}, 0.0
    for rank, difference in enumerate(tested):
        least = max(least, min(1.0, (len(tested) - rank) * difference.p))
        adjusted[difference.first, difference.second] = least
    return [dataclasses.replace(d, p=adjusted.get((d.first, d.second), math.nan)) for d in found]


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return everything that the table shows, as JSON has it."""
    columns = ("accuracy", "seconds", "epochs", "flops", "parameters", "ops", "train_seconds")
    variants = {
        variant: {
            **{name: _column(group, name) for name in columns},
            "kinds": {kind: spread([o.kinds[kind] for o in group]) for kind in KINDS},
            "seeds": [o.seed for o in group],
        }
        for variant, group in by_variant(outcomes).items()
    }
    pairs = [
        {
            **{
                key: None if isinstance(value, float) and math.isnan(value) else value
                for key, value in dataclasses.asdict(difference).items()
            },
            "claim": difference.claim(),
        }
        for difference in differences(outcomes)
    ]
    return {
        "variants": variants,
        "differences": pairs,
        "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
    }


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the tables of variants and of their differences, in Markdown."""
    found = summary(outcomes)
    lines = [
        "| strategy | test accuracy of the child | n | search, s | epochs | GFLOPs | "
        + " | ".join(KINDS)
        + " | parameters | OPs |",
        "|---|---|---|---|---|---|" + "---|" * len(KINDS) + "---|---|",
    ]
    for variant, row in found["variants"].items():
        accuracy = row["accuracy"]
        flops = f"{row['flops']['mean'] / 1e9:.0f}" if row["flops"] else "-"
        lines.append(
            f"| {variant} | {_spread_text(accuracy)} | {accuracy['n']} | "
            f"{row['seconds']['mean']:.0f} | {row['epochs']['mean']:.0f} | "
            f"{flops} | "
            + " | ".join(f"{row['kinds'][kind]['mean']:.0%}" for kind in KINDS)
            + f" | {row['parameters']['mean']:.0f} | {row['ops']['mean'] / 1e6:.2f} M |"
        )
    if found["differences"]:
        lines += [
            "",
            "| pair | mean difference | 95 % interval | p (Holm) | |",
            "|---|---|---|---|---|",
        ]
    for pair in found["differences"]:
        several = pair["p"] is not None
        interval = f"{pair['low']:+.4f} to {pair['high']:+.4f}" if several else "-"
        p = f"{pair['p']:.3f}" if several else "-"
        lines.append(
            f"| {pair['first']} - {pair['second']} | {pair['mean']:+.4f} | {interval} | {p} | "
            f"{pair['claim']} |"
        )
    return "\n".join(lines)


def _spread_text(found: Mapping[str, Any]) -> str:
    if found["std"] is None:
        return f"{found['mean']:.4f}"
    return f"{found['mean']:.4f} +- {found['std']:.4f} [{found['min']:.4f}, {found['max']:.4f}]"
