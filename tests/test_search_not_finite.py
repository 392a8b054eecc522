"""A step of a search that is not finite is named with its layer, on eight devices."""

import numpy as np
import pytest
from injected import with_value
from one_cell_supernet import networks_of

from cpnas_jax.models.space import CHILD, EDGES, OPERATIONS, PARENT
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.search_networks import EpochSums

CHOSEN = {(0, 2): "dil_conv_3x3", (2, 4): "skip_connect"}
ARCHITECTURE = np.array(
    [[[OPERATIONS.index(CHOSEN.get(edge, "none")) for edge in EDGES]] * 2], np.int32
)


@pytest.fixture(scope="module")
def networks():
    networks = networks_of()
    return networks, networks.initial_state()


@pytest.mark.parametrize(
    ("model", "name", "value", "layer"),
    [
        (CHILD, "cells/0/preprocess1/conv/kernel", np.nan, "an update left cell 0 (normal), "
         "preprocessing of input 1, conv kernel that is not"),
        (PARENT, "stem/kernel", 3e38, "the first output that is not is that of stem, conv 0"),
        (PARENT, "classifier/bias", (3e38, 3e38, -3e38), "the outputs are, the cross-entropy is "
         "not"),
    ],
)  # fmt: skip
def test_the_layer_is_named(networks, model, name, value, layer):
    networks, states = networks
    networks.load({**states, model: with_value(states[model], name, value)})
    sums = EpochSums(steps=1)
    with pytest.raises(UserError) as caught:
        networks.train(model, ARCHITECTURE, 2, sums)
    key = "child_learning_rate" if model == CHILD else "learning_rate"
    assert str(caught.value) == (
        f"the loss of the {model}, its gradient or the update is not finite in step 2 of sampled "
        f"epoch 3; {layer}. Try a smaller config.search.{key} in a new workdir"
    )
    assert sums == EpochSums(steps=1)


def test_good_states_go_on(networks):
    networks, states = networks
    networks.load(states)
    for model in (CHILD, PARENT):
        sums = EpochSums()
        # The very first step of a search is a call of its own.
        networks.train(model, ARCHITECTURE, 1, sums)
        assert (sums.steps, np.isfinite(sums.loss)) == (4, True)
