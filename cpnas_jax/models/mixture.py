"""The supernet of DARTS and PC-DARTS: every edge is a weighted sum of all operations.

Cells, stem, preprocessing and classifier are those of `supernet.py`, and so are the parameters; the
weights of the sum are softmaxes of the architecture parameters alpha, a pytree of its own. Edges
are scanned and recomputed in the backward pass (`edges.py`): written out, the mixture hardly
compiles.

Two parts of PC-DARTS (Xu et al. 2020) are switches. Partial channels: the operations of an edge see
the first C // K channels, the others pass by (at stride 2 through a 2x2 max pool), and the channels
of both are shuffled. Edge normalisation: a node weights its incoming edges by a second softmax.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from cpnas_jax.models import layers, supernet
from cpnas_jax.models.edges import EdgeForm, EdgeKind, Params, edge_operation
from cpnas_jax.models.operations import Binary
from cpnas_jax.models.space import (
    CELL_TYPES,
    EDGE_PARAMETERS,
    EDGES,
    NUM_EDGES,
    NUM_OPERATIONS,
    OPERATIONS,
    Alpha,
)
from cpnas_jax.models.supernet import CellScan, CellShape, SupernetSettings

ALPHA_SCALE = 1e-3
"""Standard deviation of alpha at the start (DARTS, PC-DARTS)."""


@dataclasses.dataclass(frozen=True)
class MixtureSettings:
    """Shape of the mixture; hashable.

    Attributes:
        network: of the supernet.
        partial: K, of which share of its channels an edge's operations see one; 1 is DARTS.
        edge_normalisation: whether a node weights its incoming edges.
        operations: what every edge starts with; no other is run.

    Raises:
        ValueError: the channels are no multiple of K.
    """

    network: SupernetSettings
    partial: int = 1
    edge_normalisation: bool = False
    operations: tuple[str, ...] = OPERATIONS

    def __post_init__(self) -> None:
        if self.partial < 1 or self.network.channels % self.partial:
            raise ValueError(f"{self.network.channels} channels in {self.partial} parts")


def init(key: jax.Array, settings: MixtureSettings, image_shape: tuple[int, int, int]) -> Params:
    """Return the parameters of `supernet.init`; operations on C // K channels."""
    return supernet.init(key, settings.network, image_shape, settings.partial)


