"""Each term of the loss against its formula in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpnas_jax.models import losses
from cpnas_jax.models.binarize import Binarizer

KERNELS = {
    ("cells0", "edge0_2", "unit0", "depthwise", "kernel"): (3, 3, 4),
    ("cells0", "preprocess0", "conv", "kernel"): (6, 4),
    ("cells1", "preprocess0", "conv", "kernel"): (2, 8, 4),
}
SCANNED = frozenset({"cells1"})


def kernels(seed):
    generator = np.random.default_rng(seed)
    return {
        path: jnp.asarray(generator.normal(size=shape), jnp.float32)
        for path, shape in KERNELS.items()
    }


def expected_reconstruction(latent, own):
    total = 0.0
    for path, child in own.items():
        cells = (
            zip(latent[path], child, strict=True) if path[0] in SCANNED else [(latent[path], child)]
        )
        for h, c in cells:
            h, c = np.asarray(h, np.float64), np.asarray(c, np.float64)
            for channel in range(c.shape[-1]):
                signs = np.where(c[..., channel] >= 0, 1.0, -1.0)
                reconstructed = np.abs(c[..., channel]).mean() * signs
                total += np.square(h[..., channel] - reconstructed).mean()
    return total


def test_reconstruction_is_a_sum_over_filters():
    own, other = kernels(0), kernels(1)
    found = losses.reconstruction(own, own, SCANNED, Binarizer())
    np.testing.assert_allclose(found, expected_reconstruction(own, own), rtol=1e-5)
    found = losses.reconstruction(other, own, SCANNED, Binarizer())
    np.testing.assert_allclose(found, expected_reconstruction(other, own), rtol=1e-5)


def test_its_gradient_moves_the_filter_towards_its_reconstruction():
    own = kernels(0)
    gradients = jax.grad(lambda h: losses.reconstruction(h, h, SCANNED, Binarizer()))(own)
    path = ("cells0", "preprocess0", "conv", "kernel")
    h = np.asarray(own[path], np.float64)
    scale = np.abs(h).mean(axis=0)
    expected = 2 / len(h) * (h - np.where(h >= 0, 1, -1) * scale)
    np.testing.assert_allclose(gradients[path], expected, rtol=1e-4, atol=1e-6)


def test_with_a_parent_both_sides_have_a_gradient():
    own, other = kernels(0), kernels(1)
    sides = jax.grad(
        lambda h, c: losses.reconstruction(h, c, SCANNED, Binarizer()), argnums=(0, 1)
    )(other, own)
    for side in sides:
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(side))


@pytest.mark.parametrize("binary_preprocess", [True, False])
def test_binary_kernels_are_those_of_the_cells(binary_preprocess):
    params = {
        "stem": {"conv0": {"kernel": 0}},
        "cells0": {
            "preprocess0": {"conv": {"kernel": 1}, "ending": {"norm": {"affine": {"scale": 2}}}},
            "edge0_2": {"unit0": {"pointwise": {"kernel": 3}}},
        },
        "auxiliary": {"conv0": {"kernel": 4}},
        "classifier": {"kernel": 5, "bias": 6},
    }
    found = losses.binary_kernels(params, binary_preprocess)
    assert sorted(found.values()) == ([1, 3] if binary_preprocess else [3])


def test_center_is_half_the_mean_square_without_gradient_of_the_means():
    generator = np.random.default_rng(0)
    features = jnp.asarray(generator.normal(size=(5, 2, 2, 3)), jnp.float32)
    means = jnp.asarray(generator.normal(size=(4, 2, 2, 3)), jnp.float32)
    labels = jnp.asarray([0, 3, 3, 1, 0], jnp.int32)
    expected = 0.5 * np.square(features - means[labels]).mean()
    np.testing.assert_allclose(losses.center(features, labels, means), expected, rtol=1e-6)
    assert not np.any(jax.grad(losses.center, argnums=2)(features, labels, means))


def test_means_of_absent_classes_stay():
    features = jnp.asarray(np.arange(8, dtype=np.float32).reshape(4, 1, 1, 2))
    labels = jnp.asarray([1, 1, 0, 1], jnp.int32)
    means = jnp.ones((3, 1, 1, 2))
    found = np.asarray(losses.update_means(means, *losses.class_sums(features, labels, 3)))[:, 0, 0]
    np.testing.assert_allclose(found[0], 0.9 + 0.1 * np.asarray([4, 5]), rtol=1e-6)
    np.testing.assert_allclose(found[1], 0.9 + 0.1 * np.asarray([8 / 3, 11 / 3]), rtol=1e-6)
    np.testing.assert_array_equal(found[2], [1, 1])


def test_a_class_begins_with_the_mean_of_its_first_batch():
    features = jnp.asarray(np.arange(8, dtype=np.float32).reshape(4, 1, 1, 2))
    labels = jnp.asarray([1, 1, 0, 1], jnp.int32)
    means = jnp.zeros((3, 1, 1, 2)).at[0].set(1)
    # Before, only the class that has a mean counts: 3^2 + 4^2 of eight elements.
    assert float(losses.center(features, labels, means)) == pytest.approx(0.5 * (9 + 16) / 8)
    found = np.asarray(losses.update_means(means, *losses.class_sums(features, labels, 3)))[:, 0, 0]
    np.testing.assert_allclose(found[1], [8 / 3, 11 / 3], rtol=1e-6)
    np.testing.assert_array_equal(found[2], [0, 0])


def test_sums_of_parts_add_up_to_those_of_the_batch():
    generator = np.random.default_rng(0)
    features = jnp.asarray(generator.normal(size=(2, 3, 1, 1, 2)), jnp.float32)
    labels = jnp.asarray([[0, 1, 1], [1, 2, 0]], jnp.int32)
    parts = [losses.class_sums(*part, 4) for part in zip(features, labels, strict=True)]
    whole = losses.class_sums(features.reshape(6, 1, 1, 2), labels.reshape(6), 4)
    for first, second, both in zip(*parts, whole, strict=True):
        np.testing.assert_allclose(first + second, both, rtol=1e-5, atol=1e-7)


def test_label_smoothing():
    logits = jnp.asarray([[2.0, 0.5, -1.0], [0.0, 1.0, 3.0]])
    labels = jnp.asarray([0, 1], jnp.int32)
    log_p = np.asarray(logits) - np.log(np.exp(np.asarray(logits)).sum(1, keepdims=True))
    plain = -log_p[[0, 1], [0, 1]].mean()
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), plain, rtol=1e-6)
    smooth = -(0.9 * log_p[[0, 1], [0, 1]] + 0.1 * log_p.mean(1)).mean()
    np.testing.assert_allclose(losses.cross_entropy(logits, labels, 0.1), smooth, rtol=1e-6)
