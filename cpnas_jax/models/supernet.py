"""The supernet: one program for all 8^28 architectures, which are an input.

`init` and `apply` are pure. The 14 edges of a cell are scanned, their parameters stacked; see
`edges.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from cpnas_jax.models import layers
from cpnas_jax.models.edges import (
    CHOSEN,
    EDGE_GROUPS,
    GATED,
    EdgeForm,
    EdgeGroup,
    EdgeKind,
    EdgeScan,
    Params,
    scan_edges,
)
from cpnas_jax.models.initial import draw_kernels
from cpnas_jax.models.operations import (
    Binary,
    OperationSettings,
    Preprocess,
    apply_module,
    make_operation,
)
from cpnas_jax.models.space import CELL_TYPES, NUM_EDGES, NUM_INPUTS, NUM_NODES, OPERATIONS

STEM_MULTIPLIER = 3
"""The stem gives three times the first cell's channels (DARTS)."""


@dataclasses.dataclass(frozen=True)
class SupernetSettings:
    """Shape of the supernet; hashable.

    Attributes:
        cells: number of cells.
        channels: C of the first cell; doubled by every reduction cell.
        reductions: positions of the reduction cells.
        num_classes: outputs of the classifier.
        operations: what the operations share.
    """

    cells: int
    channels: int
    reductions: tuple[int, ...]
    num_classes: int
    operations: OperationSettings = dataclasses.field(default_factory=OperationSettings)


@dataclasses.dataclass(frozen=True)
class CellShape:
    """What a cell is in its network: kind, channels, and whether its first input is larger."""

    kind: str
    channels: int
    reduce_first_input: bool


def cell_shapes(settings: SupernetSettings) -> tuple[CellShape, ...]:
    """Return the kind and the channels of every cell, first to last."""
    shapes = []
    channels, after_reduction = settings.channels, False
    for position in range(settings.cells):
        reduction = position in settings.reductions
        channels *= 2 if reduction else 1
        shapes.append(CellShape(CELL_TYPES[int(reduction)], channels, after_reduction))
        after_reduction = reduction
    return tuple(shapes)


def init(
    key: jax.Array,
    settings: SupernetSettings,
    image_shape: tuple[int, int, int],
    partial: int = 1,
) -> Params:
    """Return the parameters of a supernet, float32.

    Args:
        key: random key.
        settings: shape of the supernet.
        image_shape: (height, width, channels) of an image.
        partial: the operations of an edge see C // partial of the cell's channels (`mixture.py`).

    Returns:
        `stem`, `classifier`, and `cells`, a tuple of `preprocess0`, `preprocess1` and `edges`:
        group -> operation -> leaves whose leading axis are the group's edges. Child and parent
        have the same structure.
    """
    shapes = jax.eval_shape(lambda: _template(settings, image_shape, partial))
    return draw_kernels(key, shapes, lambda keys: "edges" in keys)