def init_alpha(key: jax.Array, edge_normalisation: bool) -> Alpha:
    """Return alpha before the first step: small random numbers, as DARTS and PC-DARTS have them.

    Args:
        key: random key.
        edge_normalisation: whether edges have parameters too.
    """
    shapes = alpha_shapes(edge_normalisation)
    keys = jax.random.split(key, len(shapes))
    return {
        name: ALPHA_SCALE * jax.random.normal(own, shape)
        for own, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def alpha_shapes(edge_normalisation: bool) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of alpha's leaves."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(CELL_TYPES, (NUM_EDGES, NUM_OPERATIONS))
    if edge_normalisation:
        shapes |= {EDGE_PARAMETERS[cell]: (NUM_EDGES,) for cell in CELL_TYPES}
    return shapes


def operation_weights(alpha: Alpha, survivors: jax.Array) -> dict[str, jax.Array]:
    """Return the softmax over the surviving operations of every edge; exactly 0 for the others.

    Args:
        alpha: at least one f32[14, 8] for each cell type.
        survivors: bool[2, 14, 8]; at least one on every edge.

    Returns:
        cell type -> f32[14, 8].
    """
    return {
        cell: jax.nn.softmax(jnp.where(mask, alpha[cell], -jnp.inf), axis=-1)
        for cell, mask in zip(CELL_TYPES, survivors, strict=True)
    }


def edge_weights(alpha: Alpha) -> dict[str, jax.Array]:
    """Return the softmax over the incoming edges of every node, or ones without edge parameters.

    Returns:
        cell type -> f32[14].
    """

    def normalised(parameters: jax.Array) -> jax.Array:
        # `EDGES` are ordered by target.
        targets = [target for _, target in EDGES]
        firsts = [targets.index(target) for target in sorted(set(targets))]
        nodes = jnp.split(parameters, firsts[1:])
        return jnp.concatenate([jax.nn.softmax(node) for node in nodes])

    return {
        cell: normalised(alpha[name]) if name in alpha else jnp.ones((NUM_EDGES,), jnp.float32)
        for cell, name in EDGE_PARAMETERS.items()
    }


def apply(
    params: Params,
    images: jax.Array,
    alpha: Alpha,
    *,
    settings: MixtureSettings,
    binary: Binary,
    survivors: jax.Array | None = None,
) -> jax.Array:
    """Return the logits of the mixture.

    Args:
        params: of `init`.
        images: f32[N, H, W, C], normalised.
        alpha: the architecture parameters.
        settings: shape of the mixture.
        binary: child (True), parent (False), or a traced boolean.
        survivors: bool[2, 14, 8], a part of `settings.operations`; None: those.

    Returns:
        f32[N, num_classes].

    Raises:
        AssertionError: an array has another shape or dtype.
    """
    found = {name: leaf.shape for name, leaf in alpha.items()}
    assert found == alpha_shapes(settings.edge_normalisation), found
    chex.assert_type(list(alpha.values()), jnp.float32)
    if survivors is None:
        offered = jnp.asarray([name in settings.operations for name in OPERATIONS])
        survivors = jnp.broadcast_to(offered, (len(CELL_TYPES), NUM_EDGES, NUM_OPERATIONS))
    chex.assert_shape(survivors, (len(CELL_TYPES), NUM_EDGES, NUM_OPERATIONS))
    operations, edges = operation_weights(alpha, survivors), edge_weights(alpha)
    network, form = settings.network, _mixed(settings.partial, settings.operations)

    def nodes_of(shape: CellShape, cell: Params, inputs: list[jax.Array]) -> jax.Array:
        channels = shape.channels // settings.partial
        scan = CellScan(shape, channels, network.operations, binary)
        return scan.run(form, cell, inputs, (operations[shape.kind], edges[shape.kind]))

    return supernet.logits_by_cells(params, images, network, binary, nodes_of)


@functools.cache
def _mixed(partial: int, operations: tuple[str, ...]) -> EdgeForm:
    """The form of an edge whose own are f32[8], the operations' weights, and f32[], its weight."""

    def forward(kind: EdgeKind, *arguments: Any) -> jax.Array:
        return _mixed_forward(kind, partial, operations)(*arguments)

    def backward(kind: EdgeKind, *arguments: Any) -> tuple[Params, Any, jax.Array]:
        return _mixed_backward(kind, partial, operations)(*arguments)

    return EdgeForm(forward, backward)


def _mixed_edge(
    kind: EdgeKind, partial: int, operations: tuple[str, ...]
) -> Callable[[Any, Params, jax.Array, jax.Array], jax.Array]:
    """Return (own, params, x, flag) -> the weighted sum, for all channels of the cell."""
    # `none` adds nothing; its weight counts by what it takes from the others.
    parts = {name: edge_operation(kind, name) for name in operations if name != "none"}

    def mixed(own: Any, params: Params, x: jax.Array, flag: jax.Array) -> jax.Array:
        weights, edge_weight = own
        seen, bypass = x[..., : kind.channels], x[..., kind.channels :]
        outputs = (
            weights[OPERATIONS.index(name)] * operation(params[name], seen, flag)
            for name, operation in parts.items()
        )
        total = functools.reduce(jnp.add, outputs)
        if partial > 1:
            if kind.stride == 2:
                bypass = layers.max_pool_2x2(bypass)
            total = shuffle_channels(jnp.concatenate([total, bypass], axis=-1), partial)
        return edge_weight * total

    return mixed


def shuffle_channels(x: jax.Array, groups: int) -> jax.Array:
    """Take one channel of each group in turn: channels [g, c] become [c, g]; f[N, H, W, C]."""
    apart = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    return jnp.swapaxes(apart, -1, -2).reshape(x.shape)


# Traced once for each kind of edge, not once for each cell.
@functools.cache
def _mixed_forward(
    kind: EdgeKind, partial: int, operations: tuple[str, ...]
) -> Callable[..., jax.Array]:
    mixed = _mixed_edge(kind, partial, operations)
    return jax.jit(lambda own, params, x, total, flag: total + mixed(own, params, x, flag))


@functools.cache
def _mixed_backward(
    kind: EdgeKind, partial: int, operations: tuple[str, ...]
) -> Callable[..., tuple[Params, Any, jax.Array]]:
    mixed = _mixed_edge(kind, partial, operations)

    @jax.jit
    def pull(
        own: Any,
        params: Params,
        x: jax.Array,
        cotangent: jax.Array,
        total: jax.Array,
        flag: jax.Array,
    ) -> tuple[Params, Any, jax.Array]:
        _, pullback = jax.vjp(lambda own, p, x: mixed(own, p, x, flag), own, params, x)
        own_gradient, gradient, x_gradient = pullback(cotangent)
        return gradient, own_gradient, total + x_gradient

    return pull
