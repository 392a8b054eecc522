"""Differentiable functions that XLA compiles apart from what surrounds them (`deploy.apart`).

In a whole network the kernel's gradient of a depthwise convolution computed the convolution's
forward pass again, and the images' gradient that of pooling, for one pixel after the other.
"""

from collections.abc import Callable
from typing import Any

import jax

from cpnas_jax.deploy.apart import apart


def outline(function: Callable[..., jax.Array], num_arrays: int) -> Callable[..., jax.Array]:
    """Return the function with a forward and a backward pass that are calls in XLA's program.

    What is kept for the backward pass are the arguments; what else it needs, it computes again.

    Args:
        function: of so many arrays and of static arguments, all by position; differentiable.
        num_arrays: how many arrays.
    """

    def pull(
        arrays: tuple[jax.Array, ...], cotangent: jax.Array, static: tuple[Any, ...]
    ) -> tuple[jax.Array, ...]:
        _, pullback = jax.vjp(lambda *arrays: function(*arrays, *static), *arrays)
        return pullback(cotangent)

    outlined = apart(lambda arrays, static: function(*arrays, *static), static=(1,))
    pull_apart = apart(pull, static=(2,))

    def forward(
        arrays: tuple[jax.Array, ...], static: tuple[Any, ...]
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return outlined(arrays, static), arrays

    def backward(
        static: tuple[Any, ...], arrays: tuple[jax.Array, ...], cotangent: jax.Array
    ) -> tuple[tuple[jax.Array, ...]]:
        return (pull_apart(arrays, cotangent, static),)

    differentiable = jax.custom_vjp(outlined, nondiff_argnums=(1,))
    differentiable.defvjp(forward, backward)
    return lambda *arguments: differentiable(arguments[:num_arrays], arguments[num_arrays:])
