"""The compiled functions of final training: a step on a batch, given or drawn from resident data.

A step is forward and backward through the child (or the float parent), the loss of eq. 4.17 and
4.18, and one update; gradients, running averages and metrics are averaged over the devices.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import flax
import jax
import jax.numpy as jnp
import optax
from jax import lax

from cpnas_jax import train_optimizer
from cpnas_jax.data.augment import color_jitter, cutout, normalise, random_crop_flip
from cpnas_jax.data.examples import Examples
from cpnas_jax.data.order import batch_indices, epoch_permutation, step_key
from cpnas_jax.models import losses
from cpnas_jax.models.network import Network, NetworkSettings, Outputs, stretches
from cpnas_jax.models.watch import COLLECTION
from cpnas_jax.runtime.parallel import AXIS
from cpnas_jax.steps import Run, all_finite, steps_until_bad

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
        num_devices: over all processes.
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
    num_devices: int
    crop_padding: int
    flip: bool
    color_jitter: float
    cutout: int
    total_steps: int


def make_batch_step(
    settings: StepSettings,
    optimizer: optax.GradientTransformation,
    parent_optimizer: optax.GradientTransformation | None,
    *,
    watch: bool = False,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Return (state, images f32[n, H, W, C], labels int32[n], key) -> (state, metrics).

    To be called inside a function that is pmapped over `AXIS`. Metrics are means over the global
    batch: `loss`, the `LOSS_TERMS`, `accuracy`; and `finite`, bool[], whether the loss and every
    gradient are. With `watch`, what the networks write into `watch.COLLECTION` stands beside the
    `batch_stats` of the new state.
    """
    collections = ["batch_stats", *([COLLECTION] if watch else [])]
    loss, operations = settings.loss, settings.network.operations
    network = Network(settings.network)
    scanned = frozenset(f"cells{s.first}" for s in stretches(settings.network) if s.length > 1)
    parent_network = Network(dataclasses.replace(settings.network, binary=False))

    def applied(
        model: Network, params: Any, stats: Any, images: jax.Array, rate: jax.Array, key: jax.Array
    ) -> tuple[Outputs, Any]:
        outputs, changed = model.apply(
            {"params": params, "batch_stats": stats},
            images,
            train=True,
            drop_path=rate if settings.drop_path else None,
            rngs={"drop_path": key},
            mutable=collections,
        )
        return outputs, changed if watch else changed["batch_stats"]

    def entropies(outputs: Outputs, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        main = losses.cross_entropy(outputs.logits, labels, loss.label_smoothing)
        if outputs.auxiliary is None:
            return main, jnp.zeros((), jnp.float32)
        return main, losses.cross_entropy(outputs.auxiliary, labels, loss.label_smoothing)

    def objective(
        trained: dict[str, Any], state: TrainState, images: jax.Array, labels: jax.Array, key: Any
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        rate = settings.drop_path * state.step.astype(jnp.float32) / settings.total_steps
        params = trained["child"]
        outputs, stats = applied(network, params, state.batch_stats, images, rate, key)
        main, auxiliary = entropies(outputs, labels)
        terms = dict.fromkeys(LOSS_TERMS, jnp.zeros((), jnp.float32))
        terms |= {"cross_entropy": main, "auxiliary": auxiliary}
        parent_stats = None
        if loss.parent_kernel:
            parent_outputs, parent_stats = applied(
                parent_network, trained["parent"], state.parent["batch_stats"], images, rate, key
            )
            parent_main, parent_auxiliary = entropies(parent_outputs, labels)
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
            terms["center"] = losses.center(outputs.features, labels, state.means)
        total = (
            terms["cross_entropy"]
            + loss.auxiliary_weight * terms["auxiliary"]
            + loss.reconstruction_weight * terms["reconstruction"]
            + loss.center_weight * terms["center"]
            + terms["parent"]
        )
        return total, (terms, outputs, stats, parent_stats)

    def step(
        state: TrainState, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        trained = {"child": state.params}
        if loss.parent_kernel:
            trained["parent"] = state.parent["params"]
        (total, (terms, outputs, stats, parent_stats)), gradients = jax.value_and_grad(
            objective, has_aux=True
        )(trained, state, images, labels, key)
        hits = jnp.mean((jnp.argmax(outputs.logits, axis=-1) == labels).astype(jnp.float32))
        metrics = {"loss": total, **terms, "accuracy": hits}
        gradients, metrics, stats, parent_stats = lax.pmean(
            (gradients, metrics, stats, parent_stats), AXIS
        )
        # A finite loss may have a gradient that is not.
        metrics["finite"] = all_finite((metrics["loss"], gradients))
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
            means = losses.update_means(means, outputs.features, labels, AXIS)
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
        key: uint32[2], data of the run's random key.
    """

    epoch: chex.Array
    first_step: chex.Array
    num_steps: chex.Array
    key: chex.Array


BatchStep = Callable[..., tuple[TrainState, dict[str, jax.Array]]]
"""What `make_batch_step` returns."""


def _augmented(
    settings: StepSettings, key: jax.Array, images: jax.Array, mean: jax.Array, std: jax.Array
) -> jax.Array:
    """Crop, mirror, normalise and cut out: uint8[n, H, W, C] to f32[n, H, W, C]."""
    crop_key, color_key, cut_key = jax.random.split(key, 3)
    images = random_crop_flip(crop_key, images, settings.crop_padding, settings.flip)
    strength = settings.color_jitter
    if strength:
        images = color_jitter(color_key, images, strength, strength, strength, strength / 2)
    return cutout(cut_key, normalise(images, mean, std), settings.cutout)


def make_resident_call(
    settings: StepSettings, batch_step: BatchStep, run: Run = steps_until_bad
) -> Callable[[TrainState, Examples, TrainCall], tuple[TrainState, dict[str, jax.Array]]]:
    """Return the function of one device that runs several steps on data it holds; to be pmapped.

    Metrics are sums over the steps, and `bad_step` (see `steps.steps_until_bad`). `run` runs the
    steps.
    """
    per_device = settings.batch_size // settings.num_devices

    def call_steps(
        state: TrainState, examples: Examples, call: TrainCall
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.wrap_key_data(call.key)
        device = lax.axis_index(AXIS).astype(jnp.int32)
        order = epoch_permutation(key, call.epoch, examples.labels.shape[0])

        def one(
            number: jax.Array, state: TrainState
        ) -> tuple[TrainState, dict[str, jax.Array], jax.Array]:
            rows = batch_indices(order, number, settings.batch_size, device, per_device)
            own = step_key(key, call.epoch, number, device)
            augment_key, drop_key = jax.random.split(own)
            images = _augmented(
                settings, augment_key, examples.images[rows], examples.mean, examples.std
            )
            return _judged(*batch_step(state, images, examples.labels[rows], drop_key))

        return run(one, call.first_step, call.num_steps, state, _zeros())

    return call_steps


def _judged(
    state: TrainState, metrics: dict[str, jax.Array]
) -> tuple[TrainState, dict[str, jax.Array], jax.Array]:
    """Take `finite` out of the metrics, as `steps.Step` wants it."""
    finite = metrics.pop("finite")
    return state, metrics, finite


def _zeros() -> dict[str, jax.Array]:
    """Return the sums of metrics before the first step."""
    return {name: jnp.zeros((), jnp.float32) for name in ("loss", *LOSS_TERMS, "accuracy")}


def make_stream_call(
    settings: StepSettings, batch_step: BatchStep, run: Run = steps_until_bad
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Return the function of one device that runs a step on a batch it is given; to be pmapped.

    The examples are the device's part of the batch, cropped on the host. Metrics are those of
    `make_resident_call`, of one step. Behind the arguments of that one, it takes the `bad_step` of
    the call before: the state stays as it was before a bad step, though others are on their way.
    """

    def call_step(
        state: TrainState, batch: Examples, call: TrainCall, bad: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        device = lax.axis_index(AXIS).astype(jnp.int32)
        key = jax.random.wrap_key_data(call.key)

        def one(
            number: jax.Array, state: TrainState
        ) -> tuple[TrainState, dict[str, jax.Array], jax.Array]:
            augment_key, drop_key = jax.random.split(step_key(key, call.epoch, number, device))
            images = _augmented(settings, augment_key, batch.images, batch.mean, batch.std)
            return _judged(*batch_step(state, images, batch.labels, drop_key))

        return run(one, call.first_step, jnp.int32(1), state, _zeros(), bad)

    return call_step
