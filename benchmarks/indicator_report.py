"""What the files of `indicator.py` say: reliability of each score, and its validity.

Reliability is the correlation, between two repetitions, of the effects within edges (`agreement`):
between disjoint sets of architectures scored with the same supernet, and between supernets of
several seeds. Validity is Kendall's tau with the test accuracy of the 1-bit child trained alone, of
the score itself and of its prediction by effects that are estimated from other architectures.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import stats

from cpnas_jax.architecture.credit import (
    agreement,
    mean_scores,
    reliability,
    ridge,
    ridge_effects,
)
from cpnas_jax.architecture.indicator import child_parent_score
from cpnas_jax.architecture.kendall import Tau, kendall_tau
from cpnas_jax.architecture.sampling import FIRST_STAGE, all_survivors
from cpnas_jax.models.space import OPERATIONS

BETAS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
ALL = all_survivors()
COLUMNS = ("T=1", "T=3", "T=8", "n=24", "n=80", "n=160", "all")
Rows = dict[str, np.ndarray]


def standard(values: np.ndarray) -> np.ndarray:
    """Take the mean off and divide by the standard deviation."""
    return (values - values.mean()) / values.std()


def ranks(values: np.ndarray) -> np.ndarray:
    """Return normal scores of the ranks."""
    return stats.norm.ppf(stats.rankdata(values) / (len(values) + 1))


def scores(rows: Rows) -> dict[str, np.ndarray]:
    """Return every score of the rows' architectures by its name."""
    child, parent = rows["accuracy"]
    sure_child, sure_parent = rows["log_likelihood"]
    found = {f"z {beta:g}": np.vectorize(child_parent_score)(child, parent, beta) for beta in BETAS}
    return {
        **found,
        "LL child": sure_child,
        "LL parent": sure_parent,
        "rank A_C": ranks(child),
        "rank LL child": ranks(sure_child),
        "A_C + LL": standard(child) + standard(sure_child),
        "A_P + LL": standard(parent) + standard(sure_parent),
        "A_C + A_P": standard(child) + standard(parent),
        "all four": sum(map(standard, (child, parent, sure_child, sure_parent))),
    }


def interval(found: list[float]) -> str:
    """Return mean and standard error of repetitions that share nothing."""
    if not found:
        return "-"
    error = np.std(found, ddof=1) / np.sqrt(len(found)) if len(found) > 1 else np.nan
    return f"{np.mean(found):.2f} ±{error:.2f}"


def extremes(found: list[float]) -> str:
    """Return mean, least and largest."""
    return f"{np.mean(found):.2f} [{min(found):.2f}, {max(found):.2f}]"


def of_means(architectures: np.ndarray, values: np.ndarray, rounds: int) -> list[float]:
    """Return agreements of means over disjoint sets of so many whole rounds, pair by pair."""
    size = rounds * FIRST_STAGE
    sets = [slice(first, first + size) for first in range(0, len(values) - size + 1, size)]
    means = [mean_scores(architectures[own], values[own]) for own in sets]
    return [agreement(a, b, ALL) for a, b in zip(means[::2], means[1::2], strict=False)]


