import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpnas_jax.architecture.alpha import restart, update_alpha
from cpnas_jax.architecture.indicator import (
    child_parent_score,
    drop_worst,
    final_operations,
    indicator,
)
from cpnas_jax.architecture.sampling import (
    all_survivors,
    num_sampled_epochs,
    num_surviving,
    stage_permutations,
)
from cpnas_jax.models.space import CELL_TYPES

ACCURACY = st.floats(0, 1)


def as_alpha(values):
    return dict(zip(CELL_TYPES, values, strict=True))


def random_survivors(generator, stage):
    return generator.permuted(np.tile(np.arange(8), (2, 14, 1)), axis=-1) < stage


@given(ACCURACY, ACCURACY, st.floats(0, 10))
def test_score_is_equation_4_15(child, parent, beta_p):
    z = child_parent_score(child, parent, beta_p)
    assert z == pytest.approx(beta_p * parent + (1 - beta_p) * child, abs=1e-12)


def test_score_at_the_ablations_ends():
    assert child_parent_score(0.5, 0.75, 0) == 0.5
    assert child_parent_score(0.5, 0.75, 1) == 0.75
    # The printed formula, in which a better child lowers z at beta_P = 2.
    assert child_parent_score(0.5, 0.75, 2) == 1.0
    assert child_parent_score(0.25, 0.75, 2) == 1.25


@given(st.integers(0, 10**6), st.integers(1, 8), st.floats(1e-3, 100))
def test_indicator_is_a_softmax_over_the_survivors(seed, stage, scale):
    generator = np.random.default_rng(seed)
    survivors = random_survivors(generator, stage)
    alpha = generator.normal(size=(2, 14, 8)) * scale
    alpha[~survivors] = np.nan
    e = indicator(as_alpha(alpha), survivors)
    assert (e[~survivors] == 0).all()
    for cell in range(2):
        for edge in range(14):
            mask = survivors[cell, edge]
            kept = alpha[cell, edge, mask]
            oracle = 1 / np.exp(kept[None, :] - kept[:, None]).sum(axis=1)
            np.testing.assert_allclose(e[cell, edge, mask], oracle, rtol=1e-9)


@given(st.integers(0, 10**6), st.integers(2, 8))
def test_the_smallest_indicator_is_dropped_on_every_edge(seed, stage):
    generator = np.random.default_rng(seed)
    survivors = random_survivors(generator, stage)
    e = indicator(as_alpha(generator.normal(size=(2, 14, 8))), survivors)
    given_survivors = survivors.copy()
    remaining, dropped = drop_worst(e, survivors)
    np.testing.assert_array_equal(survivors, given_survivors)
    assert dropped.dtype == np.int32
    assert num_surviving(remaining) == stage - 1
    for cell in range(2):
        for edge in range(14):
            surviving = np.flatnonzero(survivors[cell, edge])
            worst = min(surviving, key=lambda k: e[cell, edge, k])
            assert dropped[cell, edge] == worst
            assert set(np.flatnonzero(remaining[cell, edge])) == set(surviving) - {worst}


def test_ties_drop_the_lowest_position():
    survivors = all_survivors()
    survivors[..., 0] = False
    _, dropped = drop_worst(indicator(as_alpha(np.zeros((2, 14, 8))), survivors), survivors)
    assert (dropped == 1).all()


def test_what_cannot_be_dropped_is_refused():
    one = np.zeros((2, 14, 8), bool)
    one[..., 4] = True
    assert (final_operations(one) == 4).all()
    with pytest.raises(ValueError, match="one operation is left"):
        drop_worst(one.astype(float), one)
    with pytest.raises(ValueError, match="unfinished"):
        final_operations(all_survivors())
    with pytest.raises(ValueError, match="not a number"):
        drop_worst(np.full((2, 14, 8), np.nan), all_survivors())
    with pytest.raises(ValueError, match="not finite"):
        indicator(as_alpha(np.full((2, 14, 8), np.nan)), all_survivors())


def planted_worths(seed):
    """Worth of every operation of every edge: the best 1, the others at most 0.4."""
    generator = np.random.default_rng(seed)
    worths = generator.uniform(0, 0.4, size=(2, 14, 8))
    best = generator.integers(0, 8, size=(2, 14))
    np.put_along_axis(worths, best[..., None], 1.0, axis=-1)
    return worths, best


def search_planted(seed, rounds, worths, mean, spread=0.02):
    """Run Algorithm 9 with z = mean worth of the 28 sampled operations + noise."""
    noise = np.random.default_rng(seed + 1)
    survivors, epochs = all_survivors(), 0
    for stage in range(8, 1, -1):
        samples = []
        for t in range(1, rounds + 1):
            for architecture in stage_permutations(seed, stage, t, survivors):
                chosen = np.take_along_axis(worths, architecture[..., None], axis=-1)
                z = float(chosen.mean() + noise.normal(scale=spread))
                samples.append((architecture, z, t))
                epochs += 1
        survivors, _ = drop_worst(indicator(mean(samples), survivors), survivors)
    return final_operations(survivors), epochs


def numpy_mean(samples):
    sums = np.zeros((2, 14, 8))
    counts = np.zeros((2, 14, 8))
    for architecture, z, _ in samples:
        hot = np.eye(8)[architecture]
        sums += hot * z
        counts += hot
    return as_alpha(sums / np.maximum(counts, 1))


def alpha_mean(samples):
    state = restart()
    for architecture, z, t in samples:
        state = update_alpha(*state, architecture, z, t)
    return state[0]


# z is one number for 28 edges, so the other edges are noise to each edge: their means vary by about
# 0.3 * sqrt(27) / 28 = 0.056, with the noise 0.06, and the last stage compares two operations that
# differ by at least 0.6 / 28 = 0.021. After T = 300 rounds the standard error of a difference is
# 0.06 * sqrt(2 / 300) = 0.005, a fourth of it.
@pytest.mark.parametrize("seed", [0, 1])
def test_a_planted_best_operation_is_found_on_every_edge(seed):
    worths, best = planted_worths(seed)
    found, epochs = search_planted(seed, 300, worths, numpy_mean)
    np.testing.assert_array_equal(found, best)
    assert epochs == num_sampled_epochs(300) == 35 * 300


def test_a_planted_best_operation_is_not_found_in_noise_alone():
    worths, best = planted_worths(0)
    found, _ = search_planted(0, 30, np.zeros_like(worths), numpy_mean)
    assert (found == best).mean() < 0.5


def test_alpha_takes_the_same_decisions_as_the_mean():
    worths, best = planted_worths(2)
    by_alpha, epochs = search_planted(2, 40, worths, alpha_mean)
    by_mean, _ = search_planted(2, 40, worths, numpy_mean)
    np.testing.assert_array_equal(by_alpha, by_mean)
    assert epochs == 35 * 40
    # 40 rounds are too few for all edges, not for most.
    assert (by_alpha == best).mean() > 0.5
