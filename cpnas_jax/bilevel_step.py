"""The compiled function of the gradient strategies: alpha and the weights in alternation.

One step takes a batch of the validation part, which gives alpha its gradient, and then a batch of
the training part, which gives the weights theirs (DARTS, Liu et al. 2019, algorithm 1). How alpha
enters the network is a `Relaxation`; which models are trained, and what each counts for in alpha's
objective, are settings, so that DARTS on one model and the strategy with child and parent are the
same function.

The objective of alpha is the sum of each model's cross-entropy times its weight, that is
-(w_P * LL_P + w_C * LL_C) with mean log-likelihoods: eq. 4.15 with likelihoods, which have a
gradient, in place of accuracies [ours].
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from cpnas_jax.data.examples import Examples
from cpnas_jax.data.order import epoch_permutation, sample_key, validation_key
from cpnas_jax.models.losses import cross_entropy
from cpnas_jax.models.space import Alpha
from cpnas_jax.relaxation import Relaxation
from cpnas_jax.runtime.parallel import AXIS
from cpnas_jax.search_step import ModelState, StepSettings, augmented_batch
from cpnas_jax.steps import all_finite, steps_until_bad, unless_bad

ALPHA_BETAS = (0.5, 0.999)
"""Of alpha's Adam (DARTS, PC-DARTS)."""

FINITE_DIFFERENCE = 0.01
"""The norm of the step in the weights that second-order DARTS takes its difference over."""


@flax.struct.dataclass
class AlphaState:
    """What a bilevel search changes beside the weights.

    Attributes:
        alpha: the architecture parameters.
        optimizer: state of `alpha_adam`.
    """

    alpha: Alpha
    optimizer: Any


@flax.struct.dataclass
class BilevelState:
    """All that a step changes.

    Attributes:
        models: parameters and optimizer of every model, with a leading axis of the models.
        alpha: shared by the models.
    """

    models: ModelState
    alpha: AlphaState


@flax.struct.dataclass
class BilevelCall:
    """What tells one call from another; arrays, so that no call compiles anew.

    Attributes:
        survivors: bool[2, 14, 8], the operations that are still there.
        model: int32[], which of the models is scored.
        epoch: int32[].
        first_step: int32[], within the epoch.
        num_steps: int32[], of this call.
        stop: int32[], 1 where this process was asked to stop; another value in each process.
        passes: int32[], see `Shards.combine`.
        key: uint32[2], data of the run's random key.
    """

    survivors: chex.Array
    model: chex.Array
    epoch: chex.Array
    first_step: chex.Array
    num_steps: chex.Array
    stop: chex.Array
    passes: chex.Array
    key: chex.Array


@dataclasses.dataclass(frozen=True)
class BilevelSettings:
    """The static side of a bilevel search.

    Attributes:
        step: sizes and augmentation of both batches.
        binary: of each model, whether it is the child.
        weights: of each model in alpha's objective.
        warmup: epochs at the start in which alpha does not move.
        second_order: alpha's gradient also counts what alpha changes in the weights (DARTS, eq. 7
            and 8, by finite differences); of a single mixture.

    Raises:
        ValueError: the numbers of models differ, or second order is asked of several.
    """

    step: StepSettings
    binary: tuple[bool, ...]
    weights: tuple[float, ...]
    warmup: int
    second_order: bool = False

    def __post_init__(self) -> None:
        if len(self.binary) != len(self.weights):
            raise ValueError(f"{len(self.weights)} weights of {len(self.binary)} models")
        if self.second_order and len(self.binary) != 1:
            raise ValueError(f"second order with {len(self.binary)} models")


