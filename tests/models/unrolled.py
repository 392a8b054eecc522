"""Supernets and their inputs for tests, and the same network written out edge by edge."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cpnas_jax.models import layers, supernet
from cpnas_jax.models.operations import Preprocess, make_operation
from cpnas_jax.models.space import EDGES, NUM_EDGES, OPERATIONS
from cpnas_jax.models.supernet import SupernetSettings

CLASSES = 5
THREE_CELLS = SupernetSettings(cells=3, channels=4, reductions=(1, 2), num_classes=CLASSES)


def shapes_of(settings, image_shape=(8, 8, 3)):
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda key: supernet.init(key, settings, image_shape), key)


@functools.cache
def params_of(settings, seed=0):
    """Random parameters of the supernet's shapes; drawn by numpy, which compiles nothing."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(generator.normal(size=leaf.shape) * 0.6, leaf.dtype),
        shapes_of(settings),
    )


def images_of(size=(16, 16), batch=4, seed=5):
    generator = np.random.default_rng(seed)
    return jnp.asarray(generator.normal(size=(batch, *size, 3)), jnp.float32)


# In place of labels: a fixed random direction of the logits.
DIRECTION = np.random.default_rng(11).normal(size=(4, CLASSES)).astype(np.float32)


def loss(logits):
    return jnp.sum(jnp.sin(logits) * DIRECTION)


# The reference: the cells of DARTS edge by edge, plain autodiff, library convolutions.


def edge_params(cell, edge, reduction, name):
    """The slice of the stacked parameters that belongs to one edge of `EDGES`."""
    inputs = [e for e, (source, _) in enumerate(EDGES) if source < 2]
    others = [e for e in range(NUM_EDGES) if e not in inputs]
    if not reduction:
        group, position = "stride1", edge
    elif edge in inputs:
        group, position = "stride2", inputs.index(edge)
    else:
        group, position = "stride1", others.index(edge)
    return jax.tree.map(lambda leaf: leaf[position], cell["edges"][group][name])


def written_out(params, images, flag, settings, edge_of):
    """Logits of a network whose edges are added up one after the other.

    `edge_of` makes of (cell, its parameters, edge, stride, x, operations' settings) what the edge
    gives.
    """
    operations = settings.operations
    if operations.formulation == "auto":
        operations = dataclasses.replace(operations, formulation="native")
    stem = layers.normalize(
        lax.conv_general_dilated(
            images,
            params["stem"]["kernel"],
            (1, 1),
            [(1, 1), (1, 1)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
    )
    outputs, channels, larger = [stem, stem], settings.channels, False
    for position, cell in enumerate(params["cells"]):
        reduction = position in settings.reductions
        channels = 2 * channels if reduction else channels
        nodes = [
            Preprocess(channels, i == 0 and larger, operations).apply(
                {"params": cell[f"preprocess{i}"]}, outputs[i - 2], flag
            )
            for i in (0, 1)
        ]
        for target in (2, 3, 4, 5):
            total = 0.0
            for edge, (source, into) in enumerate(EDGES):
                if into == target:
                    stride = 2 if reduction and source < 2 else 1
                    x = nodes[source]
                    total = total + edge_of(reduction, cell, edge, stride, x, operations)
            nodes.append(total)
        outputs.append(jnp.concatenate(nodes[2:], axis=-1))
        larger = reduction
    features = jnp.mean(outputs[-1], (1, 2))
    return features @ params["classifier"]["kernel"] + params["classifier"]["bias"][None, :]


@functools.cache
def _jitted(name, channels, stride, operations, flag):
    module = make_operation(name, channels, stride, operations)
    return jax.jit(lambda weights, x: module.apply({"params": weights}, x, flag))


def operation_of(name, reduction, cell, edge, stride, x, flag, operations):
    """What an operation of an edge makes of x; compiled once if it is not part of a program."""
    if name == "none":
        return jnp.zeros_like(x[:, ::stride, ::stride])
    weights = edge_params(cell, edge, reduction, name)
    return _jitted(name, x.shape[-1], stride, operations, flag)(weights, x)


def reference_network(params, images, architecture, flag, settings, gates=None):
    """Logits of a network whose architecture is known before it is traced."""
    architecture = np.asarray(architecture)

    def edge_of(reduction, cell, edge, stride, x, operations):
        name = OPERATIONS[architecture[int(reduction), edge]]
        y = operation_of(name, reduction, cell, edge, stride, x, flag, operations)
        return y if gates is None else gates[int(reduction), edge] * y

    return written_out(params, images, flag, settings, edge_of)


def reference(params, images, architecture, flag, settings):
    def objective(params, images):
        logits = reference_network(params, images, architecture, flag, settings)
        return loss(logits), logits

    return jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(params, images)
