"""The programs of a search, lowered for the target they are meant for: one and eight TPUs."""

import time

import jax
import lowerings
import numpy as np
import pytest

from cpnas_jax import config as configs
from cpnas_jax.architecture.sampling import SHAPE
from cpnas_jax.data.datasets import Split
from cpnas_jax.models.space import CHILD
from cpnas_jax.search_networks import Networks

CLASSES = 5


def part(n, size):
    """Images of any content: nothing is computed."""
    labels = np.arange(n, dtype=np.int32) % CLASSES
    return Split(np.zeros((n, size, size, 3), np.uint8), labels, CLASSES, tuple("abcde"), "blank")


def small_config(child_optimizer):
    """Both kinds of cells, both strides, all operations."""
    config = configs.base_config()
    config.dataset.crop_padding = 1
    config.search.update(cells=2, channels=4, reductions=(1,))
    config.search.update(batch_size=16, score_batch_size=16, child_optimizer=child_optimizer)
    return config


def check_search(patch, config, image_size, channels, takes_turns=False):
    config.runtime.formulation = lowerings.formulation_on_tpus(patch)
    size = config.search.batch_size
    networks = Networks(
        config,
        part(3 * size, image_size),
        part(2 * size + 5, image_size),
        4,
        time.monotonic(),
        takes_turns=takes_turns,
    )
    model = jax.eval_shape(networks._initial_model, jax.eval_shape(lambda: jax.random.key(0)))
    state = lowerings.on_devices(model)
    arguments = (state, networks._examples["train"], networks._any_call())
    train = lowerings.lowered_for_tpu(networks._train, *arguments)
    lowerings.check_program(train)
    assert "stablehlo.case" in train.mlir_module()  # the choice is left to the device
    lowerings.check_gradients(train, model.params)
    lowerings.check_depthwise(train, channels, backward=True)
    if jax.device_count() == 1:
        return
    # Other lowerings, so not on each number of devices.
    lowerings.check_donated(networks._train, *arguments)

    call = networks._call(CHILD, np.zeros((1, *SHAPE), np.int32), 0, 0, 0)
    score = lowerings.lowered_for_tpu(
        networks._score, state.params, networks._examples["validation"], call
    )
    lowerings.check_program(score)
    lowerings.check_depthwise(score, channels, backward=False)


# The child's optimizer is that of the parent, or another; a path is trained for a step, or longer.
@pytest.mark.parametrize(
    ("devices", "child_optimizer", "takes_turns"), [(1, "sgd", False), (8, "adam", True)]
)
def test_a_search_lowers_for_tpu(monkeypatch, devices, child_optimizer, takes_turns):
    lowerings.use_devices(monkeypatch, devices)
    check_search(monkeypatch, small_config(child_optimizer), 8, {4, 8}, takes_turns)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_the_search_of_the_config_lowers_for_tpu(monkeypatch, devices):
    lowerings.use_devices(monkeypatch, devices)
    check_search(monkeypatch, configs.base_config(), 32, {16, 32, 64})
