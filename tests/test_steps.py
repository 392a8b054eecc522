"""Steps up to the first that is not finite: what is told, and what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpnas_jax.steps import all_finite, steps_until_bad, unless_bad

ZEROS = {"loss": jnp.float32(0)}


def run(losses, updates, first=3, count=4, bad=None):
    """Add `updates` to a weight of 1 by a step, counted from 3, each of a loss."""

    def step(number, state):
        loss = jnp.asarray(losses, jnp.float32)[number - 3]
        update = jnp.asarray(updates, jnp.float32)[number - 3]
        finite = all_finite(loss)
        new = unless_bad(finite, lambda: (state[0] + update, state[1] + 1), state)
        return new, {"loss": loss}, finite

    program = jax.jit(lambda *numbers: steps_until_bad(step, *numbers, state, ZEROS, bad))
    state = (jnp.float32(1), jnp.int32(0))
    state, found = program(jnp.int32(first), jnp.int32(count))
    return float(state[0]), int(state[1]), float(found["loss"]), int(found["bad_step"])


def test_good_steps_add_up():
    assert run([1, 2, 3, 4], [1, 1, 1, 1]) == (5, 4, 10, -1)
    assert run([1, 2, 3, 4], [1, 1, 1, 1], first=4, count=2) == (3, 2, 5, -1)
    assert run([1, 2, 3, 4], [1, 1, 1, 1], count=0) == (1, 0, 0, -1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_step_changes_nothing_and_is_the_last(value):
    weight, steps, _, bad = run([1, value, 3, 4], [1, 1, 1, 1])
    assert (weight, steps, bad) == (2, 1, 4)


def test_a_sum_that_is_not_finite_is_bad():
    assert run([3e38, 3e38, 1, 1], [1, 1, 1, 1])[3] == 4


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_told_where_a_call_ends(value):
    """Before another step is begun, or anything is saved."""
    assert run([1, 1, 1, 1], [1, value, 1, 1], count=2)[3] == 4
    assert run([1, 1, 1, 1], [1, value, 1, 1], count=1)[3] == -1


def test_nothing_is_run_after_a_bad_step_of_an_earlier_call():
    assert run([1, 2, 3, 4], [1, 1, 1, 1], bad=jnp.int32(2)) == (1, 0, 0, 2)


def test_integers_are_always_finite():
    assert bool(all_finite({"a": jnp.int32(1), "b": jax.random.key(0), "c": jnp.float32(1)}))
    assert not bool(all_finite({"a": jnp.int32(1), "c": jnp.asarray([1, jnp.nan], jnp.float32)}))
