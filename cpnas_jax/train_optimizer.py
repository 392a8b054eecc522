"""Optax chains of final training.

child   clip, decay of float kernels alone, Adam, warm-up and cosine
float   clip, decay of everything, SGD with momentum, warm-up and cosine (DARTS)
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class RateSettings:
    """Course of the learning rate, in steps.

    Attributes:
        peak: the rate after the warm-up.
        warmup_steps: linear from 0.
        total_steps: the cosine ends here, at 0.
    """

    peak: float
    warmup_steps: int
    total_steps: int


def learning_rate(settings: RateSettings) -> optax.Schedule:
    """Return step -> rate: linear warm-up, then a cosine to 0."""
    cosine = optax.cosine_decay_schedule(
        settings.peak, max(1, settings.total_steps - settings.warmup_steps)
    )
    if not settings.warmup_steps:
        return cosine
    warmup = optax.linear_schedule(0.0, settings.peak, settings.warmup_steps)
    return optax.join_schedules([warmup, cosine], [settings.warmup_steps])


def peak_rate(rate: float, batch_size: int, reference_batch: int) -> float:
    """Scale a rate with the global batch (Goyal et al. 2017); a reference of 0 does not."""
    return rate * batch_size / reference_batch if reference_batch else rate


def make_optimizer(
    name: str,
    rate: RateSettings,
    *,
    momentum: float,
    weight_decay: float,
    gradient_clip: float,
    binary_kernels: Any,
) -> optax.GradientTransformation:
    """Return the chain of a network.

    Args:
        name: `adam` or `sgd`.
        rate: course of the learning rate.
        momentum: of SGD.
        weight_decay: added to the gradient before the moments, as in PyTorch.
        gradient_clip: bound on the global norm.
        binary_kernels: tree of booleans like the parameters. With `adam` neither these, whose
            signs would flip as they shrink, nor vectors (BN, biases, thresholds) decay.

    Raises:
        ValueError: no such optimizer.
    """

    def decays(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _, binary: getattr(path[-1], "key", "") == "kernel" and not binary,
            params,
            binary_kernels,
        )

    if name == "adam":
        moments = optax.scale_by_adam()
        decay = optax.add_decayed_weights(weight_decay, mask=decays)
    elif name == "sgd":
        moments = optax.trace(momentum)
        decay = optax.add_decayed_weights(weight_decay)
    else:
        raise ValueError(f"optimizer is {name!r}; offered are adam, sgd")
    return optax.chain(
        optax.clip_by_global_norm(gradient_clip),
        decay,
        moments,
        optax.scale_by_learning_rate(learning_rate(rate)),
    )


def update(
    optimizer: optax.GradientTransformation, gradients: Any, state: Any, params: Any
) -> tuple[Any, Any]:
    """Return new parameters and state."""
    # Optax's schedules and Adam mix integer counts and floats, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state


def moving_average(average: Any, values: Any, decay: float, step: jax.Array) -> Any:
    """Return d * average + (1 - d) * values, leaf by leaf.

    Args:
        average: tree of f32 arrays.
        values: the same tree.
        decay: d after many steps; before, it is at most (1 + step) / (10 + step), so that the
            first weights are soon forgotten.
        step: int32[], updates before this one.
    """
    count = step.astype(jnp.float32)
    d = jnp.minimum(jnp.float32(decay), (1 + count) / (10 + count))
    return jax.tree.map(lambda a, v: d * a + (1 - d) * v, average, values)
