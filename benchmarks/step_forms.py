"""The forms of a training step that `search_step.py` compares."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cpnas_jax.models import layers, supernet
from cpnas_jax.models.edges import EDGE_GROUPS
from cpnas_jax.models.losses import cross_entropy
from cpnas_jax.models.operations import Preprocess, apply_module, make_operation
from cpnas_jax.models.space import EDGES, NUM_EDGES, NUM_INPUTS, NUM_NODES, OPERATIONS
from cpnas_jax.path_optimizer import OptimizerSettings, PathOptimizer

OPTIMIZER = OptimizerSettings(
    learning_rate=0.1,
    child_learning_rate=0.1,
    child_optimizer="sgd",
    momentum=0.9,
    weight_decay=3e-4,
    gradient_clip=5.0,
    total_steps=100_000,
)


def edge_group(kind: str, edge: int) -> tuple[str, int, int]:
    """Return the group of an edge, its row there, and its stride."""
    for name, group in EDGE_GROUPS[kind].items():
        if edge in group.edges:
            return name, group.edges.index(edge), group.stride
    raise AssertionError(f"edge {edge} is in no group")


def sampled_names(architecture: np.ndarray, kind: str) -> list[str]:
    """Return the operation of every edge of a cell type."""
    return [OPERATIONS[i] for i in architecture[0 if kind == "normal" else 1]]


def sampled_params(params, architecture: np.ndarray, settings: supernet.SupernetSettings):
    """Return copies of what the path uses: operations by the position of their edge."""
    cells = []
    for shape, cell in zip(supernet.cell_shapes(settings), params["cells"], strict=True):
        edges = {}
        for edge, name in enumerate(sampled_names(architecture, shape.kind)):
            group, row, _ = edge_group(shape.kind, edge)
            edges[str(edge)] = jax.tree.map(lambda x, r=row: x[r], cell["edges"][group][name])
        cells.append({**cell, "edges": edges})
    return {**params, "cells": tuple(cells)}


def specialised_logits(params, images, architecture, settings, binary: bool):
    """Return the logits of one architecture, every sampled operation written out."""
    operations = settings.operations
    stem = layers.normalize(layers.conv_3x3(images, params["stem"]["kernel"]))
    previous, current = stem, stem
    for shape, cell in zip(supernet.cell_shapes(settings), params["cells"], strict=True):
        nodes = []
        for i, x in enumerate((previous, current)):
            entry = Preprocess(shape.channels, i == 0 and shape.reduce_first_input, operations)
            nodes.append(apply_module(entry, cell[f"preprocess{i}"], x, binary))
        names = sampled_names(architecture, shape.kind)
        stride = 2 if shape.kind == "reduce" else 1
        n, height, width, c = nodes[0].shape
        for target in range(NUM_INPUTS, NUM_NODES):
            total = None
            for edge in range(NUM_EDGES):
                if EDGES[edge][1] != target or names[edge] == "none":
                    continue
                _, _, edge_stride = edge_group(shape.kind, edge)
                module = make_operation(names[edge], shape.channels, edge_stride, operations)
                y = apply_module(module, cell["edges"][str(edge)], nodes[EDGES[edge][0]], binary)
                total = y if total is None else total + y
            if total is None:
                total = jnp.zeros((n, height // stride, width // stride, c), images.dtype)
            nodes.append(total)
        previous, current = current, jnp.concatenate(nodes[NUM_INPUTS:], axis=-1)
    features = jnp.mean(current, axis=(1, 2))
    return jnp.dot(features, params["classifier"]["kernel"]) + params["classifier"]["bias"][None]


def general_step(settings: supernet.SupernetSettings, optimizer: PathOptimizer):
    """Return the step of every architecture and both models."""

    def step(state, images, labels, number, architecture, binary):
        params, before = state

        def loss_of(params):
            logits = supernet.apply(params, images, architecture, settings=settings, binary=binary)
            return cross_entropy(logits, labels)

        loss, gradients = jax.value_and_grad(loss_of)(params)
        after = optimizer.update(
            gradients, before, params, architecture=architecture, binary=binary, step=number
        )
        return after, loss, optax.global_norm(gradients)

    return step


def specialised_rule() -> optax.GradientTransformation:
    """Return the optimizer of a fixed path: the same rule on fewer parameters."""
    return optax.chain(
        optax.clip_by_global_norm(OPTIMIZER.gradient_clip),
        optax.add_decayed_weights(OPTIMIZER.weight_decay),
        optax.sgd(
            optax.cosine_decay_schedule(OPTIMIZER.learning_rate, OPTIMIZER.total_steps),
            OPTIMIZER.momentum,
        ),
    )


def specialised_step(settings: supernet.SupernetSettings, architecture: np.ndarray, binary: bool):
    """Return the step of one architecture and one model."""
    rule = specialised_rule()

    def step(state, images, labels):
        params, before = state

        def loss_of(params):
            logits = specialised_logits(params, images, architecture, settings, binary)
            return cross_entropy(logits, labels)

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, after = rule.update(gradients, before, params)
        return (optax.apply_updates(params, updates), after), loss, optax.global_norm(gradients)

    return step
