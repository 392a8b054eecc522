import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cpnas_jax.architecture.credit import (
    agreement,
    drops,
    mean_scores,
    reliability,
    ridge,
    spearman_brown,
)
from cpnas_jax.architecture.sampling import all_survivors, stage_permutations

ALL = all_survivors()


def rounds_of(number, survivors=ALL, seed=0, first=1):
    """Architectures of so many rounds without replacement, int32[8 * number, 2, 14]."""
    stage = int(survivors.sum(axis=-1).max())
    return np.concatenate(
        [stage_permutations(seed, stage, first + t, survivors) for t in range(number)]
    )


def planted(seed, kind=1.0, edge=1.0):
    """Effects of which a part is shared by the edges of a cell type."""
    generator = np.random.default_rng(seed)
    shared = generator.normal(scale=kind, size=(2, 1, 8))
    return shared + generator.normal(scale=edge, size=(2, 14, 8))


def scored(architectures, effects, noise, seed=0, level=0.3):
    """Additive scores with normal noise; effects are hundredths."""
    chosen = np.take_along_axis(effects[None], architectures[..., None], -1)[..., 0]
    draws = np.random.default_rng(1000 + seed).normal(scale=noise, size=len(architectures))
    return level + 0.01 * (chosen.sum(axis=(1, 2)) + draws)


def padded_least_squares(architectures, scores, weights, groups, credit):
    """Ridge as least squares with a row for each penalty; every group has a free intercept."""
    n, labels = len(scores), np.unique(groups)
    columns = [groups == label for label in labels]
    for cell in range(2):
        for operation in range(8):
            columns.append((architectures[:, cell] == operation).sum(axis=1))
    for cell in range(2):
        for edge in range(14):
            for operation in range(8):
                columns.append(architectures[:, cell, edge] == operation)
    design = np.stack(columns, axis=1).astype(float)
    penalties = np.minimum([credit.kind_penalty] * 16 + [credit.edge_penalty] * 224, 1e10)
    padding = np.zeros((240, design.shape[1]))
    padding[:, len(labels) :] = np.diag(np.sqrt(penalties))
    rows = np.concatenate([design * np.sqrt(weights)[:, None], padding])
    target = np.concatenate([scores * np.sqrt(weights), np.zeros(240)])
    solution = np.linalg.lstsq(rows, target, rcond=None)[0]
    free, kinds, edges = np.split(solution, [len(labels), len(labels) + 16])
    # The intercepts have no penalty: of the posterior's covariance they take their part.
    inverse = np.linalg.inv(rows.T @ rows)[len(labels) :, len(labels) :]
    unexplained = target - rows @ solution
    variance = unexplained @ unexplained / (n - len(labels))
    select = np.concatenate(
        [np.kron(np.eye(2), np.kron(np.ones((14, 1)), np.eye(8))), np.eye(224)], axis=1
    )
    covariance = variance * select @ inverse @ select.T
    effects = kinds.reshape(2, 1, 8) + edges.reshape(2, 14, 8)
    return free, effects, covariance.reshape(28, 8, 28, 8)


@pytest.mark.parametrize("number", [2, 12, 50])
def test_ridge_is_least_squares_with_rows_for_the_penalties(number):
    architectures = rounds_of(number)
    generator = np.random.default_rng(number)
    n = len(architectures)
    weights, groups = generator.uniform(0.2, 2, n), generator.integers(4, 7, n)
    scores = scored(architectures, planted(1), noise=4.0) + 0.1 * groups
    credit = ridge(architectures, scores, weights=weights, groups=groups)
    # Of two rounds the scores know no edge.
    assert (credit.edge_penalty == np.inf) == (number == 2)
    free, effects, covariance = padded_least_squares(architectures, scores, weights, groups, credit)
    np.testing.assert_allclose(credit.effects, effects, atol=1e-9)
    np.testing.assert_allclose(credit.intercepts, free, atol=1e-9)
    own = covariance[np.arange(28), :, np.arange(28)].reshape(2, 14, 8, 8)
    np.testing.assert_allclose(credit.covariance, own, rtol=1e-5, atol=1e-12)
    fitted = credit.intercepts[-1] + np.array(
        [sum(effects[c, e, a[c, e]] for c in range(2) for e in range(14)) for a in architectures]
    )
    np.testing.assert_allclose(credit.predict(architectures), fitted, atol=1e-9)