def alpha_adam(learning_rate: float, weight_decay: float) -> optax.GradientTransformation:
    """Return alpha's optimizer: Adam with decay in the gradient, as in PyTorch (DARTS)."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.adam(learning_rate, *ALPHA_BETAS),
    )


def over_models(function: Callable[..., Any], *stacked: Any) -> Any:
    """Call a function for every model, one after the other in one program; stack the results.

    Args:
        function: of a row of each argument.
        stacked: trees with a leading axis of the models.
    """
    return lax.scan(lambda _, rows: (None, function(*rows)), None, stacked)[1]


def make_bilevel_call(
    settings: BilevelSettings,
    relaxation: Relaxation,
    optimizer: Any,
    alpha_rule: optax.GradientTransformation,
) -> Callable[..., tuple[BilevelState, dict[str, jax.Array]]]:
    """Return the function of one device that runs several steps; to be pmapped.

    (state, training examples, validation examples, call) -> the new state and sums over the steps:
    `loss` f32[models], of the training batches' means; `correct` int32[models]; `objective` f32[],
    alpha's, of the steps in which alpha moves; `bad_step` (see `steps.steps_until_bad`); and
    `stop`, whether any process was asked to.

    Args:
        settings: the static side.
        relaxation: how alpha enters a loss.
        optimizer: of the weights: `PathOptimizer` or `MixtureOptimizer`.
        alpha_rule: `alpha_adam`.
    """
    step_settings, shards = settings.step, settings.step.shards
    flags = np.asarray(settings.binary)
    model_weights = np.asarray(settings.weights, np.float32)

    def bilevel_call(
        state: BilevelState, examples: Examples, validation: Examples, call: BilevelCall
    ) -> tuple[BilevelState, dict[str, jax.Array]]:
        key = jax.random.wrap_key_data(call.key)
        other_key = validation_key(key)
        order = epoch_permutation(key, call.epoch, examples.labels.shape[0])
        num_validation = validation.labels.shape[0]
        other_order = epoch_permutation(other_key, call.epoch, num_validation)

        def training_batch(number: jax.Array, shard: jax.Array) -> tuple[jax.Array, jax.Array]:
            return augmented_batch(step_settings, examples, order, key, call.epoch, number, shard)

        def validation_batch(number: jax.Array, shard: jax.Array) -> tuple[jax.Array, jax.Array]:
            # A smaller part is gone through again within the epoch.
            number = number % (num_validation // step_settings.batch_size)
            return augmented_batch(
                step_settings, validation, other_order, other_key, call.epoch, number, shard
            )

        def objective(
            alpha: Alpha, params: Any, batch: tuple[jax.Array, jax.Array], drawn: Any
        ) -> tuple[jax.Array, Any]:
            """Return alpha's objective and its gradients for alpha and the models' weights."""
            images, labels = batch

            def of_model(params: Any, binary: jax.Array, weight: jax.Array) -> Any:
                def loss_of(alpha: Alpha, params: Any) -> jax.Array:
                    logits = relaxation.logits(params, images, alpha, call.survivors, drawn, binary)
                    return weight * cross_entropy(logits, labels)

                # The gradient for the weights is not computed where it is not used.
                value, (of_alpha, of_params) = jax.value_and_grad(loss_of, argnums=(0, 1))(
                    alpha, params
                )
                return value, of_alpha, of_params

            value, of_alpha, of_params = over_models(of_model, params, flags, model_weights)
            summed = jax.tree.map(lambda rows: jnp.sum(rows, axis=0), (value, of_alpha))
            return *summed, of_params

        def weights_gradient(
            alpha: Alpha, params: Any, number: jax.Array, drawn: Any
        ) -> tuple[tuple[Any, jax.Array], jax.Array]:
            """Return each model's gradient and loss, and its correct answers, of a batch."""

            def of_shard(shard: jax.Array) -> tuple[Any, Any]:
                images, labels = training_batch(number, shard)

                def of_model(params: Any, binary: jax.Array) -> Any:
                    def loss_of(params: Any) -> tuple[jax.Array, jax.Array]:
                        logits = relaxation.trained(
                            params, images, alpha, call.survivors, drawn, binary
                        )
                        hits = jnp.argmax(logits, axis=-1) == labels
                        return cross_entropy(logits, labels), jnp.sum(hits, dtype=jnp.int32)

                    return jax.value_and_grad(loss_of, has_aux=True)(params)

                (losses, correct), gradients = over_models(of_model, params, flags)
                return (gradients, losses), correct

            return shards.combine(of_shard, call.passes)

        def alpha_gradient(
            state: BilevelState, number: jax.Array, drawn: Any
        ) -> tuple[jax.Array, Alpha]:
            """Return alpha's objective and gradient."""
            alpha, params = state.alpha.alpha, state.models.params
            if not settings.second_order:

                def of_shard(shard: jax.Array) -> tuple[Any, Any]:
                    batch = validation_batch(number, shard)
                    return objective(alpha, params, batch, drawn)[:2], ()

                return shards.combine(of_shard, call.passes)[0]
            steps_done = call.epoch * step_settings.steps_per_epoch + number
            (gradients, _), _ = weights_gradient(alpha, params, number, drawn)
            moved = over_models(
                lambda *rows: optimizer.virtual(*rows, step=steps_done),
                gradients,
                state.models.optimizer,
                params,
            )

            def of_moved(shard: jax.Array) -> tuple[Any, Any]:
                return objective(alpha, moved, validation_batch(number, shard), drawn), ()

            (value, direct, direction), _ = shards.combine(of_moved, call.passes)
            norm = jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(direction)))
            # Without a direction both ends are the same, and their difference is 0.
            epsilon = FINITE_DIFFERENCE / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)

            def at_end(sign: jax.Array) -> Alpha:
                end = jax.tree.map(lambda w, d: w + sign * epsilon * d, params, direction)

                def of_end(shard: jax.Array) -> tuple[Any, Any]:
                    batch = training_batch(number, shard)
                    return objective(alpha, end, batch, drawn)[1], ()

                return shards.combine(of_end, call.passes)[0]

            ends = over_models(at_end, np.asarray([1, -1], np.float32))
            rate = optimizer.rate(steps_done)
            gradient = jax.tree.map(
                lambda g, end: g - rate * (end[0] - end[1]) / (2 * epsilon), direct, ends
            )
            return value, gradient

        def alpha_step(
            state: BilevelState, number: jax.Array, drawn: Any
        ) -> tuple[AlphaState, jax.Array, jax.Array]:
            value, gradient = alpha_gradient(state, number, drawn)
            finite = all_finite((value, gradient))

            def updated() -> AlphaState:
                # See PathOptimizer.
                with jax.numpy_dtype_promotion("standard"):
                    updates, after = alpha_rule.update(
                        gradient, state.alpha.optimizer, state.alpha.alpha
                    )
                return AlphaState(optax.apply_updates(state.alpha.alpha, updates), after)

            return unless_bad(finite, updated, state.alpha), value, finite

        def step(
            number: jax.Array, state: BilevelState
        ) -> tuple[BilevelState, dict[str, jax.Array], jax.Array]:
            own_key = sample_key(key, call.epoch, number)
            drawn = relaxation.draw(own_key, state.alpha.alpha, call.survivors)
            if settings.warmup:
                # All devices take the same branch.
                alpha, value, alpha_finite = lax.cond(
                    call.epoch >= settings.warmup,
                    lambda: alpha_step(state, number, drawn),
                    lambda: (state.alpha, jnp.zeros((), jnp.float32), jnp.array(True)),
                )
            else:
                alpha, value, alpha_finite = alpha_step(state, number, drawn)
            params = state.models.params
            (gradients, losses), correct = weights_gradient(alpha.alpha, params, number, drawn)
            finite = alpha_finite & all_finite((losses, gradients))

            def updated() -> BilevelState:
                def of_model(gradients: Any, model: ModelState, binary: jax.Array) -> ModelState:
                    return ModelState(
                        *optimizer.update(
                            gradients,
                            model.optimizer,
                            model.params,
                            architecture=relaxation.architecture(drawn),
                            binary=binary,
                            step=call.epoch * step_settings.steps_per_epoch + number,
                        )
                    )

                return BilevelState(over_models(of_model, gradients, state.models, flags), alpha)

            metrics = {"loss": losses, "correct": correct, "objective": value}
            return unless_bad(finite, updated, state), metrics, finite

        zeros = {
            "loss": jnp.zeros(flags.shape, jnp.float32),
            "correct": jnp.zeros(flags.shape, jnp.int32),
            "objective": jnp.zeros((), jnp.float32),
        }
        state, found = steps_until_bad(step, call.first_step, call.num_steps, state, zeros)
        return state, {**found, "stop": lax.pmax(call.stop, AXIS)}

    return bilevel_call


def make_score_logits(settings: BilevelSettings, relaxation: Relaxation) -> Callable[..., Any]:
    """Return the logits of the model that a call names, of a whole state, for `make_score_call`."""
    flags = np.asarray(settings.binary)

    def logits_of(state: BilevelState, images: jax.Array, call: BilevelCall) -> jax.Array:
        params = jax.tree.map(lambda leaf: leaf[call.model], state.models.params)
        binary = jnp.asarray(flags)[call.model]
        return relaxation.score(params, images, state.alpha.alpha, call.survivors, binary)

    return logits_of
