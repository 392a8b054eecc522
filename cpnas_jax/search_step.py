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
import numpy as np
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
from cpnas_jax.models.losses import cross_entropy
from cpnas_jax.models.supernet import SupernetSettings
from cpnas_jax.path_optimizer import PathOptimizer
from cpnas_jax.runtime.parallel import AXIS
from cpnas_jax.runtime.shards import Shards


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
        architecture: int32[2, 14].
        binary: bool[], child or parent.
        epoch: int32[], number of the sampled epoch.
        first_step: int32[], within the epoch.
        num_steps: int32[], of this call.
        stop: int32[], 1 where this process was asked to stop; another value in each process.
        passes: int32[], see `Shards.combine`.
        key: uint32[2], data of the run's random key.
    """

    architecture: chex.Array
    binary: chex.Array
    epoch: chex.Array
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
        batch_size: global, over all devices.
        shards: of each batch.
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


def make_train_call(
    settings: StepSettings, optimizer: PathOptimizer
) -> Callable[[ModelState, Examples, Call], tuple[ModelState, dict[str, jax.Array]]]:
    """Return the function of one device that runs several training steps; to be pmapped.

    It returns the new state and sums over the steps: `loss`, of the global batches' means, and
    `correct`, of the training examples; and `stop`, whether any process was asked to.
    """
    size = settings.batch_size // settings.shards.count

    def loss_of(
        params: supernet.Params, images: jax.Array, labels: jax.Array, call: Call
    ) -> tuple[jax.Array, jax.Array]:
        logits = supernet.apply(
            params, images, call.architecture, settings=settings.supernet, binary=call.binary
        )
        correct = jnp.sum(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.int32)
        return cross_entropy(logits, labels), correct

    def train_call(
        state: ModelState, examples: Examples, call: Call
    ) -> tuple[ModelState, dict[str, jax.Array]]:
        key = jax.random.wrap_key_data(call.key)
        order = epoch_permutation(key, call.epoch, examples.labels.shape[0])

        def step(
            offset: jax.Array, carry: tuple[ModelState, dict[str, jax.Array]]
        ) -> tuple[ModelState, dict[str, jax.Array]]:
            state, sums = carry
            number = call.first_step + offset

            def of_shard(shard: jax.Array) -> tuple[Any, jax.Array]:
                rows = batch_indices(order, number, settings.batch_size, shard, size)
                draws = position_draws(
                    step_key(key, call.epoch, number), shard_positions(shard, size), CROP_DRAWS
                )
                images = random_crop_flip(
                    draws, examples.images[rows], settings.crop_padding, settings.flip
                )
                images = normalise(images, examples.mean, examples.std)
                (loss, correct), gradients = jax.value_and_grad(loss_of, has_aux=True)(
                    state.params, images, examples.labels[rows], call
                )
                return (gradients, loss), correct

            (gradients, loss), correct = settings.shards.combine(of_shard, call.passes)
            params, optimizer_state = optimizer.update(
                gradients,
                state.optimizer,
                state.params,
                architecture=call.architecture,
                binary=call.binary,
                step=call.epoch * settings.steps_per_epoch + number,
            )
            sums = {"loss": sums["loss"] + loss, "correct": sums["correct"] + correct}
            return ModelState(params, optimizer_state), sums

        zeros = {"loss": jnp.zeros((), jnp.float32), "correct": jnp.zeros((), jnp.int32)}
        # The number of steps is an input: a last, shorter call of an epoch is the same program.
        state, sums = lax.fori_loop(jnp.int32(0), call.num_steps, step, (state, zeros))
        # All processes learn it at the same step, and so save the same.
        return state, {**sums, "stop": lax.pmax(call.stop, AXIS)}

    return train_call


def make_score_call(
    settings: SupernetSettings, num_examples: int, batch_size: int, shards: Shards
) -> Callable[[supernet.Params, Examples, Call], jax.Array]:
    """Return the function of one device that counts the correct answers; to be pmapped.

    Every example counts exactly once over all devices; BN uses the statistics of a batch over the
    devices that `settings` names, or of a shard.
    """
    indices, mask = scoring_indices(num_examples, batch_size)
    rows_of = indices.reshape(-1, shards.count, batch_size // shards.count)
    mask_of = mask.reshape(rows_of.shape).astype(np.int32)

    def score_call(params: supernet.Params, examples: Examples, call: Call) -> jax.Array:
        def batch(correct: jax.Array, part: tuple[jax.Array, jax.Array]) -> Any:
            row, mask = part
            logits = supernet.apply(
                params,
                normalise(examples.images[row], examples.mean, examples.std),
                call.architecture,
                settings=settings,
                binary=call.binary,
            )
            hits = (jnp.argmax(logits, axis=-1) == examples.labels[row]).astype(jnp.int32)
            return correct + jnp.sum(hits * mask), None

        def of_shard(shard: jax.Array) -> tuple[None, jax.Array]:
            parts = jnp.asarray(rows_of)[:, shard], jnp.asarray(mask_of)[:, shard]
            correct, _ = lax.scan(batch, jnp.zeros((), jnp.int32), parts)
            return None, correct

        _, correct = shards.combine(of_shard, call.passes)
        return correct

    return score_call
