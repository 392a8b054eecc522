"""The sampled path of a supernet, written out edge by edge, for a diagnosis."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cpnas_jax.models import layers
from cpnas_jax.models.edges import EDGE_GROUPS, Params
from cpnas_jax.models.operations import make_operation
from cpnas_jax.models.space import CELL_TYPES, EDGES, NUM_INPUTS, NUM_NODES, OPERATIONS
from cpnas_jax.models.supernet import CellShape, SupernetSettings, cell_shapes, preprocess
from cpnas_jax.models.watch import BAD, COLLECTION, badness, watched


def watch_path(
    params: Params,
    images: jax.Array,
    architecture: np.ndarray,
    *,
    settings: SupernetSettings,
    binary: bool,
) -> tuple[jax.Array, dict[str, Any]]:
    """Apply the sampled path as `supernet.apply` does, every layer by itself.

    Args:
        params: of `supernet.init`.
        images: f32[N, H, W, C], normalised.
        architecture: int[2, 14].
        settings: shape of the supernet.
        binary: child or parent.

    Returns:
        The logits f32[N, num_classes], and what `watch.watched` notes, in a tree with the names
        that the discrete network has: `stem`, `cells0` with `preprocess0` and `edge0_2`, and so on.
    """
    stem = layers.conv_3x3(
        images, params["stem"]["kernel"], formulation=settings.operations.formulation
    )
    previous = current = layers.normalize(stem, settings.operations.statistics)
    notes: dict[str, Any] = {"stem": {"conv0": {BAD: badness(stem)}, BAD: badness(current)}}
    for number, shape in enumerate(cell_shapes(settings)):
        cell_notes = dict[str, Any]()
        inputs = []
        for i, x in enumerate((previous, current)):
            module = preprocess(shape, i, settings.operations)
            own = params["cells"][number][f"preprocess{i}"]
            y, cell_notes[f"preprocess{i}"] = _noted(module, own, x, binary)
            inputs.append(y)
        choices = architecture[CELL_TYPES.index(shape.kind)]
        edges = params["cells"][number]["edges"]
        nodes, edge_notes = _watch_edges(shape, settings, edges, inputs, choices, binary)
        cell_notes.update(edge_notes)
        previous, current = current, jnp.concatenate(nodes, axis=-1)
        notes[f"cells{number}"] = {**cell_notes, BAD: badness(current)}
    classifier = params["classifier"]
    logits = jnp.mean(current, axis=(1, 2)) @ classifier["kernel"] + classifier["bias"][None]
    notes["classifier"] = {BAD: badness(logits)}
    return logits, notes


def _noted(
    module: nn.Module, params: Params, x: jax.Array, binary: bool
) -> tuple[jax.Array, dict[str, Any]]:
    with watched():
        y, variables = module.apply({"params": params}, x, binary, mutable=[COLLECTION])
    assert isinstance(y, jax.Array)
    return y, dict(variables[COLLECTION])


def _watch_edges(
    shape: CellShape,
    settings: SupernetSettings,
    edges: Params,
    inputs: list[jax.Array],
    choices: np.ndarray,
    binary: bool,
) -> tuple[list[jax.Array], dict[str, Any]]:
    """Return the four intermediate nodes of a cell, and what its edges note."""
    nodes, notes = list(inputs), dict[str, Any]()
    for target in range(NUM_INPUTS, NUM_NODES):
        total: jax.Array | None = None
        for name, group in EDGE_GROUPS[shape.kind].items():
            for row, edge in enumerate(group.edges):
                source, node = EDGES[edge]
                if node != target:
                    continue
                operation = OPERATIONS[int(choices[edge])]
                module = make_operation(
                    operation, shape.channels, group.stride, settings.operations
                )
                own = jax.tree.map(lambda leaf, row=row: leaf[row], edges[name][operation])
                y, notes[f"edge{source}_{target}"] = _noted(module, own, nodes[source], binary)
                total = y if total is None else total + y
        assert total is not None
        nodes.append(total)
    return nodes[NUM_INPUTS:], notes
