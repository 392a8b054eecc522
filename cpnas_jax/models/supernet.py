"""The supernet: one program for all 8^28 architectures, which are an input.

`init` and `apply` are pure. The 14 edges of a cell are scanned, their parameters stacked; in the
scan a `lax.switch` runs the chosen operation alone. A custom gradient keeps nothing of an edge but
the cell's node values and recomputes the chosen operation in a backward scan, so memory grows with
the nodes and not with what an operation computes inside.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from cpnas_jax.models import layers
from cpnas_jax.models.operations import (
    Binary,
    OperationSettings,
    Preprocess,
    apply_module,
    make_operation,
)
from cpnas_jax.models.space import CELL_TYPES, EDGES, NUM_EDGES, NUM_INPUTS, NUM_NODES, OPERATIONS

Params = dict[str, Any]

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
class EdgeGroup:
    """Edges of a cell that share a stride and so a scan.

    Attributes:
        stride: 1 or 2.
        edges: positions in `EDGES`, in the order of the scan.
        sources: row of the source array each edge reads.
        targets: row of the node array each edge adds to.
    """

    stride: int
    edges: tuple[int, ...]
    sources: tuple[int, ...]
    targets: tuple[int, ...]


def _edge_groups() -> dict[str, dict[str, EdgeGroup]]:
    """The groups of a normal cell (all 14 edges) and of a reduction cell (8 strided, 6 inner).

    In a normal cell sources and nodes are one array of six rows. In a reduction cell the inputs
    keep their resolution and the four nodes are an array of their own.
    """
    every = tuple(range(NUM_EDGES))
    strided = tuple(e for e in every if EDGES[e][0] < NUM_INPUTS)
    inner = tuple(e for e in every if EDGES[e][0] >= NUM_INPUTS)

    def group(stride: int, edges: tuple[int, ...], first_source: int, first_node: int) -> EdgeGroup:
        return EdgeGroup(
            stride,
            edges,
            tuple(EDGES[e][0] - first_source for e in edges),
            tuple(EDGES[e][1] - first_node for e in edges),
        )

    return {
        "normal": {"stride1": group(1, every, 0, 0)},
        "reduce": {
            "stride2": group(2, strided, 0, NUM_INPUTS),
            "stride1": group(1, inner, NUM_INPUTS, NUM_INPUTS),
        },
    }


EDGE_GROUPS = _edge_groups()


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


def init(key: jax.Array, settings: SupernetSettings, image_shape: tuple[int, int, int]) -> Params:
    """Return the parameters of a supernet, float32.

    Args:
        key: random key.
        settings: shape of the supernet.
        image_shape: (height, width, channels) of an image.

    Returns:
        `stem`, `classifier`, and `cells`, a tuple of `preprocess0`, `preprocess1` and `edges`:
        group -> operation -> leaves whose leading axis are the group's edges. Child and parent
        have the same structure.
    """
    shapes = jax.eval_shape(lambda: _template(settings, image_shape))
    leaves, structure = jax.tree.flatten(shapes)
    ends = np.cumsum([math.prod(leaf.shape) for leaf in leaves])
    # One draw for all weights: a draw each would take a minute to compile.
    draws = jax.random.normal(key, (int(ends[-1]),))
    values = [
        part.reshape(leaf.shape)
        for part, leaf in zip(jnp.split(draws, ends[:-1]), leaves, strict=True)
    ]
    return jax.tree_util.tree_map_with_path(_scale_draw, jax.tree.unflatten(structure, values))


def _scale_draw(path: tuple[Any, ...], draw: jax.Array) -> jax.Array:
    """Give a leaf's normal draw the standard deviation sqrt(2 / fan-in) (He et al. 2015).

    Our choice, for the latent weights of the child too; the classifier has sqrt(1 / fan-in) and a
    bias of 0.
    """
    keys = [getattr(entry, "key", None) for entry in path]
    if keys[-1] == "bias":
        return jnp.zeros_like(draw)
    shape = draw.shape[1:] if "edges" in keys else draw.shape
    # A depthwise kernel [k, k, C] sums over its k * k taps only.
    fan_in = math.prod(shape[:2] if "depthwise" in keys else shape[:-1])
    gain = 1.0 if "classifier" in keys else 2.0
    return draw * math.sqrt(gain / fan_in)


def _template(settings: SupernetSettings, image_shape: tuple[int, int, int]) -> Params:
    """Parameters of the right structure and shapes, whatever their values."""
    stem_channels = STEM_MULTIPLIER * settings.channels
    inputs = [stem_channels, stem_channels]
    cells = []
    for shape in cell_shapes(settings):
        cell: Params = {
            f"preprocess{i}": _module_params(_preprocess(shape, i, settings.operations), inputs[i])
            for i in range(2)
        }
        cell["edges"] = {
            name: _edge_params(group, shape.channels, settings.operations)
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


def _preprocess(shape: CellShape, position: int, settings: OperationSettings) -> Preprocess:
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
) -> jax.Array:
    """Return the logits of the sampled path.

    Args:
        params: of `init`.
        images: f32[N, H, W, C], normalised.
        architecture: int32[2, 14], the chosen operation of every edge of the normal and of the
            reduction cell.
        settings: shape of the supernet.
        binary: child (True), parent (False), or a traced boolean.

    Returns:
        f32[N, num_classes].

    Raises:
        AssertionError: an array has another shape or dtype.
    """
    chex.assert_rank(images, 4)
    chex.assert_type(images, jnp.float32)
    chex.assert_shape(architecture, (len(CELL_TYPES), NUM_EDGES))
    chex.assert_type(architecture, jnp.int32)
    formulation = settings.operations.formulation
    stem = layers.normalize(
        layers.conv_3x3(images, params["stem"]["kernel"], formulation=formulation)
    )
    previous, current = stem, stem
    for shape, cell in zip(cell_shapes(settings), params["cells"], strict=True):
        choices = architecture[CELL_TYPES.index(shape.kind)]
        inputs = [
            apply_module(
                _preprocess(shape, i, settings.operations), cell[f"preprocess{i}"], x, binary
            )
            for i, x in enumerate((previous, current))
        ]
        nodes = _run_cell(shape, settings.operations, cell["edges"], inputs, choices, binary)
        previous, current = current, jnp.concatenate(tuple(nodes), axis=-1)
    features = jnp.mean(current, axis=(1, 2))
    classifier = params["classifier"]
    return jnp.dot(features, classifier["kernel"]) + classifier["bias"][None]


def _run_cell(
    shape: CellShape,
    settings: OperationSettings,
    edges: Params,
    inputs: list[jax.Array],
    choices: jax.Array,
    binary: Binary,
) -> jax.Array:
    """Return the four intermediate nodes of a cell, f[4, N, H', W', C]."""
    flag = jnp.asarray(binary)
    static = binary if isinstance(binary, bool) else None

    def run(name: str, sources: jax.Array | None, nodes: jax.Array) -> jax.Array:
        group = EDGE_GROUPS[shape.kind][name]
        scan = EdgeScan(group, EdgeKind(shape.channels, group.stride, settings, static))
        chosen = choices[jnp.asarray(group.edges)]
        return _scan_edges(scan, edges[name], sources, nodes, chosen, flag)

    stacked = jnp.stack(inputs)
    n, height, width, c = stacked.shape[1:]
    if shape.kind == "normal":
        empty = jnp.zeros((NUM_NODES - NUM_INPUTS, n, height, width, c), stacked.dtype)
        return run("stride1", None, jnp.concatenate([stacked, empty]))[NUM_INPUTS:]
    halved = (NUM_NODES - NUM_INPUTS, n, -(-height // 2), -(-width // 2), c)
    return run("stride1", None, run("stride2", stacked, jnp.zeros(halved, stacked.dtype)))


@dataclasses.dataclass(frozen=True)
class EdgeKind:
    """What decides the program of an edge; hashable, so that equal edges are traced once.

    Attributes:
        channels: of the cell.
        stride: 1 or 2.
        settings: of the operations.
        binary: child or parent, or None where a traced flag says so.
    """

    channels: int
    stride: int
    settings: OperationSettings
    binary: bool | None


@dataclasses.dataclass(frozen=True)
class EdgeScan:
    """The static part of a scan over the edges of a group; hashable."""

    group: EdgeGroup
    kind: EdgeKind


@functools.cache
def _forward_branches(kind: EdgeKind) -> tuple[Callable[..., jax.Array], ...]:
    """For each of `OPERATIONS`, (edge params, x, total, flag) -> total + operation(x)."""

    def branch(name: str) -> Callable[..., jax.Array]:
        operation = _operation(kind, name)
        if name == "none":
            return lambda params, x, total, flag: total
        return jax.jit(lambda params, x, total, flag: total + operation(params[name], x, flag))

    return tuple(branch(name) for name in OPERATIONS)


@functools.cache
def _backward_branches(kind: EdgeKind) -> tuple[Callable[..., tuple[Params, jax.Array]], ...]:
    """For each of `OPERATIONS`, recompute it and return its gradients.

    (edge params, x, cotangent, total, flag) -> gradients of the edge's parameters, zero for the
    other operations; total + gradient of x.
    """

    def branch(name: str) -> Callable[..., tuple[Params, jax.Array]]:
        operation = _operation(kind, name)

        def pull(
            params: Params, x: jax.Array, cotangent: jax.Array, total: jax.Array, flag: jax.Array
        ) -> tuple[Params, jax.Array]:
            zeros = jax.tree.map(jnp.zeros_like, params)
            if name == "none":
                return zeros, total
            _, pullback = jax.vjp(lambda p, x: operation(p, x, flag), params[name], x)
            gradient, x_gradient = pullback(cotangent)
            return {**zeros, name: gradient}, total + x_gradient

        return jax.jit(pull)

    return tuple(branch(name) for name in OPERATIONS)


def _operation(kind: EdgeKind, name: str) -> Callable[[Params, jax.Array, jax.Array], jax.Array]:
    module = make_operation(name, kind.channels, kind.stride, kind.settings)

    def operation(params: Params, x: jax.Array, flag: jax.Array) -> jax.Array:
        binary = flag if kind.binary is None else kind.binary
        return apply_module(module, params, x, binary)

    return operation


def _row(array: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(array, index, keepdims=False)


def _with_row(array: jax.Array, index: jax.Array, row: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(array, row, index, 0)


def _scanned(group: EdgeGroup, choices: jax.Array, params: Params) -> tuple[Any, ...]:
    sources = jnp.asarray(group.sources, jnp.int32)
    targets = jnp.asarray(group.targets, jnp.int32)
    return sources, targets, choices, params


def _run_edges(
    scan: EdgeScan,
    params: Params,
    inputs: jax.Array | None,
    nodes: jax.Array,
    choices: jax.Array,
    flag: jax.Array,
) -> jax.Array:
    """Run the edges of a group one after the other; return the nodes with the sums added.

    Args:
        scan: which edges, and what they are.
        params: operation -> leaves [edges, ...].
        inputs: f[S, N, H, W, C] that the edges read, or None where they read the nodes.
        nodes: f[T, N, H', W', C] that the edges add to.
        choices: int32[edges].
        flag: child or parent, unless static in `scan`.
    """

    def step(nodes: jax.Array, edge: tuple[Any, ...]) -> tuple[jax.Array, None]:
        source, target, choice, edge_params = edge
        x = _row(nodes if inputs is None else inputs, source)
        branches = _forward_branches(scan.kind)
        total = lax.switch(choice, branches, edge_params, x, _row(nodes, target), flag)
        return _with_row(nodes, target, total), None

    nodes, _ = lax.scan(step, nodes, _scanned(scan.group, choices, params))
    return nodes


def _scan_edges_forward(
    scan: EdgeScan,
    params: Params,
    inputs: jax.Array | None,
    nodes: jax.Array,
    choices: jax.Array,
    flag: jax.Array,
) -> tuple[jax.Array, Any]:
    nodes = _run_edges(scan, params, inputs, nodes, choices, flag)
    return nodes, (params, inputs, None if inputs is not None else nodes, choices, flag)


def _scan_edges_backward(scan: EdgeScan, residuals: Any, cotangent: jax.Array) -> Any:
    params, inputs, nodes, choices, flag = residuals
    read = nodes if inputs is None else inputs

    def step(read_cotangents: jax.Array, edge: tuple[Any, ...]) -> tuple[jax.Array, Params]:
        source, target, choice, edge_params = edge
        upstream = read_cotangents if inputs is None else cotangent
        gradient, total = lax.switch(
            choice,
            _backward_branches(scan.kind),
            edge_params,
            _row(read, source),
            _row(upstream, target),
            _row(read_cotangents, source),
            flag,
        )
        return _with_row(read_cotangents, source, total), gradient

    # In reverse every edge that leaves a node comes before those that enter it: the node's
    # cotangent is complete when it is read.
    read_cotangents, gradients = lax.scan(
        step,
        cotangent if inputs is None else jnp.zeros_like(inputs),
        _scanned(scan.group, choices, params),
        reverse=True,
    )
    if inputs is None:
        return gradients, None, read_cotangents, None, None
    return gradients, read_cotangents, cotangent, None, None


_scan_edges = jax.custom_vjp(_run_edges, nondiff_argnums=(0,))
_scan_edges.defvjp(_scan_edges_forward, _scan_edges_backward)
