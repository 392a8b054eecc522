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


def unless_bad(finite: jax.Array, update: Callable[[], Any], state: Any) -> Any:
    """Return the state after an update, or the one before if loss or gradients are not finite.

    A branch, not a choice between two results: it takes neither time nor the memory of a second
    state.
    """
    return lax.cond(finite, update, lambda: state)


def steps_until_bad(
    step: Step,
    first: jax.Array,
    count: jax.Array,
    state: Any,
    zeros: dict[str, jax.Array],
    bad: jax.Array | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Run steps and sum their metrics; the first bad one is the last.

    A step is bad if its loss, a gradient, or the sum of a metric up to it is not finite. If the
    state is not after the last step, that one is called bad: an earlier update would show in the
    loss of the next, unless steps use different parts of the state (see `last_spoilt`).

    Args:
        step: what to run; it leaves the state as it was where loss or gradients are not finite.
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
        good = finite & all_finite(sums)
        return offset + 1, new, sums, jnp.where(good, jnp.int32(-1), first + offset)

    start = (jnp.int32(0), state, zeros, jnp.int32(-1) if bad is None else bad)
    _, state, sums, bad = lax.while_loop(goes_on, body, start)
    spoilt = (bad < 0) & ~all_finite(state)
    return state, {**sums, "bad_step": jnp.where(spoilt, first + count - 1, bad)}
