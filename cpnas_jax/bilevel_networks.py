"""The networks of a gradient strategy on the devices: state, programs, training and scoring."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from cpnas_jax.architecture.sampling import all_survivors
from cpnas_jax.bilevel_step import (
    AlphaState,
    BilevelCall,
    BilevelSettings,
    BilevelState,
    alpha_adam,
    make_bilevel_call,
    make_score_logits,
)
from cpnas_jax.config_rules import GRADIENT_STRATEGIES
from cpnas_jax.data.datasets import Split
from cpnas_jax.data.order import alpha_key, weights_key
from cpnas_jax.diagnosis import NotFinite, finite_on_host
from cpnas_jax.mixture_optimizer import MixtureOptimizer
from cpnas_jax.models.mixture import MixtureSettings, init_alpha
from cpnas_jax.models.space import CHILD, MODELS, PARENT, Alpha
from cpnas_jax.path_optimizer import PathOptimizer
from cpnas_jax.relaxation import Relaxation, mixture_of, sampled_by
from cpnas_jax.runtime.costs import program_cost
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.interruptions import stop_wished
from cpnas_jax.runtime.parallel import (
    local_positions,
    pmap_donated,
    pmap_kept,
    replicate,
    to_host,
)
from cpnas_jax.runtime.shards import Shards
from cpnas_jax.search_devices import SearchDevices
from cpnas_jax.search_step import ModelState, make_score_call

STATE = "bilevel"
"""The one state's name among those of a checkpoint."""


@dataclasses.dataclass
class BilevelSums:
    """What the steps of an epoch gave, as far as they are done.

    Attributes:
        steps: how many.
        losses: model -> sum of the steps' mean training losses.
        objective: sum of alpha's objective over the steps in which alpha moved.
    """

    steps: int = 0
    losses: dict[str, float] = dataclasses.field(default_factory=dict)
    objective: float = 0.0

    def mean_losses(self) -> dict[str, float]:
        """Return each model's mean over the steps."""
        return {model: loss / self.steps for model, loss in self.losses.items()}


@dataclasses.dataclass(frozen=True)
class _Strategy:
    """What a strategy is made of; `weights` are the models' in alpha's objective."""

    models: tuple[str, ...]
    weights: tuple[float, ...]
    relaxation: Relaxation
    edge_normalisation: bool
    warmup: int