def by_halves(rows: Rows, values: np.ndarray, number: int) -> list[float]:
    """Return the reliability of ridge with `number` architectures, of disjoint sets of them."""
    sets = len(values) // number
    return [
        reliability(
            rows["architectures"][own],
            values[own],
            ALL,
            groups=rows["groups"][own],
            rounds=np.arange(number) // FIRST_STAGE,
            # Several sets are averaged over themselves.
            splits=-(-8 // sets),
        )
        for own in np.split(np.arange(sets * number), sets)
    ]


def tau_text(tau: Tau) -> str:
    """Return value and interval."""
    return f"{tau.value:+.2f} [{tau.low:+.2f}, {tau.high:+.2f}]"


def load(keep: Path) -> tuple[dict[str, dict[str, Rows]], dict[str, dict[tuple[int, int], float]]]:
    """Return supernet and age -> rows, and kind of training -> (position, seed) -> accuracy."""
    supernets: dict[str, dict[str, Rows]] = {}
    for path in sorted(keep.glob("*-*/round*.npz")):
        with np.load(path) as stored:
            for key in stored.files:
                name, field = key.split(".")
                age = f"{name} {int(path.stem[5:])}"
                rows = supernets.setdefault(path.parent.name, {}).setdefault(age, {})
                rows[field] = stored[key].astype(int if field == "architectures" else float)
    for of in supernets.values():
        for name in ("own", "spread"):
            parts = [rows for age, rows in of.items() if age.startswith(name)]
            for age in [age for age in of if age.startswith(name)]:
                del of[age]
            if parts:
                of[name] = {
                    field: np.concatenate(
                        [part[field] for part in parts], 0 if field == "architectures" else 1
                    )
                    for field in parts[0]
                }
    for of in supernets.values():
        for age, rows in of.items():
            number = np.arange(len(rows["architectures"]))
            # On its way a supernet is scored with a round's worth after each sampled epoch.
            rows["groups"] = number * 0 if age.startswith("frozen") else number // FIRST_STAGE
    trained: dict[str, dict[tuple[int, int], float]] = {"alone": {}, "final": {}}
    for path in keep.glob("alone/*-*.json"):
        position, seed = map(int, path.stem.split("-"))
        trained["alone"][position, seed] = json.loads(path.read_text())["accuracy"]
    for path in keep.glob("final/*/*/results.json"):
        results = json.loads(path.read_text()).get("train")
        if results:
            position, seed = int(path.parent.parent.name), int(path.parent.name)
            trained["final"][position, seed] = results["test"]["top1"]
    return supernets, {kind: found for kind, found in trained.items() if found}


def spread_of(found: dict[tuple[int, int], float]) -> dict[str, float]:
    """Compare the spread between architectures with that between seeds."""
    first = [value for (_, seed), value in sorted(found.items()) if seed == 0]
    pairs = [
        (value, found[position, 1])
        for (position, seed), value in sorted(found.items())
        if seed == 0 and (position, 1) in found
    ]
    noise = float(np.sqrt(np.mean([(a - b) ** 2 / 2 for a, b in pairs]))) if pairs else np.nan
    between = float(np.std(first, ddof=1)) if len(first) > 1 else np.nan
    return {
        "n": len(first),
        "mean": float(np.mean(first)),
        "between_architectures": between,
        "between_seeds": noise,
        "repeated": len(pairs),
        "reliability": 1 - noise**2 / between**2,
    }


def carried(of: dict[str, Rows], score: str) -> tuple[Rows, np.ndarray]:
    """Return what a supernet was scored with after its youngest age, as one set of observations."""
    parts = [rows for age, rows in of.items() if age not in ("own", min(of, key=_rounds))]
    groups: list[np.ndarray] = []
    for rows in parts:
        groups.append(rows["groups"] + sum(len(set(own)) for own in groups))
    rows = {
        "architectures": np.concatenate([rows["architectures"] for rows in parts]),
        "groups": np.concatenate(groups),
    }
    return rows, np.concatenate([scores(rows)[score] for rows in parts])


def reliability_of_carried(of: dict[str, Rows], score: str) -> tuple[list[float], int]:
    """Return the reliability of ridge with all that is carried, and how many scores that are."""
    rows, values = carried(of, score)
    return by_halves(rows, values, len(values)), len(values)


def _rounds(age: str) -> float:
    return float(age.split()[1]) if age.startswith("frozen") else np.inf


def predicted(rows: Rows, values: np.ndarray, positions: list[int], targets: Rows) -> np.ndarray:
    """Return the ridge prediction of architectures that take no part in the estimate."""
    keys = {tuple(own.ravel()) for own in targets["architectures"][positions]}
    others = np.array([tuple(own.ravel()) not in keys for own in rows["architectures"]])
    credit = ridge(rows["architectures"][others], values[others], groups=rows["groups"][others])
    return credit.predict(targets["architectures"][positions])


def counts(architectures: np.ndarray) -> dict[str, np.ndarray]:
    """Return numbers of operations that say something without any search."""
    names = np.array(OPERATIONS)[architectures].reshape(len(architectures), -1)
    return {
        "convolutions": np.char.find(names, "conv").__ge__(0).sum(axis=1),
        "not none": (names != "none").sum(axis=1),
        "pools and skips": (np.char.find(names, "pool") >= 0).sum(axis=1)
        + (names == "skip_connect").sum(axis=1),
    }


def validity(
    supernets: dict[str, dict[str, Rows]], found: dict[tuple[int, int], float]
) -> dict[str, dict[str, Tau]]:
    """Return (supernet, age, way) -> score -> tau with the accuracy of what was trained alone."""
    positions = sorted(position for position, seed in found if seed == 0)
    # Of all seeds that every architecture was trained with.
    seeds = {seed for _, seed in found}
    whole = [seed for seed in seeds if all((own, seed) in found for own in positions)]
    accuracy = np.array([np.mean([found[own, seed] for seed in whole]) for own in positions])
    table: dict[str, dict[str, Tau]] = {}
    for name, of in supernets.items():
        targets = next(rows for age, rows in of.items() if age.startswith("frozen"))
        table["counts"] = {
            what: kendall_tau(number, accuracy)
            for what, number in counts(targets["architectures"][positions]).items()
        }
        for age, rows in of.items():
            for score, values in scores(rows).items():
                if age.startswith("frozen"):
                    own = table.setdefault(f"{name} {age} direct", {})
                    own[score] = kendall_tau(values[positions], accuracy)
                own = table.setdefault(f"{name} {age} ridge", {})
                forecast = predicted(rows, values, positions, targets)
                if np.ptp(forecast) > 0:
                    own[score] = kendall_tau(forecast, accuracy)
        if sum(age.startswith("frozen") for age in of) > 1:
            own = table.setdefault(f"{name} carried ridge", {})
            for score in scores(targets):
                forecast = predicted(*carried(of, score), positions, targets)
                if np.ptp(forecast) > 0:
                    own[score] = kendall_tau(forecast, accuracy)
    return table


def by_kind(effects: np.ndarray) -> dict[str, list[float]]:
    """Return the mean effect of each operation over the edges of a cell type, in 1/1000."""
    centred = effects - effects.mean(axis=-1, keepdims=True)
    rows = np.round(1000 * centred.mean(axis=1), 1).tolist()
    return dict(zip(("normal", "reduce"), rows, strict=True))


def between_seeds(own: list[dict[str, Rows]]) -> dict[str, tuple[str, str]]:
    """Return age and score -> how means and how ridge agree between supernets, over all pairs."""
    found: dict[str, tuple[str, str]] = {}
    for age in dict.fromkeys(age for of in own for age in of):
        having = [of[age] for of in own if age in of]
        for score in scores(having[0]) if len(having) > 1 else ():
            texts = []
            for estimate in (mean_scores, ridge_effects):
                effects = [
                    estimate(rows["architectures"], scores(rows)[score], groups=rows["groups"])
                    for rows in having
                ]
                pairs = itertools.combinations(effects, 2)
                # No error of the mean: pairs have supernets in common.
                texts.append(extremes([agreement(one, other, ALL) for one, other in pairs]))
            found[f"{age} {score}"] = (texts[0], texts[1])
    return found


def reliabilities(of: dict[str, Rows]) -> dict[str, dict[str, list[float]]]:
    """Return age and score -> column -> the reliabilities of a supernet, of sets that are apart."""
    found: dict[str, dict[str, list[float]]] = {}
    for age, rows in of.items():
        for score, values in scores(rows).items():
            means = {f"T={t}": of_means(rows["architectures"], values, t) for t in (1, 3, 8)}
            halves = {
                f"n={n}": by_halves(rows, values, n) for n in (24, 80, 160) if n <= len(values)
            }
            whole = by_halves(rows, values, len(values))
            found[f"{age} {score}"] = {**means, **halves, "all": whole}
    # What a search that carries its scores decides by.
    if sum(age.startswith("frozen") for age in of) > 1:
        for score in scores(next(iter(of.values()))):
            found[f"carried {score}"] = {"all": reliability_of_carried(of, score)[0]}
    return found


def say_together(say: Callable[[str], None], found: dict[str, dict[str, list[float]]]) -> None:
    """Print rows of what several supernets have, mean [least, largest]."""
    for row, columns in found.items():
        cells = [extremes(columns[name]) if columns.get(name) else "-" for name in COLUMNS]
        say(f"{row:26}{''.join(f'{cell:>21}' for cell in cells)}")


def report(keep: Path, say: Callable[[str], None] = print) -> None:
    """Print tables and, as the last line, a JSON object."""
    supernets, trained = load(keep)
    result: dict[str, object] = {"benchmark": "indicator", "reliability": {}, "validity": {}}
    say("Reliability with the same supernet: means over T rounds, ridge over n architectures")
    say(f"{'':32}{''.join(f'{name:>14}' for name in COLUMNS)}")
    together: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name, of in supernets.items():
        sampling = together.setdefault(name.split("-")[0], {})
        for key, columns in reliabilities(of).items():
            cells = {column: interval(own) for column, own in columns.items()}
            result["reliability"][f"{name} {key}"] = cells
            own_cells = [cells.get(column, "-") for column in COLUMNS]
            say(f"{f'{name} {key}':32}{''.join(f'{cell:>14}' for cell in own_cells)}")
            for column, own in columns.items():
                if own:
                    sampling.setdefault(key, {}).setdefault(column, []).append(np.mean(own))
    for sampling, found in together.items():
        say(f"The same over the supernets, {sampling}, mean [least, largest]: {', '.join(COLUMNS)}")
        say_together(say, found)
    say("Reliability between seeds, mean [least, largest] of the pairs: means, ridge")
    for sampling in together:
        alike = [of for name, of in supernets.items() if name.split("-")[0] == sampling]
        for what, both in between_seeds(alike).items():
            result["reliability"][f"seeds {sampling} {what}"] = both
            say(f"{sampling} {what:26}{both[0]:>21}{both[1]:>21}")
    for kind, found in trained.items():
        spread = spread_of(found)
        say(f"Trained {kind}: {spread}")
        table = validity(supernets, found)
        result["validity"][kind] = {"spread": spread}
        for way, taus in table.items():
            say(f"{way}: " + ", ".join(f"{score} {tau_text(tau)}" for score, tau in taus.items()))
            result["validity"][kind][way] = {
                score: [tau.value, tau.low, tau.high, tau.n] for score, tau in taus.items()
            }
    say(json.dumps(result))
