"""Tables and paired tests of a comparison, against scipy and hand-made cases."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from cpnas_jax.comparison import KINDS, Outcome, differences, summary, table
from cpnas_jax.comparison_figures import draw_beta_curve, draw_comparison

MIXED = dict(zip(KINDS, (0.5, 0.25, 0.25, 0.0), strict=True))


def outcome(variant, seed, accuracy, **changed):
    return Outcome(
        **{
            "variant": variant,
            "seed": seed,
            "accuracy": accuracy,
            "seconds": 60.0,
            "epochs": 35,
            "flops": 2e9,
            "kinds": MIXED,
            "parameters": 1000,
            "ops": 5e6,
            "train_seconds": 30.0,
            **changed,
        }
    )


def drawn(means, seeds=5, noise=0.01):
    generator = np.random.default_rng(0)
    return [
        outcome(f"s{row}", seed, float(mean + generator.normal(0, noise)))
        for row, mean in enumerate(means)
        for seed in range(seeds)
    ]


def test_pairs_are_compared_by_seed_as_scipy_does():
    outcomes = drawn([0.5, 0.52, 0.6])
    accuracies = {
        name: [o.accuracy for o in outcomes if o.variant == name] for name in ("s0", "s1", "s2")
    }
    found = differences(outcomes)
    raw = {}
    for first, second in itertools.combinations(accuracies, 2):
        expected = stats.ttest_rel(accuracies[first], accuracies[second])
        interval = expected.confidence_interval(0.95)
        own = next(d for d in found if (d.first, d.second) == (first, second))
        assert own.low == pytest.approx(interval.low)
        assert own.high == pytest.approx(interval.high)
        raw[first, second] = expected.pvalue
    # Holm: the least p times three, the next times two, never below the one before.
    adjusted, before = {}, 0.0
    for rank, pair in enumerate(sorted(raw, key=raw.get)):
        before = adjusted[pair] = max(before, min(1.0, (3 - rank) * raw[pair]))
    assert {(d.first, d.second): d.p for d in found} == pytest.approx(adjusted)


def test_only_seeds_that_both_have_are_paired():
    outcomes = [outcome("a", s, 0.5 + s / 100) for s in (0, 1, 2)]
    outcomes += [outcome("b", s, 0.4 + s / 100) for s in (1, 2, 3)]
    (found,) = differences(outcomes)
    assert found.seeds == 2
    assert found.mean == pytest.approx(0.1)
    assert differences([outcome("a", 0, 0.5), outcome("b", 1, 0.5)]) == []


def test_what_is_claimed():
    (clear,) = differences(drawn([0.5, 0.6]))
    assert clear.claim() == "s1 is better"
    (noisy,) = differences(drawn([0.5, 0.501]))
    assert noisy.claim() == "no difference is shown"
    (single,) = differences([outcome("a", 0, 0.1), outcome("b", 0, 0.9)])
    assert single.claim() == "one seed: nothing can be said"
    assert math.isnan(single.p)
    for gap in (0.0, 0.001):
        same = [
            outcome(name, seed, 0.5 + seed / 7 + shift)
            for name, shift in (("a", 0.0), ("b", gap))
            for seed in range(3)
        ]
        assert differences(same)[0].claim() == "equal differences: nothing can be said"
        assert "| - | - | equal differences" in table(same)


def test_many_equal_strategies_are_rarely_told_apart():
    """The chance of any claim among six equal ones stays near 5 %, not 15 times that."""
    generator = np.random.default_rng(1)
    claims = 0
    for _ in range(200):
        outcomes = [
            outcome(f"s{row}", seed, float(generator.normal(0.5, 0.01)))
            for row in range(6)
            for seed in range(4)
        ]
        claims += any("better" in d.claim() for d in differences(outcomes))
    # 200 trials at 0.05: 10 expected, 3 standard deviations are 9.
    assert claims <= 19


def test_the_table_and_its_json_say_the_same():
    outcomes = drawn([0.5, 0.6])
    found = summary(outcomes)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    row = found["variants"]["s0"]
    values = [o.accuracy for o in outcomes[:5]]
    assert row["accuracy"]["mean"] == pytest.approx(np.mean(values))
    assert row["accuracy"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert (row["accuracy"]["n"], row["seeds"]) == (5, [0, 1, 2, 3, 4])
    lines = table(outcomes).splitlines()
    assert f"{np.mean(values):.4f} +- {np.std(values, ddof=1):.4f}" in lines[2]
    assert "| 60 | 35 | 2 | 50% | 25% | 25% | 0% | 1000 | 5.00 M |" in lines[2]
    assert lines[-1].startswith("| s0 - s1 |")
    assert lines[-1].endswith("| s1 is better |")


def test_operations_that_were_not_counted_leave_a_gap():
    outcomes = [outcome("a", 0, 0.5), outcome("a", 1, 0.5, flops=None)]
    assert summary(outcomes)["variants"]["a"]["flops"] is None
    assert "| 35 | - |" in table(outcomes)


def test_figures_show_every_variant(tmp_path):
    outcomes = drawn([0.5, 0.6, 0.7], seeds=2)
    paths = draw_comparison(outcomes, tmp_path)
    text = paths[1].read_text()
    for name in ("s0", "s1", "s2", *KINDS):
        assert f">{name}<" in text
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert draw_beta_curve(outcomes, {"s0": 0.0, "s2": 2.0}, tmp_path)[1].exists()
    assert draw_beta_curve(outcomes, {"other": 1.0}, tmp_path / "none") == []
