"""Several training steps in one call to the devices, up to the first that is not finite."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Step = Callable[[jax.Array, Any], tuple[Any, dict[str, jax.Array], jax.Array]]
"""(number int32[], state) -> new state, metrics, and whether loss and gradients are finite."""

Run = Callable[..., tuple[Any, dict[str, Any]]]
"""What `steps_until_bad` is; `once` of the diagnosis is another."""


def all_finite(tree: Any) -> jax.Array:
    """Return whether every float of a tree is finite, bool[]."""
    flags = [
        jnp.isfinite(leaf).all()
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    return functools.reduce(jnp.logical_and, flags, jnp.array(True))


def steps_until_bad(
    step: Step,
    first: jax.Array,
    count: jax.Array,
    state: Any,
    zeros: dict[str, jax.Array],
    bad: jax.Array | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Run steps and sum their metrics; the first bad one is undone and is the last.

    A step is bad if its loss, a gradient, the sum of a metric up to it, or anything in the state
    that it leaves is not finite. What the devices hold is therefore finite at any time, and what is
    saved of it too.

    Args:
        step: what to run.
        first: int32[], number of the first step.
        count: int32[], how many; the program is the same for any number.
        state: before the first.
        zeros: the metrics' sums before the first.
        bad: int32[], a bad step of an earlier call, after which nothing is run, or -1.

    Returns:
        The state, and the sums with `bad_step`, int32[], -1 where there was none.
    """

    def goes_on(carry: tuple[Any, ...]) -> jax.Array:
        offset, _, _, bad = carry
        return (offset < count) & (bad < 0)

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        offset, state, sums, _ = carry
        new, metrics, finite = step(first + offset, state)
        sums = {name: sums[name] + metrics[name] for name in sums}
        good = finite & all_finite(sums) & all_finite(new)
        kept = jax.tree.map(lambda after, before: jnp.where(good, after, before), new, state)
        return offset + 1, kept, sums, jnp.where(good, jnp.int32(-1), first + offset)

    start = (jnp.int32(0), state, zeros, jnp.int32(-1) if bad is None else bad)
    _, state, sums, bad = lax.while_loop(goes_on, body, start)
    return state, {**sums, "bad_step": bad}
