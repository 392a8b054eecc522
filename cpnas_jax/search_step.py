"""The compiled functions of a search: training steps and scoring of one sampled architecture.

One program each serves every architecture and both models; which model it is, is a runtime flag.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import flax
import jax
import jax.numpy as jnp
from jax import lax

from cpnas_jax.data.augment import CROP_DRAWS, normalise, random_crop_flip
from cpnas_jax.data.examples import Examples
from cpnas_jax.data.order import (
    batch_indices,
    epoch_permutation,
    scoring_indices,
    shard_positions,
    step_key,
)
from cpnas_jax.models import supernet
from cpnas_jax.models.draws import position_draws
from cpnas_jax.models.losses import cross_entropy, cross_entropy_sum
from cpnas_jax.models.supernet import SupernetSettings
from cpnas_jax.path_optimizer import merge_paths
from cpnas_jax.runtime.parallel import AXIS
from cpnas_jax.runtime.shards import Shards
from cpnas_jax.steps import Run, all_finite, steps_until_bad, unless_bad


@flax.struct.dataclass
class ModelState:
    """What training changes of a child or a parent.

    Attributes:
        params: of `supernet.init`.
        optimizer: state of `PathOptimizer`.
    """

    params: supernet.Params
    optimizer: Any


@flax.struct.dataclass
class Call:
    """What tells one call from another; arrays, so that no call compiles anew.

    Attributes:
        architecture: int32[2, 14]; another one in each group of devices that trains its own path.
            Of training that takes turns int32[n, 2, 14], of each step of the call.
        active: f32[], 1 where the group has a path, 0 where there are more groups than paths left.
        binary: bool[], child or parent.
        epoch: int32[], number of the sampled epoch; each group's own.
        rate_epoch: int32[], the epoch whose learning rate all groups use.
        first_step: int32[], within the epoch.
        num_steps: int32[], of this call.
        stop: int32[], 1 where this process was asked to stop; another value in each process.
        passes: int32[], see `Shards.combine`.
        key: uint32[2], data of the run's random key.
    """

    architecture: chex.Array
    active: chex.Array
    binary: chex.Array
    epoch: chex.Array
    rate_epoch: chex.Array
    first_step: chex.Array
    num_steps: chex.Array
    stop: chex.Array
    passes: chex.Array
    key: chex.Array


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """The static side of a training step.

    Attributes:
        supernet: shape of the network.
        batch_size: over all devices that share a batch.
        shards: of each batch; several groups train a path each.
        crop_padding: border of the random crop.
        flip: whether images are mirrored at random.
        steps_per_epoch: n // batch_size.
    """

    supernet: SupernetSettings
    batch_size: int
    shards: Shards
    crop_padding: int
    flip: bool
    steps_per_epoch: int


def augmented_batch(
    settings: StepSettings,
    examples: Examples,
    order: jax.Array,
    key: jax.Array,
    epoch: jax.Array,
    number: jax.Array,
    shard: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return a shard's images f32[n, H, W, C], cropped, flipped and normalised, and their labels.

    Args:
        settings: the static side.
        examples: that the order is of.
        order: of `epoch_permutation`.
        key: random key; with epoch and number it decides what the images' draws are.
        epoch: int32[].
        number: int32[], of the step within the epoch, below the batches of `order`.
        shard: int32[].
    """
    size = settings.batch_size // settings.shards.count
    rows = batch_indices(order, number, settings.batch_size, shard, size)
    draws = position_draws(step_key(key, epoch, number), shard_positions(shard, size), CROP_DRAWS)
    images = random_crop_flip(draws, examples.images[rows], settings.crop_padding, settings.flip)
    return normalise(images, examples.mean, examples.std), examples.labels[rows]


PathLoss = Callable[[supernet.Params, jax.Array, jax.Array, Call], tuple[jax.Array, Any]]
"""(params, images, labels, call) -> mean loss, and what is summed over the devices."""


