"""A step of a search that is not finite is named with its layer, on eight devices."""

import time

import numpy as np
import pytest
from injected import with_value

from cpnas_jax import config as configs
from cpnas_jax.data.datasets import Split
from cpnas_jax.models.space import CHILD, EDGES, OPERATIONS, PARENT
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.search_networks import EpochSums, Networks

CHOSEN = {(0, 2): "dil_conv_3x3", (2, 4): "skip_connect"}
ARCHITECTURE = np.array(
    [[[OPERATIONS.index(CHOSEN.get(edge, "none")) for edge in EDGES]] * 2], np.int32
)


def part(n):
    generator = np.random.default_rng(n)
    images = generator.integers(0, 256, (n, 8, 8, 1)).astype(np.uint8)
    return Split(images, generator.integers(0, 3, n).astype(np.int32), 3, tuple("abc"), "greys")


@pytest.fixture(scope="module")
def networks():
    config = configs.base_config()
    config.search.update(cells=1, channels=2, reductions=(), batch_size=8, score_batch_size=8)
    config.search.update(operations=("none", "skip_connect", "dil_conv_3x3"))
    config.dataset.crop_padding = 1
    config.runtime.update(optimization_level=0, steps_per_call=4)
    networks = Networks(config, part(40), part(16), 4, time.monotonic())
    networks.first_step_seconds = 0.0
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