def log_evidence(architectures, scores, kind_penalty, edge_penalty):
    """Restricted log-likelihood by the densest way: contrasts and their covariance."""
    n = len(scores)
    hot = np.eye(8)[architectures]
    kinds, edges = hot.sum(axis=2).reshape(n, -1), hot.reshape(n, -1)
    covariance = np.eye(n) + kinds @ kinds.T / kind_penalty + edges @ edges.T / edge_penalty
    contrasts = np.linalg.qr(np.concatenate([np.ones((n, 1)), np.eye(n)[:, 1:]], 1))[0][:, 1:]
    own, seen = contrasts.T @ covariance @ contrasts, contrasts.T @ scores
    scale = seen @ np.linalg.solve(own, seen) / (n - 1)
    return stats.multivariate_normal(cov=scale * own).logpdf(seen)


@pytest.mark.parametrize(("kind", "edge"), [(1.0, 0.3), (0.3, 1.0)])
def test_the_penalties_are_the_most_likely_ones(kind, edge):
    architectures = rounds_of(25)
    scores = scored(architectures, planted(2, kind, edge), noise=4.0)
    credit = ridge(architectures, scores)
    chosen = log_evidence(architectures, scores, credit.kind_penalty, credit.edge_penalty)
    for factors in ((4, 1), (0.25, 1), (1, 4), (1, 0.25), (4, 4), (0.25, 0.25)):
        other = log_evidence(
            architectures,
            scores,
            credit.kind_penalty * factors[0],
            credit.edge_penalty * factors[1],
        )
        assert other < chosen
    if kind > edge:
        assert credit.kind_penalty < credit.edge_penalty


def test_ridge_finds_planted_effects_and_says_how_well():
    """Without noise to speak of exactly; with noise within the errors that it gives itself."""
    effects = planted(3)
    many = rounds_of(100)
    found = ridge(many, scored(many, effects, noise=1e-3)).effects
    assert agreement(found, effects, ALL) > 0.9999
    inside = total = 0
    for seed in range(6):
        effects = planted(10 + seed, kind=0.5, edge=0.5)
        architectures = rounds_of(40, seed=seed)
        credit = ridge(architectures, scored(architectures, effects, noise=3.0, seed=seed))
        assert credit.noise == pytest.approx(0.03, rel=0.25)
        first, second = np.triu_indices(8, 1)
        error = np.sqrt(
            credit.covariance[..., first, first]
            + credit.covariance[..., second, second]
            - 2 * credit.covariance[..., first, second]
        )
        wrong = credit.effects[..., first] - credit.effects[..., second]
        wrong = wrong - 0.01 * (effects[..., first] - effects[..., second])
        inside += (np.abs(wrong) < 1.96 * error).sum()
        total += wrong.size
    assert 0.92 < inside / total < 0.98


def test_sharing_over_edges_beats_means_and_edges_alone():
    effects = planted(4, kind=1.0, edge=0.3)
    architectures = rounds_of(10)
    scores = scored(architectures, effects, noise=2.0)
    shared = agreement(ridge(architectures, scores).effects, effects, ALL)
    means = agreement(mean_scores(architectures, scores), effects, ALL)
    assert shared > 0.8
    assert means < 0.6


def test_a_groups_level_and_an_observations_weight():
    effects = planted(5)
    architectures = rounds_of(30)
    n = len(architectures)
    scores = scored(architectures, effects, noise=2.0)
    groups = np.arange(n) % 3
    plain = ridge(architectures, scores, groups=groups)
    moved = ridge(architectures, scores + np.array([0.0, 5.0, -2.0])[groups], groups=groups)
    np.testing.assert_allclose(moved.effects, plain.effects, atol=1e-10)
    np.testing.assert_allclose(moved.intercepts - plain.intercepts, [0, 5, -2], atol=1e-10)
    # Observations of no weight might as well not be there; their scores are of other effects.
    other = scored(rounds_of(30, first=200), planted(6), noise=2.0)
    together = ridge(
        np.concatenate([architectures, rounds_of(30, first=200)]),
        np.concatenate([scores, other]),
        weights=np.repeat([1.0, 1e-9], n),
    )
    alone = ridge(architectures, scores)
    assert agreement(together.effects, effects, ALL) > 0.9 * agreement(alone.effects, effects, ALL)
    mixed = ridge(
        np.concatenate([architectures, rounds_of(30, first=200)]), np.concatenate([scores, other])
    )
    assert agreement(mixed.effects, effects, ALL) < agreement(together.effects, effects, ALL)


