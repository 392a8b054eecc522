"""The compiled functions of final training: a step on a batch, given or drawn from resident data.

A step is forward and backward through the child (or the float parent), the loss of eq. 4.17 and
4.18, and one update; gradients, running averages and metrics are averaged over the devices.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax
import jax
import jax.numpy as jnp
import optax
from jax import lax

from cpnas_jax import train_optimizer
from cpnas_jax.data.augment import (
    COLOR_DRAWS,
    CROP_DRAWS,
    CUT_DRAWS,
    color_jitter,
    cutout,
    normalise,
    random_crop_flip,
)
from cpnas_jax.data.examples import Examples
from cpnas_jax.data.order import batch_indices, epoch_permutation, shard_positions, step_key
from cpnas_jax.models import losses
from cpnas_jax.models.draws import position_draws
from cpnas_jax.models.network import DropPath, Network, NetworkSettings, Outputs, stretches
from cpnas_jax.runtime.parallel import AXIS
from cpnas_jax.runtime.shards import Shards

LOSS_TERMS = ("cross_entropy", "auxiliary", "reconstruction", "center", "parent")
"""Logged apart, unweighted; `loss` is their weighted sum."""


@flax.struct.dataclass
class TrainState:
    """All that training changes.

    Attributes:
        params: of `network.init`.
        batch_stats: running averages of BN.
        optimizer: optax state.
        average: moving average of `params` and `batch_stats`, under these names, or None. The
            averaged weights have other signs, and so other statistics, than the last ones.
        means: f32[classes, H, W, C], class means of the features, or None.
        parent: {"params", "batch_stats", "optimizer"} of a float parent trained beside the child
            (`parent_kernel`), or None.
        step: int32[], steps taken.
    """

    params: Any
    batch_stats: Any
    optimizer: Any
    average: Any
    means: Any
    parent: Any
    step: chex.Array


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Weights of the loss; the paper publishes none (see `losses`).

    Attributes:
        label_smoothing: share of the target spread over all classes.
        auxiliary_weight: of the auxiliary classifier's cross-entropy.
        reconstruction_weight: of the first term of L_H; 0 leaves it out.
        center_weight: lambda; 0 leaves the term out.
        parent_kernel: H are the kernels of a float parent that is trained beside the child.
    """

    label_smoothing: float
    auxiliary_weight: float
    reconstruction_weight: float
    center_weight: float
    parent_kernel: bool


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """The static side of a step.

    Attributes:
        network: shape of the network.
        loss: weights of the loss.
        drop_path: rate at the last step; it rises linearly from 0 (DARTS).
        average_decay: of the moving average of the weights; 0 keeps none.
        batch_size: global.
        shards: of each batch.
        crop_padding: border of the random crop.
        flip: whether images are mirrored at random.
        color_jitter: strength of brightness, contrast and saturation, and twice that of the hue;
            0 changes nothing.
        cutout: side of the square cut out; 0 cuts nothing.
        total_steps: of the whole training.
    """

    network: NetworkSettings
    loss: LossSettings
    drop_path: float
    average_decay: float
    batch_size: int
    shards: Shards
    crop_padding: int
    flip: bool
    color_jitter: float
    cutout: int
    total_steps: int


class Shard(NamedTuple):
    """A shard of a batch, augmented.

    Attributes:
        images: f32[n, H, W, C].
        labels: int32[n].
        positions: int32[n], in the global batch.
    """

    images: jax.Array
    labels: jax.Array
    positions: jax.Array


LoadShard = Callable[[jax.Array], Shard]
"""Gives the shard of a number."""


