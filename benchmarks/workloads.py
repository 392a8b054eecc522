"""The package's own programs of the CIFAR-10 search and the ImageNet training, and their costs.

They are built from the configs as the package builds them, for any number of devices, with shapes
in place of images and weights. The operations' form is the one that the package takes on a TPU.
"""

import contextlib
import dataclasses
import time
from unittest import mock

import jax
import numpy as np
from config_files import load_config
from ml_collections import config_dict

from cpnas_jax import search_networks, search_step, train_step, trainer
from cpnas_jax.architecture.named import named_genotype
from cpnas_jax.architecture.sampling import SHAPE
from cpnas_jax.data.datasets import Split
from cpnas_jax.data.examples import Examples
from cpnas_jax.feed import Facts
from cpnas_jax.models.space import CHILD
from cpnas_jax.network_config import network_settings
from cpnas_jax.runtime.costs import Cost, program_cost
from cpnas_jax.runtime.parallel import AXIS
from cpnas_jax.train_step import TrainCall, make_batch_step, make_stream_call

CIFAR_IMAGES, CIFAR_CLASSES, CIFAR_SHAPE = 50_000, 10, (32, 32, 3)
IMAGENET_IMAGES, IMAGENET_CLASSES = 1_281_167, 1000


@dataclasses.dataclass(frozen=True)
class Work:
    """What one step asks of a device.

    Attributes:
        step: of training.
        state_bytes: weights and whatever else the step reads and writes again.
        score: of scoring an architecture once, or None.
    """

    step: Cost
    state_bytes: int
    score: Cost | None = None


def _shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _of_one_device(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree)


def _num_bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@contextlib.contextmanager
def _good_steps(devices: int):
    """See so many devices, and updates without the condition that every good step fulfils."""
    with (
        mock.patch.object(jax, "device_count", return_value=devices),
        mock.patch.object(search_step, "unless_bad", _updated),
        mock.patch.object(train_step, "unless_bad", _updated),
    ):
        yield


def _updated(finite, update, state):
    del finite, state
    return update()


def full_config(name: str, mode: str) -> config_dict.ConfigDict:
    """Return the config of a file in `configs/`, in the form for TPUs."""
    config = load_config(f"configs/{name}.py:{mode}")
    config.runtime.formulation = "native"
    return config


def search_work(config: config_dict.ConfigDict, devices: int) -> Work:
    """Return what a step of the search, and scoring, cost each of so many devices."""
    scored = round(CIFAR_IMAGES * config.search.validation_fraction)

    def part(count: int) -> Split:
        names = tuple(map(str, range(CIFAR_CLASSES)))
        labels = np.zeros(count, np.int32)
        return Split(
            np.zeros((count, *CIFAR_SHAPE), np.uint8), labels, CIFAR_CLASSES, names, "cifar10"
        )

    def unmapped(function):
        return function

    with (
        _good_steps(devices),
        mock.patch.multiple(search_networks, pmap_donated=unmapped, pmap_kept=unmapped),
    ):
        networks = search_networks.Networks(
            config, part(CIFAR_IMAGES - scored), part(scored), 1, time.monotonic()
        )
        model = jax.eval_shape(networks._initial_model, _key())
        call = _of_one_device(networks._call(CHILD, np.zeros((1, *SHAPE), np.int32), 0, 0, 1))
        examples = {name: _of_one_device(own) for name, own in networks._examples.items()}
        axis = (AXIS, devices)
        return Work(
            step=program_cost(networks._train, model, examples["train"], call, axis=axis),
            state_bytes=_num_bytes(model),
            score=program_cost(
                networks._score, model.params, examples["validation"], call, axis=axis
            ),
        )


class _NoFeed:
    """Facts without data."""

    def __init__(self, config: config_dict.ConfigDict) -> None:
        size = config.dataset.image_size
        names = tuple(map(str, range(IMAGENET_CLASSES)))
        self.facts = Facts("imagenet2012", (size, size, 3), IMAGENET_IMAGES, 50_000, names)

    def device_bytes(self) -> int:
        """Return nothing: batches are small."""
        return 0

    def place(self) -> None:
        """Place nothing."""


def training_work(config: config_dict.ConfigDict, genotype: str, devices: int) -> Work:
    """Return what a step of training a published genotype costs each of so many devices."""
    feed = _NoFeed(config)
    with _good_steps(devices):
        settings = network_settings(config, named_genotype(genotype), IMAGENET_CLASSES, binary=True)
        own = trainer.Trainer(config, settings, feed)
        step_settings = own._step_settings(False)
        step = make_batch_step(step_settings, own._optimizer, own._parent_optimizer)
        state = jax.eval_shape(own._make_state, _key(), _key())
        number = jax.ShapeDtypeStruct((), np.int32)
        key = jax.ShapeDtypeStruct((2,), np.uint32)
        call = TrainCall(number, number, number, number, number, key)
        count = config.train.batch_size // devices
        statistics = jax.ShapeDtypeStruct((3,), np.float32)
        batch = Examples(
            jax.ShapeDtypeStruct((count, *feed.facts.image_shape), np.uint8),
            jax.ShapeDtypeStruct((count,), np.int32),
            statistics,
            statistics,
        )
        function = make_stream_call(step_settings, step)
        cost = program_cost(function, state, batch, call, number, axis=(AXIS, devices))
    return Work(step=cost, state_bytes=_num_bytes(state))


def _key():
    return jax.eval_shape(lambda: jax.random.key(0))
