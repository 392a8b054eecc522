"""The child and the parent supernet on the devices: their state, programs, training and scoring."""

import functools
import time
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from cpnas_jax.architecture.sampling import SHAPE, num_paths
from cpnas_jax.config_rules import check_fits_images
from cpnas_jax.data.datasets import Split, channel_statistics
from cpnas_jax.data.examples import Examples
from cpnas_jax.data.order import weights_key
from cpnas_jax.diagnosis import NotFinite, explained, once
from cpnas_jax.models import supernet
from cpnas_jax.models.binarize import Binarizer
from cpnas_jax.models.operations import OperationSettings
from cpnas_jax.models.space import CHILD, MODELS, OPERATIONS
from cpnas_jax.path_optimizer import OptimizerSettings, PathOptimizer
from cpnas_jax.runtime import environment, processes
from cpnas_jax.runtime.costs import program_cost
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.interruptions import stop_wished
from cpnas_jax.runtime.memory import check_memory, exhaustion_explained
from cpnas_jax.runtime.parallel import (
    Program,
    bytes_a_device,
    local_positions,
    pmap_donated,
    pmap_kept,
    replicate,
    to_host,
)
from cpnas_jax.runtime.shards import Shards
from cpnas_jax.search_diagnosis import bad_layer
from cpnas_jax.search_state import EpochSums
from cpnas_jax.search_step import (
    Call,
    ModelState,
    PathLoss,
    StepSettings,
    make_score_call,
    make_train_call,
)


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