@given(st.integers(0, 10**6))
def test_what_must_not_matter(seed):
    generator = np.random.default_rng(seed)
    architectures = generator.integers(0, 8, (40, 2, 14))
    scores = generator.normal(size=40)
    credit = ridge(architectures, scores)
    edges, operations = generator.permutation(14), generator.permutation(8)
    reordered = ridge(architectures[:, :, edges], scores)
    np.testing.assert_allclose(reordered.effects, credit.effects[:, edges], atol=1e-9)
    named = ridge(operations[architectures], scores)
    np.testing.assert_allclose(named.effects[..., operations], credit.effects, atol=1e-9)
    scaled = ridge(architectures, 7.0 + 3.0 * scores)
    np.testing.assert_allclose(scaled.effects, 3.0 * credit.effects, atol=1e-9)
    np.testing.assert_allclose(scaled.covariance, 9.0 * credit.covariance, atol=1e-9)
    later = generator.permutation(40)
    np.testing.assert_allclose(
        ridge(architectures[later], scores[later]).effects, credit.effects, atol=1e-9
    )


def test_means_are_means():
    architectures = rounds_of(3)
    scores = np.random.default_rng(0).normal(size=len(architectures))
    found = mean_scores(architectures, scores)
    for cell, edge, operation in ((0, 0, 0), (1, 13, 7), (0, 5, 3)):
        own = scores[architectures[:, cell, edge] == operation]
        assert len(own) == 3
        assert found[cell, edge, operation] == pytest.approx(own.mean() - scores.mean())
    assert np.isnan(mean_scores(architectures[:4], scores[:4])).any()
    alone = mean_scores(architectures[:2], np.array([0.2, 0.4]))
    assert alone[0, 3, architectures[1, 0, 3]] == pytest.approx(0.1)


@pytest.mark.parametrize(("rounds", "expected"), [(3, 3 / 30), (20, 20 / 47)])
def test_means_repeat_themselves_as_the_additive_model_says(rounds, expected):
    """T / (27 + T) without any noise, by repetition and by halves."""
    repeated, halved = [], []
    for seed in range(40):
        effects = planted(100 + seed, kind=0.0)
        first, second = (rounds_of(rounds, seed=seed, first=own) for own in (1, 1001))
        scores = [scored(own, effects, noise=0.0) for own in (first, second)]
        means = [mean_scores(*pair) for pair in zip((first, second), scores, strict=True)]
        repeated.append(agreement(*means, ALL))
        if rounds > 3:
            own = np.repeat(np.arange(rounds), 8)
            halved.append(
                reliability(first, scores[0], ALL, rounds=own, estimate=mean_scores, seed=seed)
            )
    assert np.mean(repeated) == pytest.approx(expected, abs=0.03)
    if halved:
        assert np.mean(halved) == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize("noise", [2.0, 8.0])
def test_reliability_by_halves_is_that_of_repetitions(noise):
    halved, repeated = [], []
    for seed in range(8):
        effects = planted(200 + seed)
        runs = [rounds_of(30, seed=seed, first=first) for first in (1, 501)]
        scores = [scored(own, effects, noise, seed=7 * seed + k) for k, own in enumerate(runs)]
        own = np.repeat(np.arange(30), 8)
        halved.append(reliability(runs[0], scores[0], ALL, rounds=own, splits=4, seed=seed))
        repeated.append(
            agreement(
                *(ridge(own, s).effects for own, s in zip(runs, scores, strict=True)),
                ALL,
            )
        )
    assert np.mean(halved) == pytest.approx(np.mean(repeated), abs=0.05)
    assert 0.2 < np.mean(repeated) < 0.95


def test_noise_alone_is_not_reliable():
    architectures = rounds_of(20)
    found = [
        reliability(architectures, np.random.default_rng(s).normal(size=160), ALL, splits=4, seed=s)
        for s in range(12)
    ]
    assert abs(np.mean(found)) < 0.12


def test_reliability_compares_what_survives_and_is_a_function_of_its_seed():
    effects = np.zeros((2, 14, 8))
    effects[..., 0] = -50.0  # `none` is bad, all others are equal
    architectures = rounds_of(40)
    scores = scored(architectures, effects, noise=1.0)
    without = ALL.copy()
    without[..., 0] = False
    assert reliability(architectures, scores, ALL) > 0.95
    assert reliability(architectures, scores, without) < 0.5
    one, again, other = (reliability(architectures, scores, without, seed=s) for s in (1, 1, 2))
    assert one == again != other


def test_groups_of_one_round_are_halved_at_random():
    """A supernet that is scored with one round at every age, its level another each time."""
    architectures, groups = rounds_of(40), np.repeat(np.arange(40), 8)
    scores = scored(architectures, planted(8), noise=2.0) + 0.05 * (groups % 2)
    settings = {"groups": groups, "rounds": groups, "splits": 1}
    found = [reliability(architectures, scores, ALL, seed=s, **settings) for s in range(4)]
    assert len(set(found)) == 4
    assert min(found) > 0.5


