"""Functions compiled apart: the same values and gradients, and calls that stay in the program."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from cpnas_jax.models.outline import outline


def scaled_product(x, y, power):
    return jnp.sin(x) * y**power


outlined = outline(scaled_product, 2)


def calls(function, *arguments):
    """Return how many calls XLA left in the function's program."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return len(re.findall(r" call\(", text))


def test_values_and_gradients_are_the_functions_own():
    x, y = jnp.linspace(0.1, 1, 12).reshape(3, 4), jnp.linspace(1, 2, 12).reshape(3, 4)
    for power in (2, 3):
        expected, pullback = jax.vjp(lambda x, y, power=power: scaled_product(x, y, power), x, y)
        got, outlined_pullback = jax.vjp(lambda x, y, power=power: outlined(x, y, power), x, y)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        cotangent = jnp.cos(x)
        for a, b in zip(outlined_pullback(cotangent), pullback(cotangent), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_forward_and_backward_stay_calls():
    x, y = jnp.ones((3, 4)), jnp.ones((3, 4))

    def loss(function):
        return lambda x, y: jnp.sum(function(x * 2, y, 2) ** 2)

    assert calls(loss(scaled_product), x, y) == 0
    assert calls(loss(outlined), x, y) == 1
    # The forward pass under a gradient, and the backward pass.
    assert calls(jax.grad(loss(scaled_product), (0, 1)), x, y) == 0
    assert calls(jax.grad(loss(outlined), (0, 1)), x, y) == 2
