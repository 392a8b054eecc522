"""Whole searches on simulated scores: what dropping finds, by means and by ridge regression.

    python benchmarks/simulated_drops.py --seeds 20

An architecture's score is the sum of its operations' effects and noise. The effects have a part
that the edges of a cell type share and a part of their own, as large against the noise of a score
as ridge regression finds them in measured scores (docs/indicator.md). No network is trained. The
quality of a search is the mean true effect of the operations it ends with, in standard deviations
of the effects: 0 is what a random architecture has. A table, then one JSON object as the last line.
"""

import argparse
import json

import numpy as np
from train_variants import spread, spread_text

from cpnas_jax.architecture.credit import drops, mean_scores, ridge
from cpnas_jax.architecture.indicator import drop_worst
from cpnas_jax.architecture.sampling import FIRST_STAGE, all_survivors, stage_permutations


def drawn(survivors: np.ndarray, number: int, generator: np.random.Generator) -> np.ndarray:
    """Return int[number, 2, 14]: on each edge one permutation of its survivors after the other."""
    found = np.empty((number, *survivors.shape[:2]), int)
    for edge in np.ndindex(survivors.shape[:2]):
        left = np.flatnonzero(survivors[edge])
        turns = [generator.permutation(left) for _ in range(-(-number // len(left)))]
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
    effects: np.ndarray, seed: int, number: int, certainty: float, carried: bool
) -> dict[str, float]:
    """Search with so many scored architectures a stage, alone or with those of earlier stages."""
    generator, survivors = np.random.default_rng([1, seed]), all_survivors()
    sampled: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    stages = 0
    while survivors.sum(axis=-1).max() > 1:
        sampled.append(drawn(survivors, number, generator))
        scores.append(scored(effects, sampled[-1], generator))
        first = 0 if carried else stages
        groups = np.repeat(np.arange(stages + 1 - first), number)
        credit = ridge(
            np.concatenate(sampled[first:]), np.concatenate(scores[first:]), groups=groups
        )
        survivors &= ~drops(credit, survivors, certainty)
        stages += 1
    found = {"quality": quality(effects, survivors), "stages": stages}
    return {**found, "scored": stages * number}


def main() -> None:
    """Search with every rule and seed; print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--kind", type=float, default=0.011, help="variance, against the noise's")
    parser.add_argument("--edge", type=float, default=0.003, help="likewise")
    flags = parser.parse_args()
    rules = {f"means, T = {rounds}": (by_means, (rounds,)) for rounds in (1, 3, 10)}
    for number in (40, 80, 160, 320):
        rules[f"ridge, {number} a stage"] = by_ridge, (number, 1.0, False)
        for certainty in (1.0, 0.99, 0.95):
            name = f"ridge, {number} a stage, carried, certainty {certainty:g}"
            rules[name] = by_ridge, (number, certainty, True)
    result = {}
    print(f"{'':48}{'quality: mean [least, largest]':>34}{'stages':>8}{'scored':>8}")
    worlds = []
    for seed in range(flags.seeds):
        generator = np.random.default_rng([0, seed])
        kinds = generator.normal(scale=flags.kind**0.5, size=(2, 1, 8))
        worlds.append(kinds + generator.normal(scale=flags.edge**0.5, size=(2, 14, 8)))
    for name, (rule, settings) in rules.items():
        found = [rule(effects, seed, *settings) for seed, effects in enumerate(worlds)]
        result[name] = {
            key: spread([own[key] for own in found]) for key in ("quality", "stages", "scored")
        }
        text = spread_text(result[name]["quality"])
        stages, number = (result[name][key]["mean"] for key in ("stages", "scored"))
        print(f"{name:48}{text:>34}{stages:8.1f}{number:8.0f}", flush=True)
    best = [quality(own, np.arange(8) == own.argmax(axis=-1)[..., None]) for own in worlds]
    result["best possible"] = spread(best)
    print(f"{'best possible':48}{spread_text(spread(best)):>34}")
    budget = {"kind": flags.kind, "edge": flags.edge, "seeds": flags.seeds}
    print(json.dumps({"benchmark": "simulated_drops", "found": result, **budget}))


if __name__ == "__main__":
    main()
