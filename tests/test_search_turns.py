"""Epochs whose steps train architectures of their own, with real networks on eight devices."""

import jax
import numpy as np
import pytest
from injected import with_value
from one_cell_supernet import OFFERED, STEPS, networks_of

from cpnas_jax.models.space import EDGES, MODELS, OPERATIONS, PARENT
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.search_diagnosis import last_spoilt
from cpnas_jax.search_networks import EpochSums


@pytest.fixture(scope="module")
def turning():
    """Networks whose calls have four steps at most, so that the last one of an epoch has one."""
    networks = networks_of(takes_turns=True)
    return networks, networks.initial_state()


@pytest.fixture(scope="module")
def plain():
    return networks_of(steps_per_call=1)


@pytest.fixture
def turns():
    offered = np.array([OPERATIONS.index(name) for name in OFFERED], np.int32)
    return offered[np.random.default_rng(0).integers(0, len(OFFERED), (STEPS, 2, 14))]


NAME = "cells/0/edges/stride1/dil_conv_3x3/unit0/pointwise/kernel"


def only_in(turns, *steps):
    """Let some steps alone sample a convolution, on the edge from 0 to 2."""
    skip, conv = OPERATIONS.index("skip_connect"), OPERATIONS.index("dil_conv_3x3")
    turns[turns == conv] = skip
    for step in steps:
        turns[step, :, EDGES.index((0, 2))] = conv


@pytest.mark.parametrize("model", MODELS)
def test_they_are_steps_of_one_path_each(turning, plain, turns, model):
    turning, states = turning
    turning.load(states)
    plain.load(states)
    sums, own, calls = EpochSums(), EpochSums(), 0
    while sums.steps < STEPS:
        turning.train(model, turns, 2, sums)
        calls += 1
    while own.steps < STEPS:
        plain.train(model, turns[own.steps][None], 2, own)
    assert calls == 2
    np.testing.assert_allclose(sums.loss, own.loss, rtol=1e-6)
    found, expected = (jax.tree.leaves(networks.host_state()) for networks in (turning, plain))
    for leaf, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6)


def test_a_call_holds_no_more_paths_than_an_epoch_has_steps():
    networks = networks_of(steps_per_call=10**6, takes_turns=True)
    networks.load(networks.initial_state())
    assert networks._any_call().architecture.shape == (8, STEPS, 2, 14)


def test_the_path_of_the_step_that_is_not_finite_is_looked_at(turning, turns):
    turning, states = turning
    only_in(turns, 3)
    turning.load({**states, PARENT: with_value(states[PARENT], NAME, np.nan)})
    with pytest.raises(UserError, match=r"step 4 of sampled epoch 3; .*cell 0 .normal., edge 0->2"):
        turning.train(PARENT, turns, 2, EpochSums())


def test_an_update_that_no_later_step_uses_is_found(turning, turns):
    turning, states = turning
    # Its loss is finite, its update is not, and the third and fourth step sample others.
    only_in(turns, 1)
    state = states[PARENT]
    moments = jax.tree.map(
        lambda leaf: np.full_like(leaf, np.inf), state.optimizer[PARENT]["edges"]
    )
    optimizer = {**state.optimizer, PARENT: {**state.optimizer[PARENT], "edges": moments}}
    turning.load({**states, PARENT: state.replace(optimizer=optimizer)})
    words = r"step 2 of sampled epoch 3; an update left cell 0 .normal., edge 0->2 dil_conv_3x3"
    with pytest.raises(UserError, match=words):
        turning.train(PARENT, turns, 2, EpochSums())


@pytest.mark.parametrize(
    ("sampled", "name", "step"),
    [
        ((1, 2), NAME, 2),  # not the first that did
        ((1, 3), NAME, 3),  # met where it was found
        ((0, 4), NAME, 3),  # in no step of the call
        ((1,), "stem/kernel", 3),  # what every step uses
        ((1,), None, 3),  # a gradient, or the optimizer's state
    ],
)
def test_to_blame_is_the_last_step_that_sampled_it(turning, turns, sampled, name, step):
    networks, states = turning
    only_in(turns, *sampled)
    state = states[PARENT] if name is None else with_value(states[PARENT], name, np.inf)
    assert last_spoilt(networks._settings, state.params, turns, 1, 3) == step
