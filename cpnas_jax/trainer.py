"""A network in final training: its state, its programs and its data on the devices."""

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import config_dict

from cpnas_jax import evaluate, train_optimizer
from cpnas_jax.config_rules import check_fits_images
from cpnas_jax.data.order import weights_key
from cpnas_jax.diagnosis import NotFinite, explained, once
from cpnas_jax.feed import Feed
from cpnas_jax.models import losses, network
from cpnas_jax.models.blocks import Levers
from cpnas_jax.models.network import Network, NetworkSettings
from cpnas_jax.runtime import environment
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.interruptions import stop_wished
from cpnas_jax.runtime.memory import check_memory, describe, exhaustion_explained
from cpnas_jax.runtime.parallel import Program, replicate, to_host
from cpnas_jax.runtime.shards import Shards
from cpnas_jax.train_diagnosis import bad_layer
from cpnas_jax.train_step import (
    LOSS_TERMS,
    BatchStep,
    LossSettings,
    StepSettings,
    TrainCall,
    TrainState,
    make_batch_step,
)

CHILD_KEY, FLOAT_KEY, SIDE_KEY = range(16, 19)
"""Numbers of the models in `weights_key`; those of the search are below."""

_KNOBS = (
    "config.train.batch_size, config.network.channels, config.network.cells or the size of the "
    "images, set config.network.recompute=True, or use more devices"
)
_EVALUATION_KNOBS = "config.evaluate.batch_size"


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass
class EpochSums:
    """Sums of metrics over the steps of an epoch that were done.

    Attributes:
        steps: how many.
        values: metric -> sum.
        seconds: spent on them.
    """

    steps: int = 0
    values: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    def add(self, steps: int, values: dict[str, float], seconds: float) -> None:
        """Take in what a call returned."""
        self.steps += steps
        self.seconds += seconds
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Return metric -> mean over the steps."""
        return {name: value / self.steps for name, value in self.values.items()}


class Trainer:
    """A child or a float network with everything that is compiled or lives on a device."""

    def __init__(
        self,
        config: config_dict.ConfigDict,
        settings: NetworkSettings,
        feed: Feed,
    ) -> None:
        """Place the data on the devices; nothing is compiled yet.

        Args:
            config: validated.
            settings: of `network_settings`.
            feed: the data.

        Raises:
            UserError: sizes of the config that the data or the memory do not allow.
        """
        self._config, self._settings, self._feed = config, settings, feed
        options, facts = config.train, feed.facts
        self.steps_per_epoch = facts.num_train // options.batch_size
        if not self.steps_per_epoch:
            raise UserError(
                f"config.train.batch_size is {options.batch_size}; the training split has only "
                f"{facts.num_train} images"
            )
        for name in ("crop_padding", "cutout"):
            check_fits_images(f"config.dataset.{name}", config.dataset[name], facts.image_shape)
        self.total_steps = options.epochs * self.steps_per_epoch
        self._shards = Shards(jax.device_count(), config.runtime.deterministic)
        self._compiler_options = environment.compiler_options(config.runtime.optimization_level)
        self._image_shape = facts.image_shape
        self._key = np.asarray(jax.random.key_data(jax.random.key(config.seed)))
        # H of a float network would be its own reconstruction.
        self._loss = LossSettings(
            label_smoothing=options.label_smoothing,
            auxiliary_weight=options.auxiliary_weight,
            reconstruction_weight=options.reconstruction_weight if settings.binary else 0.0,
            center_weight=options.center_weight if settings.binary else 0.0,
            parent_kernel=options.parent_kernel and settings.binary,
        )
        self._optimizer = self._make_optimizer(settings.binary)
        self._parent_optimizer = self._make_optimizer(False)
        self._programs: dict[Any, Any] = {}
        self.compile_seconds = 0.0
        check_memory(self._fixed_bytes(), _KNOBS)
        feed.place()
        self._state: TrainState

    def _make_optimizer(self, binary: bool) -> optax.GradientTransformation:
        options = self._config.train
        params = self._shapes(binary)["params"]
        kernels = jax.tree_util.tree_map_with_path(
            lambda path, _: losses.is_binary_kernel(path, self._config.network.binary_preprocess),
            params,
        )
        return train_optimizer.make_optimizer(
            "adam" if binary else "sgd",
            self._rate(binary),
            momentum=options.momentum,
            weight_decay=options.weight_decay if binary else options.float_weight_decay,
            gradient_clip=options.gradient_clip,
            binary_kernels=kernels,
        )

    @property
    def precision(self) -> str:
        """Say whether the network is `binary` or `float`, as `network.precision` does."""
        return "binary" if self._settings.binary else "float"

    def _rate(self, binary: bool) -> train_optimizer.RateSettings:
        options = self._config.train
        rate = train_optimizer.peak_rate(
            options.learning_rate if binary else options.float_learning_rate,
            options.batch_size,
            options.reference_batch,
        )
        return train_optimizer.RateSettings(
            rate, options.warmup_epochs * self.steps_per_epoch, self.total_steps
        )

    def _network(self, binary: bool) -> NetworkSettings:
        if binary == self._settings.binary:
            return self._settings
        plain = dataclasses.replace(self._settings.operations, levers=Levers())
        return dataclasses.replace(self._settings, binary=binary, operations=plain)

    def _initial(self, key: jax.Array, binary: bool) -> Any:
        return network.init(key, self._network(binary), self._image_shape)

    def _shapes(self, binary: bool) -> Any:
        key = jax.eval_shape(lambda: jax.random.key(0))
        return jax.eval_shape(lambda key: self._initial(key, binary), key)

    def initial_state(self) -> TrainState:
        """Return the state before the first step, in host memory."""
        key = jax.random.key(self._config.seed)
        own = CHILD_KEY if self._settings.binary else FLOAT_KEY
        make = jax.jit(self._make_state, compiler_options=self._compiler_options)
        return jax.device_get(make(weights_key(key, own), weights_key(key, SIDE_KEY)))

    def _make_state(self, key: jax.Array, side: jax.Array) -> TrainState:
        variables = self._initial(key, self._settings.binary)
        params = variables["params"]
        parent = average = None
        if self._loss.parent_kernel:
            beside = self._initial(side, False)
            parent = {**beside, "optimizer": self._parent_optimizer.init(beside["params"])}
        if self._config.train.average_decay:
            # A sum, not the same arrays: a state is donated, and nothing twice.
            average = jax.tree.map(lambda leaf: leaf + 0, variables)
        return TrainState(
            params=params,
            batch_stats=variables["batch_stats"],
            optimizer=self._optimizer.init(params),
            average=average,
            means=self._initial_means(),
            parent=parent,
            step=jnp.zeros((), jnp.int32),
        )

    def _initial_means(self) -> jax.Array | None:
        if not self._loss.center_weight:
            return None
        shapes = self._shapes(self._settings.binary)
        images = jax.ShapeDtypeStruct((1, *self._image_shape), jnp.float32)
        outputs = jax.eval_shape(
            lambda variables, images: Network(self._settings).apply(variables, images, train=False),
            shapes,
            images,
        )
        return jnp.zeros((self._settings.num_classes, *outputs.features.shape[1:]))

    def load(self, state: TrainState) -> None:
        """Put a state on the devices."""
        self._state = replicate(state)

    def host_state(self) -> TrainState:
        """Return the state as numpy arrays."""
        return to_host(self._state)

    def host_variables(self) -> Any:
        """Return what is evaluated, {"params", "batch_stats"}, as numpy arrays."""
        return to_host(self._variables())

    def real_weights(self, epoch: int) -> bool:
        """Tell whether an epoch belongs to the first part of two-step training."""
        return self._settings.binary and epoch < self._config.train.real_weights_epochs

    def _train_program(self, epoch: int) -> Any:
        real = self.real_weights(epoch)
        settings = self._step_settings(real)
        step = make_batch_step(settings, self._optimizer, self._parent_optimizer)
        return self._feed.program(self._compiled, ("train", real), settings, step, self._state)

    def _step_settings(self, real_weights: bool) -> StepSettings:
        options, dataset = self._config.train, self._config.dataset
        operations = dataclasses.replace(
            self._settings.operations,
            binary_weights=not real_weights,
            statistics=self._shards.statistics(self._config.runtime.synchronise_statistics),
        )
        return StepSettings(
            network=dataclasses.replace(self._settings, operations=operations),
            loss=self._loss,
            drop_path=self._config.network.drop_path,
            average_decay=options.average_decay,
            batch_size=options.batch_size,
            shards=self._shards,
            crop_padding=dataset.crop_padding,
            flip=dataset.flip,
            color_jitter=dataset.color_jitter,
            cutout=dataset.cutout,
            total_steps=self.total_steps,
        )

    def _compiled(self, name: Any, make: Any, *arguments: Any) -> Any:
        if name not in self._programs:
            before = time.monotonic()
            self._programs[name] = Program(make(), arguments, self._compiler_options)
            self.compile_seconds += time.monotonic() - before
        return self._programs[name]

    def compile(self, first: int, last: int) -> None:
        """Compile the programs of a range of epochs; two-step training has two of a kind.

        Evaluation is among them: an epoch would be lost if it failed for the first time after one.

        Raises:
            UserError: one needs more memory than a device has.
        """
        for epoch in (first, last):
            with exhaustion_explained(_KNOBS):
                self._train_program(epoch)
        check_memory(self.memory_bytes("train"), _KNOBS)
        for epoch in (first, last):
            self.compile_evaluation(epoch)

    def compile_evaluation(self, epoch: int) -> None:
        """Compile the program of `evaluate`.

        Raises:
            UserError: it needs more memory than a device has.
        """
        with exhaustion_explained(_EVALUATION_KNOBS):
            self._counting_program(epoch)
        check_memory(self.memory_bytes("evaluate"), _EVALUATION_KNOBS)

    def compiled_text(self, kind: str) -> str:
        """Say how long compiling took and what the programs of a kind need of a device."""
        return (
            f"Compiled in {self.compile_seconds:.1f} s; estimated memory of a device: "
            f"{describe(self.memory_bytes(kind))}."
        )

    def _fixed_bytes(self) -> dict[str, int]:
        """Return what a device holds whatever the program needs."""
        state = jax.eval_shape(self._make_state, *[jax.eval_shape(lambda: jax.random.key(0))] * 2)
        means = _num_bytes(state.means)
        return {
            "weights and optimizer": _num_bytes(state) - means,
            "class means": means,
            "data": self._feed.device_bytes(),
        }

    def memory_bytes(self, kind: str) -> dict[str, int]:
        """Estimate what a device holds: state, data, and what the programs of a kind need.

        Args:
            kind: `train` or `evaluate`; compiled before.
        """
        needed = max(
            program.temporary_bytes() for (own, _), program in self._programs.items() if own == kind
        )
        name = {"train": "training program", "evaluate": "evaluation program"}[kind]
        return {**self._fixed_bytes(), name: needed}

    def train(self, epoch: int, first_step: int, num_steps: int, sums: EpochSums) -> bool:
        """Run some steps of an epoch and add their metrics to `sums`.

        Returns:
            Whether the run was asked to stop, in any process.

        Raises:
            NotFinite: the loss, its gradient or the update is; nothing saved is lost.
            UserError: a device's memory is exhausted.
        """
        before = time.monotonic()
        call = self._call(epoch, first_step, num_steps)
        program = self._train_program(epoch)
        with exhaustion_explained(_KNOBS):
            self._state, host = self._feed.train(program, self._state, call)
        if int(host["bad_step"]) >= 0:
            keys = ["config.train.learning_rate"] * self._settings.binary
            # The gradients of a float parent beside the child are looked at too.
            if not self._settings.binary or self._loss.parent_kernel:
                keys.append("config.train.float_learning_rate")
            step = int(host["bad_step"])
            raise NotFinite(
                f"the loss, its gradient or the update is not finite in step {step + 1} of "
                f"epoch {epoch + 1}",
                explained(lambda: self._bad_layer(epoch, step)),
                f"Try a smaller {' or '.join(keys)} in a new workdir",
            )
        values = {name: float(host[name]) for name in ("loss", *LOSS_TERMS, "accuracy")}
        assert all(map(math.isfinite, values.values()))
        sums.add(num_steps, values, time.monotonic() - before)
        return host["stop"] > 0

    def _call(self, epoch: int, first_step: int, num_steps: int) -> TrainCall:
        return TrainCall(
            epoch=np.asarray(epoch, np.int32),
            first_step=np.asarray(first_step, np.int32),
            num_steps=np.asarray(num_steps, np.int32),
            stop=np.asarray(stop_wished(), np.int32),
            passes=np.asarray(self._shards.passes, np.int32),
            key=self._key,
        )

    def _bad_layer(self, epoch: int, number: int) -> str | None:
        """Run a bad step again from the state before it, and say which layer makes it so."""
        start = self.host_state()

        def repeat(settings: StepSettings, step: BatchStep) -> tuple[Any, Any]:
            state = replicate(start)
            program = self._feed.program(
                self._compiled, ("diagnosis", "watched"), settings, step, state, once
            )
            state, found = self._feed.train(program, state, self._call(epoch, number, 1))
            return to_host(state), found

        settings = self._step_settings(self.real_weights(epoch))
        return bad_layer(settings, start, repeat)

    def learning_rate(self, step: int) -> float:
        """Return the rate of a step."""
        schedule = train_optimizer.learning_rate(self._rate(self._settings.binary))
        with jax.numpy_dtype_promotion("standard"):
            return float(schedule(step))

    def evaluate(self, epoch: int) -> evaluate.Evaluation:
        """Count the answers on the split to evaluate, with the moving average where there is one.

        Args:
            epoch: the last that was trained, from 0; in the first part of two-step training the
                network has real weights.

        Raises:
            UserError: it needs more memory than a device has, or the answers are not finite.
        """
        batch = self._config.evaluate.batch_size
        with exhaustion_explained(_EVALUATION_KNOBS):
            counts = self._feed.count(self._counting_program(epoch), batch, self._variables())
        return evaluate.evaluation(counts)

    def undecodable(self) -> dict[str, list[int]]:
        """Return split -> examples that the feed skipped; every process must call it."""
        return self._feed.undecodable()

    def met_before(self, undecodable: dict[str, list[int]]) -> None:
        """Count examples that were skipped before a resumption."""
        self._feed.met_before(undecodable)

    def _variables(self) -> Any:
        state = self._state
        return state.average or {"params": state.params, "batch_stats": state.batch_stats}

    def _counting_program(self, epoch: int) -> Any:
        settings = self._step_settings(self.real_weights(epoch)).network
        batch = self._config.evaluate.batch_size
        return self._feed.counting_program(self._compiled, settings, batch, self._variables())
