"""Functions that XLA compiles apart from what surrounds them.

XLA:CPU likes to compute again inside a fusion what it needs of its producers: in a whole network
the kernel's gradient of a depthwise convolution computed the convolution's forward pass again, and
the images' gradient that of pooling, for one pixel after the other. A call that is not inlined ends
a fusion. (`lax.optimization_barrier` does not: XLA:CPU removes it before it fuses.)
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata


def outline(function: Callable[..., jax.Array], num_arrays: int) -> Callable[..., jax.Array]:
    """Return the function with a forward and a backward pass that are calls in XLA's program.

    What is kept for the backward pass are the arguments; what else it needs, it computes again.

    Args:
        function: of so many arrays and of static arguments, all by position; differentiable.
        num_arrays: how many arrays.
    """

    def run(arrays: tuple[jax.Array, ...], static: tuple[Any, ...]) -> jax.Array:
        # What is called inside is inlined as usual.
        with set_xla_metadata(inlineable=None):
            return function(*arrays, *static)

    def pull(
        arrays: tuple[jax.Array, ...], cotangent: jax.Array, static: tuple[Any, ...]
    ) -> tuple[jax.Array, ...]:
        with set_xla_metadata(inlineable=None):
            _, pullback = jax.vjp(lambda *arrays: function(*arrays, *static), *arrays)
            return pullback(cotangent)

    run_apart = jax.jit(run, static_argnums=1)
    pull_apart = jax.jit(pull, static_argnums=2)

    def outlined(arrays: tuple[jax.Array, ...], static: tuple[Any, ...]) -> jax.Array:
        with set_xla_metadata(inlineable="false"):
            return run_apart(arrays, static)

    def forward(
        arrays: tuple[jax.Array, ...], static: tuple[Any, ...]
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return outlined(arrays, static), arrays

    def backward(
        static: tuple[Any, ...], arrays: tuple[jax.Array, ...], cotangent: jax.Array
    ) -> tuple[tuple[jax.Array, ...]]:
        with set_xla_metadata(inlineable="false"):
            return (pull_apart(arrays, cotangent, static),)

    differentiable = jax.custom_vjp(outlined, nondiff_argnums=(1,))
    differentiable.defvjp(forward, backward)
    return lambda *arguments: differentiable(arguments[:num_arrays], arguments[num_arrays:])
