"""Inputs, parameters and cases that the tests of operations share."""

import jax
import jax.numpy as jnp
import numpy as np

CHANNELS = 4
CONVOLUTIONS = ("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")
PARAMETRIC_CASES = [
    *((name, stride) for name in CONVOLUTIONS for stride in (1, 2)),
    ("skip_connect", 2),
]


def image(channels=CHANNELS, size=(5, 6), seed=0):
    generator = np.random.default_rng(seed)
    return jnp.asarray(generator.normal(size=(3, *size, channels)), jnp.float32)


def shapes_of(module, channels):
    """Shapes of the parameters of a module for inputs of so many channels."""
    x = jax.ShapeDtypeStruct((1, 4, 4, channels), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(lambda key, x: module.init(key, x, False), key, x)
    assert set(variables) <= {"params"}  # no running averages in the search
    return variables.get("params", {})


def params_of(module, channels, seed=1):
    """Random parameters of the right shapes, on both sides of the clip."""
    generator = np.random.default_rng(seed)

    def draw(leaf):
        assert leaf.dtype == jnp.float32
        return jnp.asarray(generator.normal(size=leaf.shape) * 0.8, jnp.float32)

    return jax.tree.map(draw, shapes_of(module, channels))
