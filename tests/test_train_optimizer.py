"""Optax chains of final training against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpnas_jax import train_optimizer
from cpnas_jax.train_optimizer import RateSettings

PARAMS = {
    "cells0": {"conv": {"kernel": jnp.asarray([[0.5, -2.0]])}, "norm": {"scale": jnp.ones(2)}},
    "classifier": {"kernel": jnp.asarray([[1.0], [3.0]]), "bias": jnp.asarray([2.0])},
}
BINARY = {
    "cells0": {"conv": {"kernel": True}, "norm": {"scale": False}},
    "classifier": {"kernel": False, "bias": False},
}


def stepped(name, gradient_value, weight_decay, steps=2, clip=1e9):
    optimizer = train_optimizer.make_optimizer(
        name,
        RateSettings(0.1, 0, 10**9),
        momentum=0.9,
        weight_decay=weight_decay,
        gradient_clip=clip,
        binary_kernels=BINARY,
    )
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(steps):
        gradients = jax.tree.map(lambda p: jnp.full_like(p, gradient_value), params)
        params, state = train_optimizer.update(optimizer, gradients, state, params)
    return params


def test_adam_decays_float_kernels_alone():
    plain, decayed = stepped("adam", 1e-3, 0.0), stepped("adam", 1e-3, 0.5)
    for path in (("cells0", "conv", "kernel"), ("cells0", "norm", "scale"), ("classifier", "bias")):
        a, b = plain, decayed
        for key in path:
            a, b = a[key], b[key]
        np.testing.assert_array_equal(a, b)
    assert not np.allclose(plain["classifier"]["kernel"], decayed["classifier"]["kernel"])


def test_sgd_is_that_of_pytorch():
    found = stepped("sgd", 0.3, 0.01)
    for leaf, start in zip(jax.tree.leaves(found), jax.tree.leaves(PARAMS), strict=True):
        p, momentum = np.asarray(start, np.float64), 0.0
        for _ in range(2):
            momentum = 0.9 * momentum + 0.3 + 0.01 * p
            p = p - 0.1 * momentum
        np.testing.assert_allclose(leaf, p, rtol=1e-5)


def test_the_global_norm_is_clipped():
    found = stepped("sgd", 3.0, 0.0, steps=1, clip=1.0)
    change = [a - b for a, b in zip(*map(jax.tree.leaves, (PARAMS, found)), strict=True)]
    assert np.sqrt(sum(np.sum(np.square(c)) for c in change)) == pytest.approx(0.1, rel=1e-5)


def test_the_rate_rises_and_falls():
    rate = train_optimizer.learning_rate(RateSettings(0.4, 10, 110))
    assert [float(rate(step)) for step in (0, 5, 10)] == pytest.approx([0.0, 0.2, 0.4])
    assert float(rate(60)) == pytest.approx(0.2)
    assert float(rate(110)) == pytest.approx(0.0, abs=1e-7)


def test_rates_scale_with_the_batch_only_when_asked():
    assert train_optimizer.peak_rate(0.1, 512, 0) == 0.1
    assert train_optimizer.peak_rate(0.1, 512, 256) == pytest.approx(0.2)


def test_an_unknown_optimizer():
    with pytest.raises(ValueError, match="lion"):
        train_optimizer.make_optimizer(
            "lion",
            RateSettings(0.1, 0, 1),
            momentum=0,
            weight_decay=0,
            gradient_clip=1,
            binary_kernels=BINARY,
        )


def test_moving_averages():
    def moved(step):
        old, new = {"a": jnp.asarray(1.0)}, {"a": jnp.asarray(3.0)}
        return float(train_optimizer.moving_average(old, new, 0.75, jnp.int32(step))["a"])

    assert moved(1000) == pytest.approx(0.75 * 1 + 0.25 * 3)
    # At first it hardly remembers.
    assert moved(0) == pytest.approx(0.1 * 1 + 0.9 * 3)
    assert moved(8) == pytest.approx(0.5 * 1 + 0.5 * 3)