class BilevelNetworks(SearchDevices):
    """The models of a gradient strategy with alpha, and everything that is compiled for them."""

    paths = 1

    def __init__(
        self,
        config: config_dict.ConfigDict,
        train: Split,
        validation: Split,
        epochs: int,
        started: float,
    ) -> None:
        """Place the data on the devices; nothing is compiled yet.

        Args:
            config: validated, with a strategy of `GRADIENT_STRATEGIES`.
            train: training part.
            validation: the part that gives alpha its gradient, and that is scored.
            epochs: of the whole search.
            started: `time.monotonic()` when the run began, for the time to the first step.

        Raises:
            UserError: sizes of the config that the data or the memory do not allow.
        """
        search = config.search
        super().__init__(config, train, validation, started, Shards(jax.device_count()))
        if len(validation.labels) < search.batch_size:
            raise UserError(
                f"config.search.batch_size is {search.batch_size}; the validation part, which "
                f"gives alpha its gradient, has only {len(validation.labels)} images"
            )
        strategy = self._strategy(search)
        self._relaxation, self.models = strategy.relaxation, strategy.models
        self._edge_normalisation = strategy.edge_normalisation
        self.warmup = strategy.warmup
        settings = self._bilevel = BilevelSettings(
            step=self._step,
            binary=tuple(model == CHILD for model in self.models),
            weights=strategy.weights,
            warmup=strategy.warmup,
            second_order=search.second_order,
        )
        optimizers = self._optimizer_settings(search, epochs)
        self._optimizer: Any
        if search.strategy == "cp_gradient":
            self._optimizer = PathOptimizer(optimizers)
        else:
            self._optimizer = MixtureOptimizer(optimizers, self.models[0])
        self._alpha_rule = alpha_adam(search.alpha_learning_rate, search.alpha_weight_decay)
        # Weights and two moments of every model, and gradients; second order has three more sets.
        copies = 4 * len(self.models) + 3 * search.second_order
        self._check_weights(lambda key: self._relaxation.init(key, self._image_shape), copies)
        self._init = jax.jit(self._initial_state, compiler_options=self._compiler_options)
        self._train = pmap_donated(
            make_bilevel_call(settings, self._relaxation, self._optimizer, self._alpha_rule)
        )
        self._score = pmap_kept(
            make_score_call(
                self._settings,
                self._num_scored,
                search.score_batch_size,
                self._shards,
                make_score_logits(settings, self._relaxation),
            )
        )
        self._place(train, validation)

    def _strategy(self, search: config_dict.ConfigDict) -> _Strategy:
        assert search.strategy in GRADIENT_STRATEGIES
        if search.strategy == "cp_gradient":
            weights = {CHILD: search.child_weight, PARENT: search.parent_weight}
            return _Strategy(
                models=MODELS,
                weights=tuple(float(weights[model]) for model in MODELS),
                relaxation=sampled_by(self._settings, search.gate_temperature),
                edge_normalisation=False,
                warmup=search.alpha_warmup,
            )
        is_partial = search.strategy == "pc_darts"
        mixture = MixtureSettings(
            network=self._settings,
            partial=search.partial_channels if is_partial else 1,
            edge_normalisation=is_partial and search.edge_normalisation,
            operations=tuple(search.operations),
        )
        return _Strategy(
            models=(search.gradient_model,),
            weights=(1.0,),
            relaxation=mixture_of(mixture),
            edge_normalisation=mixture.edge_normalisation,
            # DARTS begins at once.
            warmup=search.alpha_warmup if is_partial else 0,
        )

    def initial_state(self) -> dict[str, BilevelState]:
        """Return the state before the first step, in host memory, under the name `STATE`."""
        return {STATE: jax.device_get(self._init(jax.random.key(self._seed)))}

    def _initial_state(self, key: jax.Array) -> BilevelState:
        # The same weights as in the other strategies, whatever models there are.
        keys = [weights_key(key, MODELS.index(model)) for model in self.models]

        def model_state(key: jax.Array) -> ModelState:
            params = self._relaxation.init(key, self._image_shape)
            return ModelState(params, self._optimizer.init(params))

        alpha = init_alpha(alpha_key(key), self._edge_normalisation)
        return BilevelState(
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(model_state, keys)),
            AlphaState(alpha, self._alpha_rule.init(alpha)),
        )

    def load(self, states: dict[str, BilevelState]) -> None:
        """Put the state on the devices."""
        self._states = {STATE: replicate(states[STATE])}

    def host_state(self) -> dict[str, BilevelState]:
        """Return the state as numpy arrays."""
        return {STATE: to_host(self._states[STATE])}

    def alpha(self) -> Alpha:
        """Return the architecture parameters as numpy arrays."""
        return to_host(self._states[STATE].alpha.alpha)

    def compile(self) -> None:
        """Compile the training program; that of scoring follows at its first use.

        Raises:
            UserError: it needs more memory than a device has.
        """
        call = self._call(all_survivors(), 0, 0, 1)
        self._compile_training(self._train, *self._arguments(call))

    def _arguments(self, call: BilevelCall) -> tuple[Any, ...]:
        examples = self._examples
        return self._states[STATE], examples["train"], examples["validation"], call

    def flops(self, epochs: int, scored: int) -> float:
        """Return the operations of a search on all devices, counted in the programs.

        An operation of a sampled path counts as often as any other.

        Args:
            epochs: each trains and scores all models; alpha waits in the first `warmup`.
            scored: must be 0.
        """
        assert scored == 0
        call = self._call(all_survivors(), 0, 0, 1)

        def step(warmup: int) -> float:
            settings = dataclasses.replace(self._bilevel, warmup=warmup)
            program = pmap_kept(
                make_bilevel_call(settings, self._relaxation, self._optimizer, self._alpha_rule)
            )
            return program_cost(program, *self._arguments(call)).flops

        # With a warm-up alpha's step is a branch, which counts half.
        whole = step(0)
        of_alpha = 2 * (whole - step(1))
        score = program_cost(
            self._score, self._states[STATE], self._examples["validation"], call
        ).flops
        trained = self.steps_per_epoch * (epochs * whole - min(epochs, self.warmup) * of_alpha)
        return jax.device_count() * (trained + epochs * len(self.models) * score)

    def _call(
        self,
        survivors: np.ndarray,
        epoch: int,
        first_step: int,
        num_steps: int,
        model: int = 0,
    ) -> BilevelCall:
        """Return a call with the same values for every local device."""
        call = BilevelCall(
            survivors=np.asarray(survivors, bool),
            model=np.asarray(model, np.int32),
            epoch=np.asarray(epoch, np.int32),
            first_step=np.asarray(first_step, np.int32),
            num_steps=np.asarray(num_steps, np.int32),
            stop=np.asarray(stop_wished(), np.int32),
            passes=np.asarray(self._shards.passes, np.int32),
            key=self._key,
        )
        devices = len(local_positions())
        return jax.tree.map(lambda leaf: np.stack([leaf] * devices), call)

    def train(self, survivors: np.ndarray, epoch: int, sums: BilevelSums) -> bool:
        """Take the next steps of an epoch, of alpha and of the weights, in one call.

        Args:
            survivors: bool[2, 14, 8], the operations that are still there.
            epoch: epochs before this one.
            sums: of the steps done; those of this call are added.

        Returns:
            Whether the run was asked to stop, in any process.

        Raises:
            NotFinite: a loss, its gradient or the update is; nothing saved is lost.
        """
        first = sums.steps
        count = self._steps_of_call(first, epoch)
        arguments = self._arguments(self._call(survivors, epoch, first, count))
        self._states[STATE], found = self._compiled("train", self._train, *arguments)(*arguments)
        host = to_host(found)
        self._note_first_step()
        if int(host["bad_step"]) >= 0:
            raise self._not_finite(host, epoch)
        sums.steps += count
        sums.objective += float(host["objective"])
        for model, loss in zip(self.models, host["loss"], strict=True):
            sums.losses[model] = sums.losses.get(model, 0.0) + float(loss)
        return bool(host["stop"])

    def _not_finite(self, found: dict[str, np.ndarray], epoch: int) -> NotFinite:
        """Say what of a bad step is not finite, as far as its results tell."""
        state = to_host(self._states[STATE])
        losses = dict(zip(self.models, found["loss"], strict=True))
        bad = [model for model, loss in losses.items() if not np.isfinite(loss)]
        if not finite_on_host(state):
            what = "an update left something of the state that is not"
        elif not np.isfinite(found["objective"]):
            what = "alpha's objective on the validation part is the first that is not"
        elif bad:
            what = f"the training loss of the {bad[0]} is the first that is not"
        else:
            what = "the losses are, a gradient is not"
        keys = [
            f"config.search.{'child_learning_rate' if model == CHILD else 'learning_rate'}"
            for model in self.models
        ]
        return NotFinite(
            f"a loss, its gradient or the update is not finite in step "
            f"{int(found['bad_step']) + 1} of epoch {epoch + 1}",
            what,
            f"Try a smaller {' or '.join(keys)} in a new workdir",
        )

    def score(self, survivors: np.ndarray) -> dict[str, float]:
        """Return each model's accuracy over the scored images, in [0, 1].

        Of a mixture as it is; of single paths with the surviving operations of the largest alpha.

        Args:
            survivors: bool[2, 14, 8].
        """
        accuracies = {}
        for number, model in enumerate(self.models):
            call = self._call(survivors, 0, 0, 0, number)
            arguments = (self._states[STATE], self._examples["validation"], call)
            sums = to_host(self._compiled("score", self._score, *arguments)(*arguments))
            accuracies[model] = int(sums["correct"][0]) / self._num_scored
        return accuracies
