"""What every strategy's networks have on the devices: the data, and what is compiled."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from cpnas_jax.config_rules import check_fits_images
from cpnas_jax.data.datasets import Split, channel_statistics
from cpnas_jax.data.examples import Examples
from cpnas_jax.models import supernet
from cpnas_jax.models.binarize import Binarizer
from cpnas_jax.models.operations import OperationSettings
from cpnas_jax.path_optimizer import OptimizerSettings
from cpnas_jax.runtime import environment
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.memory import check_memory, exhaustion_explained
from cpnas_jax.runtime.parallel import Program, bytes_a_device, replicate
from cpnas_jax.runtime.shards import Shards
from cpnas_jax.search_step import StepSettings


def supernet_settings(
    config: config_dict.ConfigDict, num_classes: int, shards: Shards
) -> supernet.SupernetSettings:
    """Return the supernet of a config, whose batches are divided into `shards`."""
    search = config.search
    return supernet.SupernetSettings(
        cells=search.cells,
        channels=search.channels,
        reductions=tuple(search.reductions),
        num_classes=num_classes,
        operations=OperationSettings(
            binarizer=Binarizer(**config.binarizer.to_dict()),
            formulation=config.runtime.formulation,
            separable_repeats=search.separable_repeats,
            binary_preprocess=search.binary_preprocess,
            statistics=shards.statistics(config.runtime.synchronise_statistics),
        ),
    )


_KNOBS = (
    "config.search.channels, config.search.cells, config.search.batch_size, the number of "
    "config.search.reductions or the size of the images, or use more devices"
)


def _num_scored(config: config_dict.ConfigDict, validation: Split) -> int:
    """Return how many images of the validation part are scored, the first ones."""
    search, every = config.search, len(validation.labels)
    # Scored architectures must cost little beside trained ones.
    usual = min(search.plus_score_examples, every) if search.strategy == "cp_plus" else every
    return search.score_examples or usual


def _check_sizes(
    config: config_dict.ConfigDict, train: Split, validation: Split, num_shards: int
) -> None:
    """Compare the config's sizes with those of the data.

    Raises:
        UserError: one is too large; its key is named.
    """
    search = config.search
    if search.score_examples > len(validation.labels):
        raise UserError(
            f"config.search.score_examples is {search.score_examples}; the validation part has "
            f"only {len(validation.labels)} images, which 0 uses all"
        )
    scored = _num_scored(config, validation)
    if search.score_batch_size > -(-scored // num_shards) * num_shards:
        raise UserError(
            f"config.search.score_batch_size is {search.score_batch_size}; only {scored} images "
            "are scored"
        )
    padding = config.dataset.crop_padding
    check_fits_images("config.dataset.crop_padding", padding, train.images.shape[1:])


class SearchDevices:
    """The data on the devices, and what is compiled for them; the states are a subclass' own."""

    def __init__(
        self,
        config: config_dict.ConfigDict,
        train: Split,
        validation: Split,
        started: float,
        shards: Shards,
    ) -> None:
        """Look at the sizes; nothing is compiled or placed yet.

        Args:
            config: validated.
            train: training part.
            validation: scoring part.
            started: `time.monotonic()` when the run began, for the time to the first step.
            shards: of every batch.

        Raises:
            UserError: sizes of the config that the data do not allow.
        """
        search = config.search
        self._shards = shards
        self.steps_per_epoch = len(train.labels) // search.batch_size
        if not self.steps_per_epoch:
            raise UserError(
                f"config.search.batch_size is {search.batch_size}; the training part has only "
                f"{len(train.labels)} images"
            )
        _check_sizes(config, train, validation, shards.count)
        self._seed = config.seed
        self._compiler_options = environment.compiler_options(config.runtime.optimization_level)
        self._steps_per_call = config.runtime.steps_per_call
        self._key = np.asarray(jax.random.key_data(jax.random.key(config.seed)))
        self._settings = supernet_settings(config, train.num_classes, shards)
        self._image_shape = train.images.shape[1:]
        self._step = StepSettings(
            supernet=self._settings,
            batch_size=search.batch_size,
            shards=shards,
            crop_padding=config.dataset.crop_padding,
            flip=config.dataset.flip,
            steps_per_epoch=self.steps_per_epoch,
        )
        self._programs: dict[str, Any] = {}
        self.compile_seconds = {"train": 0.0, "score": 0.0}
        self._examples: dict[str, Examples] = {}
        self._num_scored = _num_scored(config, validation)
        self._states: dict[str, Any] = {}
        self._started = started
        self.first_step_seconds: float | None = None

    def _optimizer_settings(self, search: config_dict.ConfigDict, epochs: int) -> OptimizerSettings:
        return OptimizerSettings(
            learning_rate=search.learning_rate,
            child_learning_rate=search.child_learning_rate,
            child_optimizer=search.child_optimizer,
            momentum=search.momentum,
            weight_decay=search.weight_decay,
            gradient_clip=search.gradient_clip,
            total_steps=epochs * self.steps_per_epoch,
        )

    def _check_weights(self, init: Callable[[jax.Array], Any], copies: int) -> None:
        """Refuse a supernet whose weights alone do not fit, before anything of it is made.

        Args:
            init: key -> the weights of a model.
            copies: of them that a device holds: weights, moments and gradients of all models.

        Raises:
            UserError: they take more memory than a device has.
        """
        shapes = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
        weights = sum(4 * leaf.size for leaf in jax.tree.leaves(shapes))
        check_memory({"weights and optimizers": copies * weights}, _KNOBS)

    def _place(self, train: Split, validation: Split) -> None:
        """Put both parts on the devices."""
        mean, std = channel_statistics(train.images)
        self._examples = {
            name: replicate(Examples(part.images, part.labels, mean, std))
            for name, part in (("train", train), ("validation", validation))
        }

    def _compile_training(self, function: Any, *arguments: Any) -> None:
        """Compile the training program.

        Raises:
            UserError: it needs more memory than a device has.
        """
        with exhaustion_explained(_KNOBS):
            self._compiled("train", function, *arguments)
        check_memory(self.memory_bytes(), _KNOBS)

    def _compiled(self, name: str, function: Any, *arguments: Any) -> Any:
        if name not in self._programs:
            before = time.monotonic()
            self._programs[name] = Program(function, arguments, self._compiler_options)
            self.compile_seconds[name] = time.monotonic() - before
        return self._programs[name]

    def memory_bytes(self) -> dict[str, int]:
        """Estimate what a device holds: states, data, and what the training program needs."""
        return {
            "weights and optimizers": bytes_a_device(self._states),
            "data": bytes_a_device(self._examples),
            "training program": self._programs["train"].temporary_bytes(),
        }

    def _steps_of_call(self, first: int, epoch: int) -> int:
        """Return how many steps the call that begins at a step of an epoch has.

        Calls end at the same steps wherever a run was interrupted: sums over a call are rounded.
        """
        if not first and not epoch:
            return 1  # one step alone, to say when training began
        count = self._steps_per_call - first % self._steps_per_call
        return min(count, self.steps_per_epoch - first)

    def _note_first_step(self) -> None:
        if self.first_step_seconds is None:
            self.first_step_seconds = time.monotonic() - self._started
