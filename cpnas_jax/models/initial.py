"""Initial kernels of a whole network by one random draw.

A draw for each kernel would take XLA a minute to compile in a network of a few hundred.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def draw_kernels(key: jax.Array, shapes: Any, is_stacked: Callable[[list[Any]], bool]) -> Any:
    """Return normal draws for every leaf named `kernel`, and zeros for every other.

    The standard deviation is sqrt(2 / fan-in) (He et al. 2015): our choice, for the latent weights
    of the child too; sqrt(1 / fan-in) in a classifier.

    Args:
        key: random key.
        shapes: tree of `jax.ShapeDtypeStruct`.
        is_stacked: whether the leaf at a path, a list of keys, has a leading axis of its own.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    ends = np.cumsum([math.prod(leaf.shape) for _, leaf in leaves])
    parts = jnp.split(jax.random.normal(key, (int(ends[-1]),)), ends[:-1])
    values = []
    for (path, leaf), part in zip(leaves, parts, strict=True):
        keys = _keys(path)
        if keys[-1] != "kernel":
            values.append(jnp.zeros(leaf.shape, leaf.dtype))
            continue
        shape = leaf.shape[1:] if is_stacked(keys) else leaf.shape
        # A depthwise kernel [k, k, C] sums over its k * k taps only.
        fan_in = math.prod(shape[:2] if "depthwise" in keys else shape[:-1])
        gain = 1.0 if keys[-2] == "classifier" else 2.0
        values.append(part.reshape(leaf.shape) * math.sqrt(gain / fan_in))
    return jax.tree.unflatten(structure, values)


def _keys(path: tuple[Any, ...]) -> list[Any]:
    return [getattr(entry, "key", None) for entry in path]