def make_path_loss(settings: SupernetSettings) -> PathLoss:
    """Return the loss of the sampled path, which also counts the `correct` answers."""

    logits_of = make_path_logits(settings)

    def loss_of(
        params: supernet.Params, images: jax.Array, labels: jax.Array, call: Call
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = logits_of(params, images, call)
        correct = jnp.sum(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.int32)
        return cross_entropy(logits, labels), {"correct": correct}

    return loss_of


def path_of_step(call: Call, number: jax.Array) -> Call:
    """Return a call with the architecture that a step trains.

    Args:
        call: of the whole.
        number: int32[], of the step within the epoch.
    """
    if call.architecture.ndim == 2:
        return call
    return dataclasses.replace(call, architecture=call.architecture[number - call.first_step])


def make_train_call(
    settings: StepSettings,
    optimizer: Any,
    loss_of: PathLoss | None = None,
    run: Run = steps_until_bad,
) -> Callable[[ModelState, Examples, Call], tuple[ModelState, dict[str, jax.Array]]]:
    """Return the function of one device that runs several training steps; to be pmapped.

    It returns the new state and sums over the steps: `loss`, of the batches' means, averaged over
    the paths, and `correct`, of the training examples of the device's path; `bad_step` (see
    `steps.steps_until_bad`); and `stop`, whether any process was asked to.

    Args:
        settings: the static side.
        optimizer: a `PathOptimizer`, or what is called like one.
        loss_of: `make_path_loss`, or what a diagnosis puts in its place.
        run: runs the steps.
    """
    # A diagnosis wants to see what the update makes of a bad step.
    diagnosed = loss_of is not None
    loss_of = loss_of or make_path_loss(settings.supernet)
    several = settings.shards.groups > 1

    def over_paths(tree: Any, call: Call) -> Any:
        """Average over the groups that have a path; the devices of a group hold the same."""
        total = lax.psum(call.active, AXIS)
        return jax.tree.map(lambda leaf: lax.psum(leaf * call.active, AXIS) / total, tree)

    def train_call(
        state: ModelState, examples: Examples, call: Call
    ) -> tuple[ModelState, dict[str, jax.Array]]:
        key = jax.random.wrap_key_data(call.key)
        order = epoch_permutation(key, call.epoch, examples.labels.shape[0])

        def step(
            number: jax.Array, state: ModelState
        ) -> tuple[ModelState, dict[str, jax.Array], jax.Array]:
            own = path_of_step(call, number)

            def of_shard(shard: jax.Array) -> tuple[Any, Any]:
                images, labels = augmented_batch(
                    settings, examples, order, key, call.epoch, number, shard
                )
                (loss, counts), gradients = jax.value_and_grad(loss_of, has_aux=True)(
                    state.params, images, labels, own
                )
                return (gradients, loss), counts

            (gradients, loss), counts = settings.shards.combine(of_shard, call.passes)
            finite = all_finite((loss, gradients))
            if several:
                # All groups take the same branch.
                finite = lax.pmin(finite.astype(jnp.int32), AXIS) > 0
                loss = over_paths(loss, call)

            def updated() -> ModelState:
                params, optimizer_state = optimizer.update(
                    gradients,
                    state.optimizer,
                    state.params,
                    architecture=own.architecture,
                    binary=call.binary,
                    step=call.rate_epoch * settings.steps_per_epoch + number,
                    share=(lambda common: over_paths(common, call)) if several else None,
                )
                return ModelState(params, optimizer_state)

            new = updated() if diagnosed else unless_bad(finite, updated, state)
            return new, {"loss": loss, **counts}, finite

        zeros = {"loss": jnp.zeros((), jnp.float32), "correct": jnp.zeros((), jnp.int32)}
        # The number of steps is an input: a last, shorter call of an epoch is the same program.
        state, found = run(step, call.first_step, call.num_steps, state, zeros)
        if several:
            device = lax.axis_index(AXIS).astype(jnp.int32)
            params, optimizer_state = merge_paths(
                state.params,
                state.optimizer,
                call.architecture,
                axis_name=AXIS,
                is_leader=device % settings.shards.group_size == 0,
            )
            state = ModelState(params, optimizer_state)
            # What the last update spoilt is one group's alone.
            found = {**found, "bad_step": lax.pmax(found["bad_step"], AXIS)}
        # All processes learn it at the same step, and so save the same.
        return state, {**found, "stop": lax.pmax(call.stop, AXIS)}

    return train_call


Logits = Callable[[Any, jax.Array, Any], jax.Array]
"""(params, images, call) -> f32[N, num_classes]."""


def make_path_logits(settings: SupernetSettings) -> Logits:
    """Return the logits of the path that a `Call` names."""

    def logits_of(params: supernet.Params, images: jax.Array, call: Call) -> jax.Array:
        return supernet.apply(
            params, images, call.architecture, settings=settings, binary=call.binary
        )

    return logits_of


def make_score_call(
    settings: SupernetSettings,
    num_examples: int,
    batch_size: int,
    shards: Shards,
    logits_of: Logits | None = None,
) -> Callable[[Any, Examples, Any], dict[str, jax.Array]]:
    """Return the function of one device that scores what a call names; to be pmapped.

    It returns, for each group of devices and its own call, `correct`, int32[groups], the right
    answers, and `log_likelihood`, f32[groups], the sum over the examples of the logarithm of the
    right answer's probability. Every example counts exactly once in a group; BN uses the statistics
    of a batch over the devices that the network's settings name, or of a shard.

    Args:
        settings: of the supernet.
        num_examples: the first so many examples are scored.
        batch_size: over all devices that share a batch.
        shards: of each batch.
        logits_of: what is scored, by a call with the `passes` of `Shards.combine`; the path that
            the call names when not given.
    """
    logits_of = logits_of or make_path_logits(settings)
    indices, mask = scoring_indices(num_examples, batch_size)
    rows_of = indices.reshape(-1, shards.count, batch_size // shards.count)
    mask_of = mask.reshape(rows_of.shape)

    def score_call(params: Any, examples: Examples, call: Any) -> dict[str, jax.Array]:
        def batch(sums: dict[str, jax.Array], part: tuple[jax.Array, jax.Array]) -> Any:
            row, mask = part
            labels = examples.labels[row]
            images = normalise(examples.images[row], examples.mean, examples.std)
            logits = logits_of(params, images, call)
            hits = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.int32)
            own = {
                "correct": jnp.sum(hits * mask.astype(jnp.int32)),
                "log_likelihood": -cross_entropy_sum(logits, labels, mask),
            }
            return jax.tree.map(jnp.add, sums, own), None

        def of_shard(shard: jax.Array) -> tuple[None, dict[str, jax.Array]]:
            parts = jnp.asarray(rows_of)[:, shard], jnp.asarray(mask_of)[:, shard]
            zeros = {
                "correct": jnp.zeros((), jnp.int32),
                "log_likelihood": jnp.zeros((), jnp.float32),
            }
            sums, _ = lax.scan(batch, zeros, parts)
            return None, sums

        _, sums = shards.combine(of_shard, call.passes)

        def of_groups(own: jax.Array) -> jax.Array:
            if shards.groups == 1:
                return own[None]
            return lax.all_gather(own, AXIS)[:: shards.group_size]

        return jax.tree.map(of_groups, sums)

    return score_call