def _template(
    settings: SupernetSettings, image_shape: tuple[int, int, int], partial: int
) -> Params:
    """Parameters of the right structure and shapes, whatever their values."""
    stem_channels = STEM_MULTIPLIER * settings.channels
    inputs = [stem_channels, stem_channels]
    cells = []
    for shape in cell_shapes(settings):
        cell: Params = {
            f"preprocess{i}": _module_params(preprocess(shape, i, settings.operations), inputs[i])
            for i in range(2)
        }
        cell["edges"] = {
            name: _edge_params(group, shape.channels // partial, settings.operations)
            for name, group in EDGE_GROUPS[shape.kind].items()
        }
        cells.append(cell)
        inputs = [inputs[1], (NUM_NODES - NUM_INPUTS) * shape.channels]
    return {
        "stem": {"kernel": jnp.zeros((3, 3, image_shape[-1], stem_channels))},
        "cells": tuple(cells),
        "classifier": {
            "kernel": jnp.zeros((inputs[1], settings.num_classes)),
            "bias": jnp.zeros((settings.num_classes,)),
        },
    }


def preprocess(shape: CellShape, position: int, settings: OperationSettings) -> Preprocess:
    """Return the module that one of a cell's two inputs goes through."""
    return Preprocess(shape.channels, position == 0 and shape.reduce_first_input, settings)


def _module_params(module: nn.Module, channels: int) -> Params:
    # Kernels depend on channels alone, so any small image will do.
    dummy = jnp.zeros((1, 4, 4, channels))
    return dict(module.init(jax.random.key(0), dummy, False).get("params", {}))


def _edge_params(group: EdgeGroup, channels: int, settings: OperationSettings) -> Params:
    def stacked(leaf: jax.Array) -> jax.Array:
        return jnp.zeros((len(group.edges), *leaf.shape))

    return {
        name: jax.tree.map(
            stacked,
            _module_params(make_operation(name, channels, group.stride, settings), channels),
        )
        for name in OPERATIONS
    }


def apply(
    params: Params,
    images: jax.Array,
    architecture: jax.Array,
    *,
    settings: SupernetSettings,
    binary: Binary,
    gates: jax.Array | None = None,
) -> jax.Array:
    """Return the logits of the sampled path.

    Args:
        params: of `init`.
        images: f32[N, H, W, C], normalised.
        architecture: int32[2, 14], the chosen operation of every edge of the normal and of the
            reduction cell.
        settings: shape of the supernet.
        binary: child (True), parent (False), or a traced boolean.
        gates: f32[2, 14], factors of the chosen operations' outputs, each with the sum of its
            gradients over the cells of the type; that of `none` is 0. None: no factors.

    Returns:
        f32[N, num_classes].

    Raises:
        AssertionError: an array has another shape or dtype.
    """
    chex.assert_shape(architecture, (len(CELL_TYPES), NUM_EDGES))
    chex.assert_type(architecture, jnp.int32)
    if gates is not None:
        chex.assert_shape(gates, architecture.shape)
        chex.assert_type(gates, jnp.float32)

    def nodes_of(shape: CellShape, edges: Params, inputs: list[jax.Array]) -> jax.Array:
        position = CELL_TYPES.index(shape.kind)
        choices = architecture[position]
        scan = CellScan(shape, shape.channels, settings.operations, binary)
        if gates is None:
            return scan.run(CHOSEN, edges, inputs, choices)
        return scan.run(GATED, edges, inputs, (choices, gates[position]))

    return logits_by_cells(params, images, settings, binary, nodes_of)


CellNodes = Callable[[CellShape, Params, list[jax.Array]], jax.Array]
"""(shape, parameters of the edges, two inputs) -> four intermediate nodes f[4, N, H', W', C]."""


def logits_by_cells(
    params: Params,
    images: jax.Array,
    settings: SupernetSettings,
    binary: Binary,
    nodes_of: CellNodes,
) -> jax.Array:
    """Return the logits of stem, cells and classifier, f32[N, num_classes].

    Args:
        params: of `init`.
        images: f32[N, H, W, C], normalised.
        settings: shape of the supernet.
        binary: child (True), parent (False), or a traced boolean.
        nodes_of: what the edges of a cell make of its preprocessed inputs.

    Raises:
        AssertionError: the images have another rank or dtype.
    """
    chex.assert_rank(images, 4)
    chex.assert_type(images, jnp.float32)
    formulation = settings.operations.formulation
    stem = layers.normalize(
        layers.conv_3x3(images, params["stem"]["kernel"], formulation=formulation),
        settings.operations.statistics,
    )
    previous, current = stem, stem
    for shape, cell in zip(cell_shapes(settings), params["cells"], strict=True):
        inputs = [
            apply_module(
                preprocess(shape, i, settings.operations), cell[f"preprocess{i}"], x, binary
            )
            for i, x in enumerate((previous, current))
        ]
        nodes = nodes_of(shape, cell["edges"], inputs)
        previous, current = current, jnp.concatenate(tuple(nodes), axis=-1)
    features = jnp.mean(current, axis=(1, 2))
    classifier = params["classifier"]
    return jnp.dot(features, classifier["kernel"]) + classifier["bias"][None]


@dataclasses.dataclass(frozen=True)
class CellScan:
    """The scans over the edges of a cell.

    Attributes:
        shape: of the cell.
        channels: that the operations of an edge see.
        settings: of the operations.
        binary: child (True), parent (False), or a traced boolean.
    """

    shape: CellShape
    channels: int
    settings: OperationSettings
    binary: Binary

    def run(self, form: EdgeForm, edges: Params, inputs: list[jax.Array], own: Any) -> jax.Array:
        """Return the four intermediate nodes of the cell, f[4, N, H', W', C].

        Args:
            form: what is done at an edge.
            edges: group -> operation -> leaves [edges of the group, ...].
            inputs: the two preprocessed inputs.
            own: of each edge, leaves [14, ...]; what the form takes.
        """
        flag = jnp.asarray(self.binary)
        static = self.binary if isinstance(self.binary, bool) else None

        def run(name: str, sources: jax.Array | None, nodes: jax.Array) -> jax.Array:
            group = EDGE_GROUPS[self.shape.kind][name]
            kind = EdgeKind(self.channels, group.stride, self.settings, static)
            rows = jnp.asarray(group.edges)
            own_rows = jax.tree.map(lambda leaf: leaf[rows], own)
            scan = EdgeScan(group, kind, form)
            return scan_edges(scan, edges[name], sources, nodes, own_rows, flag)

        stacked = jnp.stack(inputs)
        n, height, width, c = stacked.shape[1:]
        if self.shape.kind == "normal":
            empty = jnp.zeros((NUM_NODES - NUM_INPUTS, n, height, width, c), stacked.dtype)
            return run("stride1", None, jnp.concatenate([stacked, empty]))[NUM_INPUTS:]
        halved = (NUM_NODES - NUM_INPUTS, n, -(-height // 2), -(-width // 2), c)
        return run("stride1", None, run("stride2", stacked, jnp.zeros(halved, stacked.dtype)))
