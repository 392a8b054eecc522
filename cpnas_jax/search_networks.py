"""The child and the parent supernet on the devices: their state, programs, training and scoring."""

import functools
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from cpnas_jax.architecture.sampling import SHAPE, num_paths
from cpnas_jax.data.datasets import Split
from cpnas_jax.data.order import weights_key
from cpnas_jax.diagnosis import NotFinite, explained, once
from cpnas_jax.models import supernet
from cpnas_jax.models.space import CHILD, MODELS, OPERATIONS
from cpnas_jax.path_optimizer import PathOptimizer
from cpnas_jax.runtime import processes
from cpnas_jax.runtime.costs import program_cost
from cpnas_jax.runtime.interruptions import stop_wished
from cpnas_jax.runtime.parallel import (
    Program,
    local_positions,
    pmap_donated,
    pmap_kept,
    replicate,
    to_host,
)
from cpnas_jax.runtime.shards import Shards
from cpnas_jax.search_devices import SearchDevices
from cpnas_jax.search_diagnosis import bad_layer, last_spoilt
from cpnas_jax.search_state import EpochSums
from cpnas_jax.search_step import (
    Call,
    ModelState,
    PathLoss,
    make_score_call,
    make_train_call,
)

_ANY = np.zeros((1, *SHAPE), np.int32)
"""Any architecture."""

_DRAWS = 1024
"""Between the keys of two draws of weights; those of a final training lie between."""


class Networks(SearchDevices):
    """Both models with everything that is compiled or lives on a device."""

    def __init__(
        self,
        config: config_dict.ConfigDict,
        train: Split,
        validation: Split,
        sampled_epochs: int,
        started: float,
        models: tuple[str, ...] = MODELS,
        takes_turns: bool = False,
    ) -> None:
        """Place the data on the devices; nothing is compiled yet.

        Args:
            config: validated.
            train: training part.
            validation: scoring part.
            sampled_epochs: after which the learning rate has come to 0; it begins anew then.
            started: `time.monotonic()` when the run began, for the time to the first step.
            models: those that are trained.
            takes_turns: whether the steps of an epoch train architectures of their own.

        Raises:
            UserError: sizes of the config that the data or the memory do not allow.
        """
        search = config.search
        devices, operations = jax.device_count(), len(search.operations)
        self.paths = num_paths(devices, operations) if search.parallel == "path" else 1
        shards = Shards(devices, config.runtime.deterministic, self.paths)
        super().__init__(config, train, validation, started, shards)
        self._models, self._schedule = models, sampled_epochs
        assert not (takes_turns and self.paths > 1)
        self._takes_turns = takes_turns
        self._optimizer = PathOptimizer(self._optimizer_settings(search, sampled_epochs))
        self._init = jax.jit(self._initial_model, compiler_options=self._compiler_options)
        self._check_memory()
        self._train = pmap_donated(make_train_call(self._step, self._optimizer))
        self._score = pmap_kept(
            make_score_call(self._settings, self._num_scored, search.score_batch_size, self._shards)
        )
        self._place(train, validation)

    def _check_memory(self) -> None:
        """Refuse a supernet whose weights alone do not fit, before anything of it is made."""
        # Weights and momentum of all models, gradients of one.
        self._check_weights(
            lambda key: supernet.init(key, self._settings, self._image_shape),
            2 * len(self._models) + 1,
        )

    def initial_state(self, draw: int = 0) -> dict[str, ModelState]:
        """Return the state of the models before the first epoch, in host memory.

        Args:
            draw: number of the draw; another one gives other weights.
        """
        key = jax.random.key(self._seed)
        return {
            name: jax.device_get(self._init(weights_key(key, number + _DRAWS * draw)))
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
        self._compile_training(
            self._train, self._states[CHILD], self._examples["train"], self._any_call()
        )

    def flops(self, epochs: int, scored: int) -> float:
        """Return the operations of a search on all devices, counted in the programs.

        Every operation of an edge counts as often as any other, as at the first stage.

        Args:
            epochs: sampled epochs, each trains and scores all models.
            scored: architectures that were only scored, by all models.
        """
        call = self._call(CHILD, _ANY, 0, 0, 0)
        state = self._states[self._models[0]]
        # A loop over the steps, and one over virtual shards, count as one pass.
        step = program_cost(self._train, state, self._examples["train"], self._any_call()).flops
        score = program_cost(self._score, state.params, self._examples["validation"], call).flops
        each = epochs * self.steps_per_epoch * step + (epochs + scored) * score
        # Each group of devices has epochs of its own.
        sharing = jax.device_count() // self.paths
        return len(self._models) * sharing * self._shards.passes * each

    def _any_call(self) -> Call:
        """Return a call of the training program."""
        return self._train_call(CHILD, _ANY, 0, 0, 1)

    def _train_call(
        self, model: str, architectures: np.ndarray, epoch: int, first_step: int, num_steps: int
    ) -> Call:
        """Return a call of the training program; see `train`."""
        if self._takes_turns:
            # Of one length, so that a shorter call is the same program.
            length = min(self._steps_per_call, self.steps_per_epoch)
            own = np.zeros((length, *SHAPE), np.int32)
            own[:num_steps] = architectures[first_step : first_step + num_steps]
            architectures = own[None]
        return self._call(model, architectures, epoch, first_step, num_steps)

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
                the sampled epoch of its own number. Where they take turns,
                int32[steps_per_epoch, 2, 14], one for each step.
            epoch: sampled epochs before that of the first.
            sums: of the steps done; those of this call are added.

        Returns:
            Whether the run was asked to stop, in any process.

        Raises:
            NotFinite: the loss, its gradient or the update is; nothing saved is lost.
        """
        first = sums.steps
        count = self._steps_of_call(first, epoch)
        call = self._train_call(model, architectures, epoch, first, count)
        program = self._compiled(
            "train", self._train, self._states[model], self._examples["train"], call
        )
        self._states[model], found = program(self._states[model], self._examples["train"], call)
        host = to_host(found)
        self._note_first_step()
        if int(host["bad_step"]) >= 0:
            bad = int(host["bad_step"])
            if self._takes_turns:
                params = to_host(self._states[model]).params
                bad = last_spoilt(self._settings, params, architectures, first, bad)
                architectures = architectures[bad : bad + 1]
            raise self._not_finite(model, architectures, epoch, bad)
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
