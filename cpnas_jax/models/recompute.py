"""Recomputing an operation in the backward pass, to save memory.

A 1-bit operation leaves more behind for its gradient than it computes: signs, and the values they
come from. `jax.checkpoint` alone does not help on a CPU, where XLA drops its barriers and merges
both computations again.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same pure function of arrays, of which the gradient keeps the arguments alone.

    Args:
        function: (params, x) -> (y, statistics). The statistics, such as running averages, get no
            gradient.

    Returns:
        The function, differentiable in reverse mode.
    """

    @jax.custom_vjp
    def run(params: Any, x: jax.Array) -> Any:
        return function(params, x)

    def forward(params: Any, x: jax.Array) -> Any:
        return function(params, x), (params, x)

    def backward(kept: Any, cotangents: Any) -> Any:
        params, x = kept

        @jax.jit
        def gradients(params: Any, x: jax.Array, cotangent: Any) -> Any:
            _, pull = jax.vjp(lambda p, x: function(p, x)[0], params, x)
            return pull(cotangent)

        # The barrier keeps XLA from merging this with the forward pass on TPU and GPU; on a CPU
        # it is dropped, and a function that is not inlined does the same.
        arguments = lax.optimization_barrier((params, x, cotangents[0]))
        with set_xla_metadata(inlineable="false"):
            return gradients(*arguments)

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
    before = jax.tree.map(lax.stop_gradient, before)

    def pure(params: Any, x: jax.Array) -> Any:
        y, changed = module.apply(
            {"params": params, "batch_stats": before}, x, binary, mutable=["batch_stats"]
        )
        return y, changed.get("batch_stats", {})

    y, changed = recomputed(pure)(params, x)
    if changed:
        owner.put_variable("batch_stats", name, changed)
    return y