def test_spearman_brown():
    assert spearman_brown(0.5, 2) == pytest.approx(2 / 3)
    # Of T rounds, from that of one.
    assert spearman_brown(1 / 28, 10) == pytest.approx(10 / 37)
    assert spearman_brown(-0.1, 2) == -0.1


def credit_of(seed, rounds=20, noise=2.0, survivors=ALL):
    effects = planted(300 + seed)
    architectures = rounds_of(rounds, survivors, seed=seed)
    return effects, ridge(architectures, scored(architectures, effects, noise, seed))


@given(st.integers(0, 200), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_drops_the_worst_and_the_certain_and_never_the_best(seed, certainty):
    generator = np.random.default_rng(seed)
    _, credit = credit_of(seed, rounds=6)
    survivors = generator.random((2, 14, 8)) < 0.5
    survivors[..., 3] = True
    survivors[0, 0, :2] = True
    before = survivors.copy()
    dropped = drops(credit, survivors, certainty)
    np.testing.assert_array_equal(dropped, drops(credit, survivors, certainty))
    np.testing.assert_array_equal(survivors, before)
    left = survivors.sum(axis=-1)
    assert not (dropped & ~survivors).any()
    for cell, edge in np.ndindex(2, 14):
        own = np.flatnonzero(survivors[cell, edge])
        values = credit.effects[cell, edge]
        best = max(own, key=lambda k: values[k])
        assert not dropped[cell, edge, best]
        covariance = credit.covariance[cell, edge]
        for k in set(own) - {best}:
            contrast = np.eye(8)[best] - np.eye(8)[k]
            error = np.sqrt(contrast @ covariance @ contrast)
            probability = stats.norm.sf(0, values[best] - values[k], error)
            forced = left[cell, edge] == left.max() and k == min(own, key=lambda k: values[k])
            assert dropped[cell, edge, k] == (forced or probability > certainty)


def test_the_certain_ones_are_really_worse():
    right = total = 0
    for seed in range(12):
        effects, credit = credit_of(seed, rounds=40, noise=3.0)
        dropped = credit.probability_below_best(ALL) > 0.95
        found = np.argmax(credit.effects, axis=-1)[..., None]
        worse = effects < np.take_along_axis(effects, found, -1)
        right += (worse & dropped).sum()
        total += dropped.sum()
    assert total > 200
    assert right / total > 0.95


def test_a_search_by_drops_ends_with_one_operation_and_mostly_the_best():
    effects, survivors, stages = planted(7), ALL.copy(), 0
    while survivors.sum(axis=-1).max() > 1:
        generator = np.random.default_rng(stages)
        draws = generator.random((320, 2, 14, 8)) * survivors
        architectures = draws.argmax(axis=-1)
        credit = ridge(architectures, scored(architectures, effects, 3.0, stages))
        survivors &= ~drops(credit, survivors, 0.99)
        stages += 1
        assert survivors.any(axis=-1).all()
    assert stages <= 7
    left = np.take_along_axis(effects, survivors.argmax(axis=-1)[..., None], -1)[..., 0]
    assert (left >= np.sort(effects, axis=-1)[..., -2]).mean() > 0.8


def test_equal_scores_say_nothing():
    architectures = rounds_of(2)
    credit = ridge(architectures, np.full(16, 0.1))
    assert not credit.effects.any()
    assert credit.intercepts == pytest.approx([0.1])
    assert agreement(credit.effects, planted(0), ALL) == 0
    dropped = drops(credit, ALL, 0.9)
    np.testing.assert_array_equal(dropped, np.eye(8, dtype=bool)[np.zeros((2, 14), int)])
    # Even odds are no certainty.
    np.testing.assert_array_equal(drops(credit, ALL, 0.5), dropped)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda a, s: ridge(a[:, 0], s), "must be"),
        (lambda a, s: ridge(a, s[:-1]), "must be"),
        (lambda a, s: ridge(a, np.where(s > s[0], s, np.nan)), "finite"),
        (lambda a, s: ridge(a, s, weights=np.zeros(16)), "positive"),
        (lambda a, s: ridge(a, s, groups=np.arange(16)), "16 scores in 16 groups"),
        (lambda a, s: drops(ridge(a, s), np.eye(8, dtype=bool)[a[0]], 0.9), "two on one"),
        (lambda a, s: drops(ridge(a, s), np.zeros((2, 14, 8), bool), 0.9), "0 to 0"),
        (lambda a, s: drops(ridge(a, s), ALL, 0.3), "certainty is 0.3"),
    ],
)
def test_what_makes_no_sense_is_refused(act, words):
    scores = np.random.default_rng(0).normal(size=16)
    with pytest.raises(ValueError, match=words):
        act(rounds_of(2), scores)
