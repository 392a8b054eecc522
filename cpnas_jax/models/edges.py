"""The edges of a supernet's cell: a scan in which only the chosen operations run.

A `lax.switch` in the scan runs the chosen operation alone. A custom gradient keeps nothing of an
edge but the cell's node values and recomputes the chosen operation in a backward scan, so memory
grows with the nodes and not with what an operation computes inside.

What an edge does is its form: `CHOSEN`, or `GATED` where a factor of the chosen operation's output
has a gradient too; `mixture.py` has a third, in which all operations run.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cpnas_jax.models.operations import OperationSettings, apply_module, make_operation
from cpnas_jax.models.space import EDGES, NUM_EDGES, NUM_INPUTS, OPERATIONS

Params = dict[str, Any]


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
class EdgeForm:
    """What a scan does at an edge; hashable.

    `own` is what the edge has beside its parameters, such as the choice of its operation: a row of
    the arrays that `scan_edges` is given.

    Attributes:
        forward: (kind, own, params, x, total, flag) -> total + what the edge makes of x.
        backward: (kind, own, params, x, cotangent, total, flag) -> gradients of params, those of
            own (None for integers), and total + the gradient of x.
    """

    forward: Callable[..., jax.Array]
    backward: Callable[..., tuple[Params, Any, jax.Array]]


@dataclasses.dataclass(frozen=True)
class EdgeScan:
    """The static part of a scan over the edges of a group; hashable."""

    group: EdgeGroup
    kind: EdgeKind
    form: EdgeForm


@functools.cache
def _forward_branches(kind: EdgeKind) -> tuple[Callable[..., jax.Array], ...]:
    """For each of `OPERATIONS`, (edge params, x, total, flag) -> total + operation(x)."""

    def branch(name: str) -> Callable[..., jax.Array]:
        operation = edge_operation(kind, name)
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
        operation = edge_operation(kind, name)

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


def _chosen_forward(
    kind: EdgeKind,
    choice: jax.Array,
    params: Params,
    x: jax.Array,
    total: jax.Array,
    flag: jax.Array,
) -> jax.Array:
    return lax.switch(choice, _forward_branches(kind), params, x, total, flag)


def _chosen_backward(
    kind: EdgeKind,
    choice: jax.Array,
    params: Params,
    x: jax.Array,
    cotangent: jax.Array,
    total: jax.Array,
    flag: jax.Array,
) -> tuple[Params, None, jax.Array]:
    gradient, total = lax.switch(
        choice, _backward_branches(kind), params, x, cotangent, total, flag
    )
    return gradient, None, total


CHOSEN = EdgeForm(_chosen_forward, _chosen_backward)
"""Own of an edge: the number of its operation, int32[]."""


@functools.cache
def _gated_forward_branches(kind: EdgeKind) -> tuple[Callable[..., jax.Array], ...]:
    """As `_forward_branches`, with the gate as first argument."""

    def branch(name: str) -> Callable[..., jax.Array]:
        operation = edge_operation(kind, name)
        if name == "none":
            return lambda gate, params, x, total, flag: total
        return jax.jit(
            lambda gate, params, x, total, flag: total + gate * operation(params[name], x, flag)
        )

    return tuple(branch(name) for name in OPERATIONS)


@functools.cache
def _gated_backward_branches(kind: EdgeKind) -> tuple[Callable[..., tuple[Any, ...]], ...]:
    """As `_backward_branches`, with the gate as first argument and its gradient as first result."""

    def branch(name: str) -> Callable[..., tuple[Any, ...]]:
        operation = edge_operation(kind, name)

        def pull(
            gate: jax.Array,
            params: Params,
            x: jax.Array,
            cotangent: jax.Array,
            total: jax.Array,
            flag: jax.Array,
        ) -> tuple[jax.Array, Params, jax.Array]:
            zeros = jax.tree.map(jnp.zeros_like, params)
            if name == "none":
                return jnp.zeros_like(gate), zeros, total
            _, pullback = jax.vjp(
                lambda gate, p, x: gate * operation(p, x, flag), gate, params[name], x
            )
            gate_gradient, gradient, x_gradient = pullback(cotangent)
            return gate_gradient, {**zeros, name: gradient}, total + x_gradient

        return jax.jit(pull)

    return tuple(branch(name) for name in OPERATIONS)


def _gated_forward(kind: EdgeKind, own: tuple[jax.Array, jax.Array], *arguments: Any) -> jax.Array:
    choice, gate = own
    return lax.switch(choice, _gated_forward_branches(kind), gate, *arguments)


def _gated_backward(
    kind: EdgeKind, own: tuple[jax.Array, jax.Array], *arguments: Any
) -> tuple[Params, Any, jax.Array]:
    choice, gate = own
    gate_gradient, gradient, total = lax.switch(
        choice, _gated_backward_branches(kind), gate, *arguments
    )
    return gradient, (None, gate_gradient), total


GATED = EdgeForm(_gated_forward, _gated_backward)
"""Own of an edge: the number of its operation, int32[], and its gate, f32[], by which the output is
multiplied. The gate of `none` has the gradient 0."""


def edge_operation(
    kind: EdgeKind, name: str
) -> Callable[[Params, jax.Array, jax.Array], jax.Array]:
    """Return (params of the operation, x, flag) -> its output."""
    module = make_operation(name, kind.channels, kind.stride, kind.settings)

    def operation(params: Params, x: jax.Array, flag: jax.Array) -> jax.Array:
        binary = flag if kind.binary is None else kind.binary
        return apply_module(module, params, x, binary)

    return operation


def _row(array: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(array, index, keepdims=False)


def _with_row(array: jax.Array, index: jax.Array, row: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(array, row, index, 0)


def _scanned(group: EdgeGroup, own: Any, params: Params) -> tuple[Any, ...]:
    sources = jnp.asarray(group.sources, jnp.int32)
    targets = jnp.asarray(group.targets, jnp.int32)
    return sources, targets, own, params


def _run_edges(
    scan: EdgeScan,
    params: Params,
    inputs: jax.Array | None,
    nodes: jax.Array,
    own: Any,
    flag: jax.Array,
) -> jax.Array:
    """Run the edges of a group one after the other; return the nodes with the sums added.

    Args:
        scan: which edges, and what they are.
        params: operation -> leaves [edges, ...].
        inputs: f[S, N, H, W, C] that the edges read, or None where they read the nodes.
        nodes: f[T, N, H', W', C] that the edges add to.
        own: of each edge, leaves [edges, ...]; what the form takes.
        flag: child or parent, unless static in `scan`.
    """

    def step(nodes: jax.Array, edge: tuple[Any, ...]) -> tuple[jax.Array, None]:
        source, target, own, edge_params = edge
        x = _row(nodes if inputs is None else inputs, source)
        total = scan.form.forward(scan.kind, own, edge_params, x, _row(nodes, target), flag)
        return _with_row(nodes, target, total), None

    nodes, _ = lax.scan(step, nodes, _scanned(scan.group, own, params))
    return nodes


def _scan_edges_forward(
    scan: EdgeScan,
    params: Params,
    inputs: jax.Array | None,
    nodes: jax.Array,
    own: Any,
    flag: jax.Array,
) -> tuple[jax.Array, Any]:
    nodes = _run_edges(scan, params, inputs, nodes, own, flag)
    return nodes, (params, inputs, None if inputs is not None else nodes, own, flag)


def _scan_edges_backward(scan: EdgeScan, residuals: Any, cotangent: jax.Array) -> Any:
    params, inputs, nodes, own, flag = residuals
    read = nodes if inputs is None else inputs

    def step(
        read_cotangents: jax.Array, edge: tuple[Any, ...]
    ) -> tuple[jax.Array, tuple[Params, Any]]:
        source, target, own, edge_params = edge
        upstream = read_cotangents if inputs is None else cotangent
        gradient, own_gradient, total = scan.form.backward(
            scan.kind,
            own,
            edge_params,
            _row(read, source),
            _row(upstream, target),
            _row(read_cotangents, source),
            flag,
        )
        return _with_row(read_cotangents, source, total), (gradient, own_gradient)

    # In reverse every edge that leaves a node comes before those that enter it: the node's
    # cotangent is complete when it is read.
    read_cotangents, (gradients, own_gradients) = lax.scan(
        step,
        cotangent if inputs is None else jnp.zeros_like(inputs),
        _scanned(scan.group, own, params),
        reverse=True,
    )
    if inputs is None:
        return gradients, None, read_cotangents, own_gradients, None
    return gradients, read_cotangents, cotangent, own_gradients, None


scan_edges = jax.custom_vjp(_run_edges, nondiff_argnums=(0,))
scan_edges.defvjp(_scan_edges_forward, _scan_edges_backward)
