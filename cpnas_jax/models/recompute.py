"""Recomputing an operation in the backward pass, to save memory.

A 1-bit operation leaves more behind for its gradient than it computes: signs, and the values they
come from. `jax.checkpoint` alone does not help on a CPU, where XLA drops its barriers and merges
both computations again.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same pure function of arrays, of which the gradient keeps the arguments alone.

    Args:
        function: (params, before, x) -> (y, statistics). Statistics, such as running averages, and
            those `before` have no gradient. It must close over no traced value.

    Returns:
        The function, differentiable in reverse mode.
    """

    @jax.custom_vjp
    def run(params: Any, before: Any, x: jax.Array) -> Any:
        return function(params, before, x)

    def forward(params: Any, before: Any, x: jax.Array) -> Any:
        return function(params, before, x), (params, before, x)

    def backward(kept: Any, cotangents: Any) -> Any:
        @jax.jit
        def gradients(params: Any, before: Any, x: jax.Array, cotangent: Any) -> Any:
            _, pull = jax.vjp(lambda p, x: function(p, before, x)[0], params, x)
            return pull(cotangent)

        # The barrier keeps XLA from merging this with the forward pass on TPU and GPU; on a CPU
        # it is dropped, and a function that is not inlined does the same.
        arguments = lax.optimization_barrier((*kept, cotangents[0]))
        with set_xla_metadata(inlineable="false"):
            params, x = gradients(*arguments)
        return params, jax.tree.map(jnp.zeros_like, kept[1]), x

    run.defvjp(forward, backward)
    return run


def apply_recomputed(
    owner: nn.Module, name: str, module: nn.Module, x: jax.Array, binary: bool
) -> Any:
    """Apply a module as the submodule `name` of `owner`, recomputed in the backward pass.

    Args:
        owner: a bound module, inside whose compact method this is called.
        name: of the submodule among the owner's variables.
        module: unbound; with `params` and perhaps `batch_stats`, and no random stream.
        x: f[N, H, W, C].
        binary: child or parent.

    Returns:
        What the module returns for x. Changed `batch_stats` are the owner's.
    """
    params = owner.variables["params"].get(name, {})
    before = owner.variables.get("batch_stats", {}).get(name, {})

    def pure(params: Any, before: Any, x: jax.Array) -> Any:
        y, changed = module.apply(
            {"params": params, "batch_stats": before}, x, binary, mutable=["batch_stats"]
        )
        return y, changed.get("batch_stats", {})

    y, changed = recomputed(pure)(params, before, x)
    if changed:
        owner.put_variable("batch_stats", name, changed)
    return y