def make_batch_step(
    settings: StepSettings,
    optimizer: optax.GradientTransformation,
    parent_optimizer: optax.GradientTransformation | None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Return (state, load, key, passes) -> (state, metrics).

    `load` gives the `Shard` of a number, the key is that of drop path, and for the passes see
    `Shards.combine`. To be called inside a function that is pmapped over `AXIS`. Metrics are means
    over the global batch: `loss`, the `LOSS_TERMS`, `accuracy`; and `finite`, bool[], whether the
    loss and every gradient are.
    """
    loss, operations = settings.loss, settings.network.operations
    network = Network(settings.network)
    scanned = frozenset(f"cells{s.first}" for s in stretches(settings.network) if s.length > 1)
    parent_network = Network(dataclasses.replace(settings.network, binary=False))

    def applied(
        model: Network, params: Any, stats: Any, shard: Shard, rate: jax.Array, key: jax.Array
    ) -> tuple[Outputs, Any]:
        outputs, changed = model.apply(
            {"params": params, "batch_stats": stats},
            shard.images,
            train=True,
            drop_path=DropPath(rate, shard.positions) if settings.drop_path else None,
            rngs={"drop_path": key},
            mutable=["batch_stats"],
        )
        return outputs, changed["batch_stats"]

    def entropies(outputs: Outputs, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        main = losses.cross_entropy(outputs.logits, labels, loss.label_smoothing)
        if outputs.auxiliary is None:
            return main, jnp.zeros((), jnp.float32)
        return main, losses.cross_entropy(outputs.auxiliary, labels, loss.label_smoothing)

    def objective(
        trained: dict[str, Any], state: TrainState, shard: Shard, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        rate = settings.drop_path * state.step.astype(jnp.float32) / settings.total_steps
        params = trained["child"]
        outputs, stats = applied(network, params, state.batch_stats, shard, rate, key)
        main, auxiliary = entropies(outputs, shard.labels)
        terms = dict.fromkeys(LOSS_TERMS, jnp.zeros((), jnp.float32))
        terms |= {"cross_entropy": main, "auxiliary": auxiliary}
        parent_stats = None
        if loss.parent_kernel:
            parent_outputs, parent_stats = applied(
                parent_network, trained["parent"], state.parent["batch_stats"], shard, rate, key
            )
            parent_main, parent_auxiliary = entropies(parent_outputs, shard.labels)
            terms["parent"] = parent_main + loss.auxiliary_weight * parent_auxiliary
        if loss.reconstruction_weight:
            own = losses.binary_kernels(params, operations.binary_preprocess)
            latent = own
            if loss.parent_kernel:
                latent = losses.binary_kernels(trained["parent"], operations.binary_preprocess)
            terms["reconstruction"] = losses.reconstruction(
                latent, own, scanned, operations.binarizer
            )
        if loss.center_weight:
            terms["center"] = losses.center(outputs.features, shard.labels, state.means)
        total = (
            terms["cross_entropy"]
            + loss.auxiliary_weight * terms["auxiliary"]
            + loss.reconstruction_weight * terms["reconstruction"]
            + loss.center_weight * terms["center"]
            + terms["parent"]
        )
        return total, (terms, outputs, stats, parent_stats)

    def step(
        state: TrainState, load: LoadShard, key: jax.Array, passes: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        trained = {"child": state.params}
        if loss.parent_kernel:
            trained["parent"] = state.parent["params"]

        def of_shard(number: jax.Array) -> tuple[Any, Any]:
            shard = load(number)
            (total, (terms, outputs, stats, parent_stats)), gradients = jax.value_and_grad(
                objective, has_aux=True
            )(trained, state, shard, key)
            right = jnp.argmax(outputs.logits, axis=-1) == shard.labels
            metrics = {
                "loss": total,
                **terms,
                "accuracy": jnp.mean(right.astype(jnp.float32)),
            }
            sums = None
            if loss.center_weight:
                classes = settings.network.num_classes
                sums = losses.class_sums(outputs.features, shard.labels, classes)
            return (gradients, metrics, stats, parent_stats), sums

        (gradients, metrics, stats, parent_stats), sums = settings.shards.combine(of_shard, passes)
        # A finite loss may have a gradient that is not: the weights after it would be saved.
        checked = [metrics["loss"], *jax.tree.leaves(gradients)]
        metrics["finite"] = jnp.stack([jnp.isfinite(leaf).all() for leaf in checked]).all()
        params, optimizer_state = train_optimizer.update(
            optimizer, gradients["child"], state.optimizer, state.params
        )
        average = state.average
        if settings.average_decay:
            average = train_optimizer.moving_average(
                average,
                {"params": params, "batch_stats": stats},
                settings.average_decay,
                state.step,
            )
        means = state.means
        if loss.center_weight:
            means = losses.update_means(means, *sums)
        parent = state.parent
        if loss.parent_kernel:
            assert parent_optimizer is not None
            parent_params, parent_state = train_optimizer.update(
                parent_optimizer, gradients["parent"], parent["optimizer"], parent["params"]
            )
            parent = {
                "params": parent_params,
                "batch_stats": parent_stats,
                "optimizer": parent_state,
            }
        return (
            TrainState(params, stats, optimizer_state, average, means, parent, state.step + 1),
            metrics,
        )

    return step


@flax.struct.dataclass
class TrainCall:
    """What tells one call from another; arrays, so that no call compiles anew.

    Attributes:
        epoch: int32[].
        first_step: int32[], within the epoch.
        num_steps: int32[], of this call; a call on a given batch is one step.
        stop: int32[], 1 where this process was asked to stop; another value in each process.
        passes: int32[], see `Shards.combine`.
        key: uint32[2], data of the run's random key.
    """

    epoch: chex.Array
    first_step: chex.Array
    num_steps: chex.Array
    stop: chex.Array
    passes: chex.Array
    key: chex.Array


BatchStep = Callable[..., tuple[TrainState, dict[str, jax.Array]]]
"""What `make_batch_step` returns."""


def _augmented(
    settings: StepSettings, key: jax.Array, examples: Examples, positions: jax.Array
) -> Shard:
    """Crop, mirror, normalise and cut out the examples that have these positions in the batch."""
    # All are drawn whatever is used: turning one change off does not change the others.
    draws = position_draws(key, positions, CROP_DRAWS + COLOR_DRAWS + CUT_DRAWS)
    crop, color, cut = jnp.split(draws, (CROP_DRAWS, CROP_DRAWS + COLOR_DRAWS), axis=1)
    images = random_crop_flip(crop, examples.images, settings.crop_padding, settings.flip)
    strength = settings.color_jitter
    if strength:
        images = color_jitter(color, images, strength, strength, strength, strength / 2)
    images = cutout(cut, normalise(images, examples.mean, examples.std), settings.cutout)
    return Shard(images, examples.labels, positions)


def make_resident_call(
    settings: StepSettings, batch_step: BatchStep
) -> Callable[[TrainState, Examples, TrainCall], tuple[TrainState, dict[str, jax.Array]]]:
    """Return the function of one device that runs several steps on data it holds; to be pmapped.

    Metrics are sums over the steps, and `bad_step`, the first step of the epoch whose loss or
    gradient, or the sum of a metric up to it, was not finite, or -1; and `stop`, whether any
    process was asked to.
    """
    size = settings.batch_size // settings.shards.count

    def call_steps(
        state: TrainState, examples: Examples, call: TrainCall
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.wrap_key_data(call.key)
        order = epoch_permutation(key, call.epoch, examples.labels.shape[0])

        def one(number: jax.Array, state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
            augment_key, drop_key = jax.random.split(step_key(key, call.epoch, number))

            def load(shard: jax.Array) -> Shard:
                rows = batch_indices(order, number, settings.batch_size, shard, size)
                own = dataclasses.replace(
                    examples, images=examples.images[rows], labels=examples.labels[rows]
                )
                return _augmented(settings, augment_key, own, shard_positions(shard, size))

            return batch_step(state, load, drop_key, call.passes)

        names = ("loss", *LOSS_TERMS, "accuracy")
        zeros: dict[str, jax.Array] = {name: jnp.zeros((), jnp.float32) for name in names}
        zeros["bad_step"] = jnp.full((), -1, jnp.int32)

        def body(offset: jax.Array, carry: tuple[TrainState, dict[str, jax.Array]]) -> Any:
            state, sums = carry
            number = call.first_step + offset
            new, metrics = one(number, state)
            failed = sums["bad_step"] >= 0
            totals = {name: sums[name] + metrics[name] for name in names}
            bad = ~metrics["finite"] | ~jnp.isfinite(jnp.stack(list(totals.values()))).all()
            totals["bad_step"] = jnp.where(~failed & bad, number, sums["bad_step"])
            return new, totals

        state, sums = lax.fori_loop(jnp.int32(0), call.num_steps, body, (state, zeros))
        # All processes learn it at the same step, and so save the same.
        return state, {**sums, "stop": lax.pmax(call.stop, AXIS)}

    return call_steps


def make_stream_call(
    settings: StepSettings, batch_step: BatchStep
) -> Callable[[TrainState, Examples, TrainCall], tuple[TrainState, dict[str, jax.Array]]]:
    """Return the function of one device that runs a step on a batch it is given; to be pmapped.

    The examples are the device's part of the batch, cropped on the host. Metrics are those of
    `make_resident_call`, of one step.
    """

    size = settings.batch_size // settings.shards.count

    def call_step(
        state: TrainState, batch: Examples, call: TrainCall
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.wrap_key_data(call.key)
        augment_key, drop_key = jax.random.split(step_key(key, call.epoch, call.first_step))

        def load(shard: jax.Array) -> Shard:
            # Devices follow each other as their parts of the batch do, process by process.
            images, labels = settings.shards.local_rows((batch.images, batch.labels), shard)
            own = dataclasses.replace(batch, images=images, labels=labels)
            return _augmented(settings, augment_key, own, shard_positions(shard, size))

        state, metrics = batch_step(state, load, drop_key, call.passes)
        bad_step = jnp.where(metrics.pop("finite"), -1, call.first_step)
        return state, {**metrics, "bad_step": bad_step, "stop": lax.pmax(call.stop, AXIS)}

    return call_step