class Networks:
    """Both models with everything that is compiled or lives on a device."""

    def __init__(
        self,
        config: config_dict.ConfigDict,
        train: Split,
        validation: Split,
        sampled_epochs: int,
        started: float,
        models: tuple[str, ...] = MODELS,
    ) -> None:
        """Place the data on the devices; nothing is compiled yet.

        Args:
            config: validated.
            train: training part.
            validation: scoring part.
            sampled_epochs: after which the learning rate has come to 0; it begins anew then.
            started: `time.monotonic()` when the run began, for the time to the first step.
            models: those that are trained.

        Raises:
            UserError: sizes of the config that the data or the memory do not allow.
        """
        search = config.search
        devices, operations = jax.device_count(), len(search.operations)
        self.paths = num_paths(devices, operations) if search.parallel == "path" else 1
        self._shards = Shards(devices, config.runtime.deterministic, self.paths)
        self.steps_per_epoch = len(train.labels) // search.batch_size
        if not self.steps_per_epoch:
            raise UserError(
                f"config.search.batch_size is {search.batch_size}; the training part has only "
                f"{len(train.labels)} images"
            )
        _check_sizes(config, train, validation, self._shards.count)
        self._seed = config.seed
        self._compiler_options = environment.compiler_options(config.runtime.optimization_level)
        self._steps_per_call = config.runtime.steps_per_call
        self._key = np.asarray(jax.random.key_data(jax.random.key(config.seed)))
        self._settings = supernet_settings(config, train.num_classes, self._shards)
        self._image_shape = train.images.shape[1:]
        self._models, self._schedule = models, sampled_epochs
        total_steps = sampled_epochs * self.steps_per_epoch
        self._optimizer = PathOptimizer(
            OptimizerSettings(
                learning_rate=search.learning_rate,
                child_learning_rate=search.child_learning_rate,
                child_optimizer=search.child_optimizer,
                momentum=search.momentum,
                weight_decay=search.weight_decay,
                gradient_clip=search.gradient_clip,
                total_steps=total_steps,
            )
        )
        self._init = jax.jit(self._initial_model, compiler_options=self._compiler_options)
        self._check_memory()
        self._step = StepSettings(
            supernet=self._settings,
            batch_size=search.batch_size,
            shards=self._shards,
            crop_padding=config.dataset.crop_padding,
            flip=config.dataset.flip,
            steps_per_epoch=self.steps_per_epoch,
        )
        self._train = pmap_donated(make_train_call(self._step, self._optimizer))
        self._num_scored = _num_scored(config, validation)
        self._score = pmap_kept(
            make_score_call(self._settings, self._num_scored, search.score_batch_size, self._shards)
        )
        self._programs: dict[str, Any] = {}
        self.compile_seconds = {"train": 0.0, "score": 0.0}
        mean, std = channel_statistics(train.images)
        self._examples = {
            name: replicate(Examples(part.images, part.labels, mean, std))
            for name, part in (("train", train), ("validation", validation))
        }
        self._states: dict[str, ModelState] = {}
        self._started = started
        self.first_step_seconds: float | None = None

    def _check_memory(self) -> None:
        """Refuse a supernet whose weights alone do not fit, before anything of it is made."""
        shapes = jax.eval_shape(
            lambda key: supernet.init(key, self._settings, self._image_shape),
            jax.eval_shape(lambda: jax.random.key(0)),
        )
        weights = sum(4 * leaf.size for leaf in jax.tree.leaves(shapes))
        # Weights and momentum of all models, gradients of one.
        needed = (2 * len(self._models) + 1) * weights
        check_memory({"weights and optimizers": needed}, _KNOBS)

    def initial_state(self, draw: int = 0) -> dict[str, ModelState]:
        """Return the state of the models before the first epoch, in host memory.

        Args:
            draw: number of the draw; another one gives other weights.
        """
        key = jax.random.key(self._seed)
        return {
            name: jax.device_get(self._init(weights_key(key, draw * len(MODELS) + number)))
            for number, name in enumerate(MODELS)
            if name in self._models
        }

    def _initial_model(self, key: jax.Array) -> ModelState:
        params = supernet.init(key, self._settings, self._image_shape)
        return ModelState(params, self._optimizer.init(params))

    def load(self, states: dict[str, ModelState]) -> None:
        """Put the state of the models on the devices."""
        self._states = {name: replicate(states[name]) for name in self._models}

    def host_state(self) -> dict[str, ModelState]:
        """Return the state of the models as numpy arrays."""
        return {name: to_host(self._states[name]) for name in self._models}

    def compile(self) -> None:
        """Compile the training program; that of scoring follows at its first use.

        Raises:
            UserError: it needs more memory than a device has.
        """
        call = self._call(CHILD, np.zeros((1, *SHAPE), np.int32), 0, 0, 1)
        with exhaustion_explained(_KNOBS):
            self._compiled("train", self._train, self._states[CHILD], self._examples["train"], call)
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

    def flops(self, epochs: int, scored: int) -> float:
        """Return the operations of a device in a search, counted in the programs.

        Every operation of an edge counts as often as any other, as at the first stage.

        Args:
            epochs: sampled epochs, each trains and scores all models.
            scored: architectures that were only scored, by all models.
        """
        call = self._call(CHILD, np.zeros((1, *SHAPE), np.int32), 0, 0, 1)
        state = self._states[CHILD]
        # A loop over the steps counts as one of them.
        step = program_cost(self._train, state, self._examples["train"], call)
        score = program_cost(self._score, state.params, self._examples["validation"], call)
        trained = epochs * self.steps_per_epoch * step.flops
        return len(self._models) * (trained + (epochs + scored) * score.flops)

    def _call(
        self, model: str, architectures: np.ndarray, epoch: int, first_step: int, num_steps: int
    ) -> Call:
        """Return a call with each local device's own values along the first axis."""
        # A group without a path has `none` on every edge, and nothing to do.
        idle = np.full(SHAPE, OPERATIONS.index("none"), np.int32)
        stop = stop_wished()

        def of_device(position: int) -> Call:
            group = position // self._shards.group_size
            active = group < len(architectures)
            return Call(
                architecture=np.asarray(architectures[group], np.int32) if active else idle,
                active=np.asarray(active, np.float32),
                binary=np.asarray(model == CHILD),
                epoch=np.asarray(epoch + group, np.int32),
                rate_epoch=np.asarray(epoch % self._schedule, np.int32),
                first_step=np.asarray(first_step, np.int32),
                num_steps=np.asarray(num_steps, np.int32),
                stop=np.asarray(stop, np.int32),
                passes=np.asarray(self._shards.passes, np.int32),
                key=self._key,
            )

        return jax.tree.map(lambda *leaves: np.stack(leaves), *map(of_device, local_positions()))

    def train(self, model: str, architectures: np.ndarray, epoch: int, sums: EpochSums) -> bool:
        """Train one model for the next steps of a sampled epoch, in one call.

        Args:
            model: CHILD or PARENT.
            architectures: int32[n, 2, 14], n at most `paths`: trained at the same time, each as
                the sampled epoch of its own number.
            epoch: sampled epochs before that of the first.
            sums: of the steps done; those of this call are added.

        Returns:
            Whether the run was asked to stop, in any process.

        Raises:
            NotFinite: the loss, its gradient or the update is; nothing saved is lost.
        """
        first = sums.steps
        # Calls end at the same steps wherever a run was interrupted.
        count = self._steps_per_call - first % self._steps_per_call
        count = min(count, self.steps_per_epoch - first)
        if self.first_step_seconds is None:
            count = 1  # one step alone, to say when training began
        call = self._call(model, architectures, epoch, first, count)
        program = self._compiled(
            "train", self._train, self._states[model], self._examples["train"], call
        )
        self._states[model], found = program(self._states[model], self._examples["train"], call)
        host = to_host(found)
        if self.first_step_seconds is None:
            self.first_step_seconds = time.monotonic() - self._started
        if int(host["bad_step"]) >= 0:
            raise self._not_finite(model, architectures, epoch, int(host["bad_step"]))
        sums.steps += count
        sums.loss += float(host["loss"])
        return bool(host["stop"])

    def _not_finite(
        self, model: str, architectures: np.ndarray, epoch: int, number: int
    ) -> NotFinite:
        """Run a bad step again from the state before it, and say which layer makes it so."""
        start = to_host(self._states[model])

        def of_architecture(position: int) -> str | None:
            # Of several at the same time, one by one: the first group has it, the others nothing.
            own = architectures[position : position + 1]
            call = self._call(model, own, epoch + position, number, 1)

            def repeat(optimizer: Any, loss_of: PathLoss) -> tuple[ModelState, dict[str, Any]]:
                function = pmap_kept(make_train_call(self._step, optimizer, loss_of, once))
                arguments = (replicate(start), self._examples["train"], call)
                state, found = Program(function, arguments, self._compiler_options)(*arguments)
                return to_host(state), to_host(found)

            return bad_layer(self._settings, start, own[0], model == CHILD, repeat)

        sampled = f"sampled epoch {epoch + 1}"
        if len(architectures) > 1:
            sampled += f" to {epoch + len(architectures)}"

        def first_bad_layer() -> str | None:
            for position in range(len(architectures)):
                layer = of_architecture(position)
                if self.paths > 1:
                    # The first group's devices alone have run it.
                    layer = processes.from_first(functools.partial(str, layer or ""))
                if layer and len(architectures) > 1:
                    layer += f", in sampled epoch {epoch + position + 1}"
                if layer:
                    return layer
            return None

        layer = explained(first_bad_layer)
        key = "child_learning_rate" if model == CHILD else "learning_rate"
        return NotFinite(
            f"the loss of the {model}, its gradient or the update is not finite in step "
            f"{number + 1} of {sampled}",
            layer,
            f"Try a smaller config.search.{key} in a new workdir",
        )

    def score(self, model: str, architectures: np.ndarray) -> list[float]:
        """Return each architecture's accuracy over the scored examples, in [0, 1].

        Args:
            model: CHILD or PARENT.
            architectures: int32[n, 2, 14], n at most `paths`.
        """
        return self.scores(model, architectures)["accuracy"]

    def scores(self, model: str, architectures: np.ndarray) -> dict[str, list[float]]:
        """Return what each architecture answers to the first `search.score_examples` of validation.

        Args:
            model: CHILD or PARENT.
            architectures: int32[n, 2, 14], n at most `paths`.

        Returns:
            `accuracy`, in [0, 1], and `log_likelihood`, the mean logarithm of the probability of
            the right answer; a number for each architecture.
        """
        call = self._call(model, architectures, 0, 0, 0)
        arguments = (self._states[model].params, self._examples["validation"], call)
        sums = to_host(self._compiled("score", self._score, *arguments)(*arguments))

        def means(name: str) -> list[float]:
            return [sum_.item() / self._num_scored for sum_ in sums[name][: len(architectures)]]

        return {"accuracy": means("correct"), "log_likelihood": means("log_likelihood")}
