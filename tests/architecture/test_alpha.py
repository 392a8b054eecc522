import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpnas_jax.architecture import alpha as alpha_module
from cpnas_jax.architecture.alpha import (
    alpha_optimizer,
    apply_gradient,
    cp_gradient,
    init_alpha,
    restart,
    update_alpha,
)
from cpnas_jax.architecture.sampling import all_survivors, stage_permutations
from cpnas_jax.models.space import CELL_TYPES


def stacked(alpha):
    return np.stack([np.asarray(alpha[cell]) for cell in CELL_TYPES])


@given(
    seed=st.integers(0, 1000),
    rounds=st.integers(1, 6),
    stage=st.integers(2, 8),
    beta=st.floats(0, 8),
)
def test_alpha_is_the_mean_of_z_over_the_rounds(seed, rounds, stage, beta):
    generator = np.random.default_rng(seed)
    survivors = generator.permuted(np.tile(np.arange(8), (2, 14, 1)), axis=-1) < stage
    state = restart()
    seen = {}
    for t in range(1, rounds + 1):
        for architecture in stage_permutations(seed, stage, t, survivors):
            z = float(generator.uniform(-beta, beta + 1))
            state = update_alpha(*state, architecture, z, t)
            for (cell, edge), operation in np.ndenumerate(architecture):
                seen.setdefault((cell, edge, int(operation)), []).append(z)
    expected = np.zeros((2, 14, 8))
    for place, values in seen.items():
        expected[place] = np.mean(np.array(values, np.float64))
    assert {len(values) for values in seen.values()} == {rounds}
    # A round's update rounds to float32 (6e-8 of values up to 9), a few times over.
    np.testing.assert_allclose(stacked(state[0]), expected, rtol=0, atol=3e-6)


def test_one_program_for_a_whole_search():
    state = restart()
    architecture = np.zeros((2, 14), np.int32)
    alpha_module._update.clear_cache()
    for t in range(1, 4):
        for z in (0.25, 1, np.float32(0.5)):
            state = update_alpha(*state, architecture.astype(np.int64), z, t)
    state = update_alpha(*restart(), architecture, 0.5, 1)
    assert alpha_module._update._cache_size() == 1


def test_gradient_is_that_of_the_squared_distance_on_sampled_entries():
    generator = np.random.default_rng(0)
    alpha = {cell: np.float32(generator.normal(size=(14, 8))) for cell in CELL_TYPES}
    alpha = jax.tree.map(jax.numpy.asarray, alpha)
    architecture = stage_permutations(0, 8, 1, all_survivors())[0]

    def loss(alpha):
        picked = [
            alpha[cell][np.arange(14), architecture[row]] for row, cell in enumerate(CELL_TYPES)
        ]
        return sum(((values - 0.7) ** 2).sum() / 2 for values in picked)

    gradient = cp_gradient(alpha, architecture, np.float32(0.7))
    jax.tree.map(
        lambda ours, oracle: np.testing.assert_allclose(ours, oracle, atol=1e-6),
        gradient,
        jax.grad(loss)(alpha),
    )
    assert int((stacked(gradient) != 0).sum()) == 28


def test_another_strategy_brings_its_own_optimizer():
    optimizer = optax.adam(np.float32(0.1))
    alpha, opt_state = restart(optimizer)
    gradient = jax.tree.map(jax.numpy.ones_like, alpha)
    # optax.adam itself raises a float to an integer power.
    with jax.numpy_dtype_promotion("standard"):
        alpha, opt_state = apply_gradient(optimizer, alpha, opt_state, gradient, np.int32(5))
    np.testing.assert_allclose(stacked(alpha), -0.1, rtol=1e-4)


def test_alpha_is_float32_and_restarts_at_zero():
    alpha, opt_state = restart()
    assert alpha_optimizer() is alpha_optimizer()
    assert {cell: (leaf.shape, str(leaf.dtype)) for cell, leaf in init_alpha().items()} == {
        cell: ((14, 8), "float32") for cell in CELL_TYPES
    }
    before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), opt_state)
    alpha, opt_state = update_alpha(alpha, opt_state, np.zeros((2, 14), np.int32), 0.5, 2)
    assert before == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), opt_state)
    assert stacked(alpha).max() > 0
    assert not stacked(restart()[0]).any()


@pytest.mark.parametrize(("z", "t"), [(float("nan"), 1), (0.5, 0)])
def test_bad_values_are_refused(z, t):
    with pytest.raises(ValueError, match="round"):
        update_alpha(*restart(), np.zeros((2, 14), np.int32), z, t)
