"""Draws of an architecture, and gates that have the value 1 and a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import QUICK, random_architecture
from path_cases import NETWORK, random_like, shapes

from cpnas_jax.models import supernet
from cpnas_jax.models.space import CELL_TYPES
from cpnas_jax.relaxation import largest, sampled_by, straight_through


def values_of(seed=0):
    return np.random.default_rng(seed).normal(size=(2, 14, 8)).astype(np.float32)


def some_survivors(seed=1):
    survivors = np.random.default_rng(seed).random((2, 14, 8)) < 0.4
    survivors[..., 5] = True
    return survivors


def test_the_largest_is_a_survivor():
    values, survivors = values_of(), some_survivors()
    found = np.asarray(largest(values, survivors))
    expected = np.argmax(np.where(survivors, values, -9), axis=-1)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.int32
    assert (expected != np.argmax(values, axis=-1)).any()


def test_draws_follow_the_softmax_over_the_survivors():
    relaxation = sampled_by(NETWORK, 1.0)
    alpha, survivors = dict(zip(CELL_TYPES, values_of(), strict=True)), some_survivors()
    draw = jax.jit(
        jax.vmap(lambda key: relaxation.draw(key, alpha, survivors).architecture),
        compiler_options=QUICK,
    )
    n = 4000
    found = np.asarray(draw(jax.random.split(jax.random.key(0), n)))
    shares = np.stack([(found == operation).mean(axis=0) for operation in range(8)], axis=-1)
    weights = np.exp(np.stack(list(alpha.values()))) * survivors
    expected = weights / weights.sum(axis=-1, keepdims=True)
    # Five standard errors of the largest of them.
    np.testing.assert_allclose(shares, expected, atol=5 * 0.5 / np.sqrt(n))
    assert (shares[~survivors] == 0).all()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_gates_are_one_and_have_the_gradient_of_the_chosen_probability(temperature):
    values, survivors = values_of(), some_survivors()
    architecture = largest(values, survivors)
    directions = np.random.default_rng(2).normal(size=(2, 14)).astype(np.float32)

    def weighted(values):
        gates = straight_through(values, survivors, architecture, temperature)
        return jnp.sum(gates * directions), gates

    gradient, gates = jax.grad(weighted, has_aux=True)(values)
    np.testing.assert_array_equal(gates, np.ones((2, 14)))
    weights = np.exp(values / temperature) * survivors
    soft = weights / weights.sum(axis=-1, keepdims=True)
    chosen = np.eye(8)[np.asarray(architecture)]
    probability = (soft * chosen).sum(axis=-1, keepdims=True)
    expected = directions[..., None] * probability * (chosen - soft) / temperature
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_the_logits_are_those_of_the_drawn_path_and_alpha_has_its_gradient():
    """With gates in the step of alpha and without in that of the weights: the same numbers."""
    relaxation, params = sampled_by(NETWORK, 1.0), random_like(shapes(), 0, 0.3)
    images = np.random.default_rng(3).normal(size=(4, 8, 8, 3)).astype(np.float32)
    survivors = np.zeros((2, 14, 8), bool)
    first, second = random_architecture(0), random_architecture(1)
    for architecture in (first, second):
        np.put_along_axis(survivors, architecture[..., None], True, axis=-1)
    alpha = dict(zip(CELL_TYPES, values_of(), strict=True))

    def all_forms(alpha):
        drawn = relaxation.draw(jax.random.key(1), alpha, survivors)

        def gated(alpha):
            logits = relaxation.logits(params, images, alpha, survivors, drawn, False)
            return jnp.sum(jnp.sin(logits)), logits

        gradient, logits = jax.grad(gated, has_aux=True)(alpha)
        trained = relaxation.trained(params, images, alpha, survivors, drawn, False)
        scored = relaxation.score(params, images, alpha, survivors, False)
        path = relaxation.architecture(drawn)
        best = largest(jnp.stack(list(alpha.values())), survivors)
        paths = [
            supernet.apply(params, images, own, settings=NETWORK, binary=False)
            for own in (path, best)
        ]
        return gradient, logits, trained, scored, path, best, paths

    found = jax.device_get(jax.jit(all_forms, compiler_options=QUICK)(alpha))
    gradient, logits, trained, scored, path, best, (of_path, of_best) = found
    np.testing.assert_allclose(logits, of_path, atol=1e-4)
    np.testing.assert_allclose(trained, of_path, atol=1e-4)
    np.testing.assert_allclose(scored, of_best, atol=1e-4)
    assert (path != best).any()
    assert np.abs(of_path - of_best).max() > 1e-3
    stacked = np.stack([gradient[cell] for cell in CELL_TYPES])
    assert (stacked[~survivors] == 0).all()
    # Where two operations are left and the chosen one is not `none`.
    open_edges = (survivors.sum(axis=-1) == 2) & (path != 0)
    assert (np.abs(stacked[open_edges]).max(axis=-1) > 0).all()
    assert (stacked[path == 0] == 0).all()
