"""Batch statistics over several devices, against one device that holds the whole batch."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import QUICK

from cpnas_jax.models import layers, network
from cpnas_jax.models.layers import StatisticsAxis
from cpnas_jax.models.network import Network, NetworkSettings

DEVICES = 4


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def value_and_gradient(x, weights, over=None):
    """Of a sum of normalised values, with respect to what is normalised."""

    def objective(x):
        y = layers.normalize(x, over)
        return jnp.sum(jnp.sin(y) * weights), y

    (_, y), gradient = jax.value_and_grad(objective, has_aux=True)(x)
    return y, gradient


@pytest.mark.parametrize("groups", [None, ((0, 1), (2, 3)), ((3, 0), (1, 2))])
def test_normalisation_over_devices_and_over_groups_of_them(groups):
    x, weights = normal((DEVICES, 2, 3, 3, 5)) + 1, normal((DEVICES, 2, 3, 3, 5), 1)
    over = StatisticsAxis("devices", groups)
    program = jax.pmap(
        lambda x, weights: value_and_gradient(x, weights, over),
        axis_name="devices",
        devices=jax.devices()[:DEVICES],
    )
    found, gradient = program(x, weights)
    for group in groups or (range(DEVICES),):
        own = list(group)
        whole = [array[own].reshape(-1, 3, 3, 5) for array in (x, weights)]
        expected = value_and_gradient(*map(jnp.asarray, whole))
        for array, one_device in zip((found, gradient), expected, strict=True):
            np.testing.assert_allclose(
                np.asarray(array)[own].reshape(-1, 3, 3, 5), one_device, rtol=1e-4, atol=1e-5
            )


def test_without_an_axis_devices_stay_apart():
    x, weights = normal((2, 2, 3, 3, 5)), normal((2, 2, 3, 3, 5), 1)
    program = jax.pmap(value_and_gradient, axis_name="devices")
    found, gradient = program(x, weights)
    for device in range(2):
        expected = value_and_gradient(jnp.asarray(x[device]), weights[device])
        np.testing.assert_allclose(found[device], expected[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradient[device], expected[1], rtol=1e-4, atol=1e-5)
    assert "all_reduce" not in program.lower(x, weights).as_text()


def test_a_constant_channel_keeps_a_finite_gradient():
    """Its variance is 0, or below it by rounding before it is clamped."""
    x = jnp.full((2, 2, 3, 3, 5), 0.1) * 1e3
    program = jax.pmap(
        lambda x: value_and_gradient(x, 1.0, StatisticsAxis("devices")), axis_name="devices"
    )
    y, gradient = program(x)
    np.testing.assert_allclose(y, np.zeros(x.shape), atol=1e-2)
    assert np.isfinite(gradient).all()


EDGES = (
    *((0, 2, "max_pool_3x3"), (1, 3, "skip_connect")),
    *((2, 4, "dil_conv_3x3"), (4, 5, "skip_connect")),
)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_final_network_over_two_devices(recompute):
    """Logits, gradient and running averages; of the parent, whose values rounding cannot flip."""
    settings = NetworkSettings(EDGES, EDGES, 1, 4, 5, binary=False, recompute=recompute)
    shared = dataclasses.replace(settings.operations, statistics=StatisticsAxis("devices"))
    images, weights = normal((2, 3, 8, 8, 3)), normal((2, 3, 5), 1)
    # Made outside of any axis.
    variables = jax.jit(
        lambda key: network.init(key, dataclasses.replace(settings, operations=shared), (8, 8, 3)),
        compiler_options=QUICK,
    )(jax.random.key(0))

    def gradient(settings, images, weights):
        def objective(params):
            outputs, changed = Network(settings).apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            value = jnp.sum(jnp.sin(outputs.logits + outputs.auxiliary) * weights)
            return value, (outputs.logits, changed["batch_stats"])

        (_, outputs), gradient = jax.value_and_grad(objective, has_aux=True)(variables["params"])
        return *outputs, gradient

    def on_a_device(images, weights):
        own = dataclasses.replace(settings, operations=shared)
        logits, stats, own_gradient = gradient(own, images, weights)
        return logits, stats, jax.lax.psum(own_gradient, "devices")

    program = jax.pmap(on_a_device, axis_name="devices")
    logits, stats, found = jax.device_get(
        program.lower(images, weights).compile(QUICK)(images, weights)
    )
    whole = jax.jit(lambda *arguments: gradient(settings, *arguments), compiler_options=QUICK)
    expected, expected_stats, expected_gradient = jax.device_get(
        whole(images.reshape(6, 8, 8, 3), weights.reshape(6, 5))
    )
    np.testing.assert_allclose(logits.reshape(6, 5), expected, rtol=1e-3, atol=1e-4)
    for tree, one_device in ((stats, expected_stats), (found, expected_gradient)):
        jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf[0], leaf[1]), tree)
        first = jax.tree.map(lambda leaf: leaf[0], tree)
        largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(one_device))
        chex.assert_trees_all_close(first, one_device, rtol=1e-3, atol=2e-5 * largest)
