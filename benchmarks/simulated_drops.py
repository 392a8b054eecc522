"""Whole searches on simulated scores: what dropping finds, by means and by ridge regression.

    python benchmarks/simulated_drops.py --seeds 20

An architecture's score is the sum of its operations' effects and noise. The effects have a part
that the edges of a cell type share and a part of their own, as large against the noise of a score
as ridge regression finds them in measured scores (docs/indicator.md). No network is trained. The
quality of a search is the mean true effect of the operations it ends with, in standard deviations
of the effects: 0 is what a random architecture has. A table, then one JSON object as the last line.

    python benchmarks/simulated_drops.py --seeds 200 --shares

asks instead how 280 scored architectures are best shared by the seven stages, with carried scores:
the difference of quality from that of equal shares, with its standard error over the same worlds,
and the correlation of the found with the true effects of what survives, at the first and the last
drop; its square is what a reliability estimates.
"""

import argparse
import json
from collections.abc import Callable, Sequence

import numpy as np
from train_variants import spread, spread_text

from cpnas_jax.architecture.credit import agreement, drops, mean_scores, ridge
from cpnas_jax.architecture.indicator import drop_worst
from cpnas_jax.architecture.sampling import FIRST_STAGE, all_survivors, stage_permutations


def drawn(survivors: np.ndarray, number: int, generator: np.random.Generator) -> np.ndarray:
    """Return int[number, 2, 14]: on each edge one permutation of its survivors after the other."""
    found = np.empty((number, *survivors.shape[:2]), int)
    for edge in np.ndindex(survivors.shape[:2]):
        left = np.flatnonzero(survivors[edge])
        # One at least, of which a stage that scores nothing needs none.
        turns = [generator.permutation(left) for _ in range(max(1, -(-number // len(left))))]
        found[:, *edge] = np.concatenate(turns)[:number]
    return found


def scored(effects: np.ndarray, architectures: np.ndarray, generator) -> np.ndarray:
    """Return the scores f64[n], with noise of standard deviation 1."""
    chosen = np.take_along_axis(effects[None], architectures[..., None], -1)[..., 0]
    return chosen.sum(axis=(1, 2)) + generator.normal(size=len(architectures))


def quality(effects: np.ndarray, survivors: np.ndarray) -> float:
    """Return the mean effect of what is left, in standard deviations."""
    centred = effects - effects.mean(axis=-1, keepdims=True)
    left = np.take_along_axis(centred, survivors.argmax(axis=-1)[..., None], -1)
    return float(left.mean() / centred.std())


def by_means(effects: np.ndarray, seed: int, rounds: int) -> dict[str, float]:
    """Search as Algorithm 9 does."""
    generator, survivors = np.random.default_rng([1, seed]), all_survivors()
    for stage in range(FIRST_STAGE, 1, -1):
        sampled = np.concatenate(
            [stage_permutations(seed, stage, t + 1, survivors) for t in range(rounds)]
        )
        means = mean_scores(sampled, scored(effects, sampled, generator))
        survivors, _ = drop_worst(means, survivors)
    return {"quality": quality(effects, survivors), "scored": rounds * 35, "stages": 7}


def by_ridge(
    effects: np.ndarray, seed: int, numbers: Sequence[int], certainty: float, carried: bool
) -> dict[str, float]:
    """Search with scored architectures by stage, alone or with those of earlier stages."""
    generator, survivors = np.random.default_rng([1, seed]), all_survivors()
    sampled: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    agreements: list[float] = []
    while survivors.sum(axis=-1).max() > 1:
        stages = len(agreements)
        sampled.append(drawn(survivors, numbers[stages], generator))
        scores.append(scored(effects, sampled[-1], generator))
        first = 0 if carried else stages
        # A stage that scores nothing is no group.
        groups = np.repeat(np.arange(stages + 1 - first), numbers[first : stages + 1])
        groups = np.unique(groups, return_inverse=True)[1]
        credit = ridge(
            np.concatenate(sampled[first:]), np.concatenate(scores[first:]), groups=groups
        )
        agreements.append(agreement(effects, credit.effects, survivors))
        survivors &= ~drops(credit, survivors, certainty)
    return {
        "quality": quality(effects, survivors),
        "stages": len(agreements),
        "scored": sum(numbers[: len(agreements)]),
        "first": agreements[0],
        "last": agreements[-1],
    }


EQUAL = "equally"
SHARES = {
    EQUAL: (40,) * 7,
    "half in the first stage": (140, 24, 24, *(23,) * 4),
    "in each stage half of what is left": (140, 70, 35, 18, 9, 4, 4),
    "all in the first stage": (280, *(0,) * 6),
    "more and more": (20, 20, 30, 40, 50, 60, 60),
}
"""Of 280 scored architectures by stage."""


def main() -> None:
    """Search with every rule and seed; print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--kind", type=float, default=0.011, help="variance, against the noise's")
    parser.add_argument("--edge", type=float, default=0.003, help="likewise")
    parser.add_argument("--shares", action="store_true", help="compare shares of 280 scored")
    flags = parser.parse_args()
    rules: dict[str, tuple[Callable[..., dict[str, float]], tuple]]
    rules = {f"means, T = {rounds}": (by_means, (rounds,)) for rounds in (1, 3, 10)}
    for number in (40, 80, 160, 320):
        rules[f"ridge, {number} a stage"] = by_ridge, ((number,) * 7, 1.0, False)
        for certainty in (1.0, 0.99, 0.95):
            name = f"ridge, {number} a stage, carried, certainty {certainty:g}"
            rules[name] = by_ridge, ((number,) * 7, certainty, True)
    columns = ("stages", "scored")
    if flags.shares:
        rules = {name: (by_ridge, (numbers, 0.99, True)) for name, numbers in SHARES.items()}
        columns += ("first", "last")
    result = {}
    titles = [f"{name:>7}" for name in columns] + ["difference"] * flags.shares
    print(f"{'':48}{'quality: mean [least, largest]':>34}", *titles)
    worlds = []
    for seed in range(flags.seeds):
        generator = np.random.default_rng([0, seed])
        kinds = generator.normal(scale=flags.kind**0.5, size=(2, 1, 8))
        worlds.append(kinds + generator.normal(scale=flags.edge**0.5, size=(2, 14, 8)))
    for name, (rule, settings) in rules.items():
        found = [rule(effects, seed, *settings) for seed, effects in enumerate(worlds)]
        result[name] = {key: spread([own[key] for own in found]) for key in ("quality", *columns)}
        text = spread_text(result[name]["quality"])
        means = [f"{result[name][key]['mean']:7.3g}" for key in columns]
        if flags.shares:
            qualities, equal = (np.array(result[own]["quality"]["values"]) for own in (name, EQUAL))
            apart = qualities - equal
            error = apart.std(ddof=1) / len(apart) ** 0.5
            means.append(f"{apart.mean():+8.3f} +- {error:.3f}")
        print(f"{name:48}{text:>34}", *means, flush=True)
    best = [quality(own, np.arange(8) == own.argmax(axis=-1)[..., None]) for own in worlds]
    result["best possible"] = spread(best)
    print(f"{'best possible':48}{spread_text(spread(best)):>34}")
    budget = {"kind": flags.kind, "edge": flags.edge, "seeds": flags.seeds}
    print(json.dumps({"benchmark": "simulated_drops", "found": result, **budget}))


if __name__ == "__main__":
    main()
