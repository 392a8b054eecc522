"""The loss of final training, eq. 4.17 and 4.18 of CP-NAS, term by term.

    L = L_CE + L_H
    L_H = sum over layers and filters of MSE(H, H_hat)
          + lambda / 2 sum over images s of |f_s - fbar(class of s)|^2

H are the child's float latent filters, H_hat = a sign(H) their scaled signs, f_s the last feature
map, fbar the mean feature map of a class. The paper publishes neither coefficients nor what is
averaged; both are ours: each term has a weight, the feature term is a mean over elements and
batch, and fbar is an exponential moving average without gradient that begins with the mean of the
first batch with the class.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from cpnas_jax.models.binarize import Binarizer, binarize_weights, weight_scale

CENTER_DECAY = 0.9
"""Of the moving class means (ours)."""


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Return the mean cross-entropy with smoothed labels, f32[].

    Args:
        logits: f32[N, classes].
        labels: int32[N].
        smoothing: share of the target spread evenly over all classes, static.
    """
    if not smoothing:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))


def cross_entropy_sum(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    """Return the weighted sum of the cross-entropies, f32[]: weights f32[N]."""
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, labels) * weights)


def is_binary_kernel(path: tuple[Any, ...], binary_preprocess: bool) -> bool:
    """Tell whether a parameter of `network.Network` is a latent kernel of a binary convolution.

    Args:
        path: of `jax.tree_util`, in the tree of `params`.
        binary_preprocess: as in `OperationSettings`.
    """
    keys = [getattr(entry, "key", "") for entry in path]
    if keys[-1] != "kernel" or not keys[0].startswith("cells"):
        return False
    return binary_preprocess or not keys[1].startswith("preprocess")


def binary_kernels(params: Any, binary_preprocess: bool) -> dict[tuple[str, ...], jax.Array]:
    """Return path -> latent kernel of every binary convolution; child and parent share paths."""
    return {
        tuple(entry.key for entry in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if is_binary_kernel(path, binary_preprocess)
    }


def reconstruction(
    latent: dict[tuple[str, ...], jax.Array],
    own: dict[tuple[str, ...], jax.Array],
    scanned: frozenset[str],
    binarizer: Binarizer,
) -> jax.Array:
    """Return the first term of eq. 4.17, sum over layers and filters of MSE(H, H_hat), f32[].

    Args:
        latent: of `binary_kernels`: H.
        own: of `binary_kernels`: the child's, whose scaled signs are H_hat. The same object as
            `latent` unless H is a float parent's. Where it is the same, H_hat is a constant and the
            gradient moves H towards it; otherwise both sides have a gradient, H_hat through sign
            and scale (our choice).
        scanned: first components of the paths whose kernels have a leading axis of cells.
        binarizer: estimator and scale.
    """

    def of_kernel(h: jax.Array, child: jax.Array) -> jax.Array:
        signs, scale = binarize_weights(child, binarizer)
        if latent is own:
            reconstructed = lax.stop_gradient(signs * _over_last(scale, child))
        else:
            reconstructed = signs * _over_last(weight_scale(child, binarizer), child)
        error = jnp.square(h - reconstructed)
        return jnp.sum(jnp.mean(error, axis=tuple(range(error.ndim - 1))))

    total = jnp.zeros((), jnp.float32)
    for path, child in own.items():
        cells = jax.vmap(of_kernel) if path[0] in scanned else of_kernel
        total = total + jnp.sum(cells(latent[path], child))
    return total


def _over_last(scale: jax.Array, kernel: jax.Array) -> jax.Array:
    return scale.reshape((1,) * (kernel.ndim - 1) + (-1,))


def center(features: jax.Array, labels: jax.Array, means: jax.Array) -> jax.Array:
    """Return the second term of eq. 4.18 without lambda: half the mean squared distance, f32[].

    Classes that were not seen yet, whose means are zeros, add nothing.

    Args:
        features: f32[N, H, W, C], f_s.
        labels: int32[N].
        means: f32[classes, H, W, C], fbar; without gradient.
    """
    chex.assert_equal_shape([features[0], means[0]])
    distances = jnp.square(features - lax.stop_gradient(means)[labels])
    return 0.5 * jnp.mean(jnp.where(_seen(means)[labels], distances, 0))


def _seen(means: jax.Array) -> jax.Array:
    """Tell which classes have a mean, bool[classes, 1, 1, 1]."""
    return jnp.any(means != 0, axis=(1, 2, 3), keepdims=True)


def class_sums(features: jax.Array, labels: jax.Array, classes: int) -> tuple[jax.Array, jax.Array]:
    """Return each class's sum of features and number of examples; parts of a batch add up.

    Args:
        features: f32[N, H, W, C].
        labels: int32[N].
        classes: how many, static.

    Returns:
        f32[classes, H, W, C] and f32[classes].
    """
    members = jax.nn.one_hot(labels, classes, dtype=jnp.float32)
    sums = jnp.einsum("nk,nhwc->khwc", members, lax.stop_gradient(features))
    return sums, jnp.sum(members, axis=0)


def update_means(means: jax.Array, sums: jax.Array, counts: jax.Array) -> jax.Array:
    """Move the class means towards those of a batch, or begin with it; absent classes keep theirs.

    Args:
        means: f32[classes, H, W, C].
        sums: of `class_sums`, of the whole batch.
        counts: likewise.
    """
    batch = sums / jnp.maximum(counts, 1)[:, None, None, None]
    moved = jnp.where(_seen(means), CENTER_DECAY * means + (1 - CENTER_DECAY) * batch, batch)
    return jnp.where(counts[:, None, None, None] > 0, moved, means)
