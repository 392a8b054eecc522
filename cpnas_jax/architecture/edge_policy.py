"""From the last operation of every edge to the edges of a genotype."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from cpnas_jax.architecture.genotype import (
    EDGE_POLICIES,
    Edge,
    EdgePolicy,
    Genotype,
    Scalar,
    indicator_pairs,
)
from cpnas_jax.architecture.sampling import SHAPE
from cpnas_jax.models.space import (
    CELL_TYPES,
    EDGES,
    NUM_INPUTS,
    NUM_NODES,
    NUM_OPERATIONS,
    OPERATIONS,
    node_text,
)

NONE = OPERATIONS.index("none")


@dataclasses.dataclass(frozen=True)
class Restored:
    """An edge that the search left with `none` and the genotype holds with another operation.

    Attributes:
        cell: cell type.
        edge: the edge as the genotype holds it.
        mean_z: the restored operation's mean z in the last stage.
        reason: `dead node` or `among the two best edges of its node`.
    """

    cell: str
    edge: Edge
    mean_z: float
    reason: str

    def __str__(self) -> str:
        edge = self.edge
        return (
            f"{self.cell} cell, edge {node_text(edge.source)} -> {node_text(edge.target)}: 'none' "
            f"was left, restored "
            f"'{edge.operation}' with mean z {self.mean_z:.6f} ({self.reason})"
        )


@dataclasses.dataclass(frozen=True)
class Derivation:
    """A genotype and the edges that are not as the search left them, for the caller to log."""

    genotype: Genotype
    restored: tuple[Restored, ...]


def derive(
    operations: np.ndarray,
    mean_z: np.ndarray,
    compared: np.ndarray,
    policy: EdgePolicy,
    indicator: np.ndarray | None = None,
    provenance: Mapping[str, Scalar] | None = None,
) -> Derivation:
    """Apply an edge policy to a finished search.

    `all` keeps the operation left on each of the 14 edges, `none` too (Algorithm 9 as printed).
    A node left with nothing but `none` gets its best other edge back (our choice): of the
    operations compared on its edges in the last stage, the one with the highest mean z.

    `top2` keeps for each node the two incoming edges whose best operation other than `none` has
    the highest mean z of the last stage, as DARTS ranks edges. That is not the paper's; all
    published genotypes of its group have 8 edges a cell. Our choice, as nothing is published on
    it: an edge on which `none` won the last stage is ranked, and if kept used, with the operation
    that lost to it. The last stage compares two operations, so there always is one. Hence
    `none` takes no part in the ranking, just as in DARTS, and no node can be dead.

    Equal mean z are decided by the lowest source, then the lowest position in `OPERATIONS` (our
    choice).

    Args:
        operations: int[2, 14], the operation left on every edge.
        mean_z: f[2, 14, 8], mean z of the last stage, or any other measure of an operation where
            higher is better; looked at where `compared` is true only.
        compared: bool[2, 14, 8], the survivors during the last stage (two an edge in CP-NAS).
        policy: `all` or `top2`.
        indicator: f[2, 14, 8], e of the last stage, to be recorded in the genotype.
        provenance: to be recorded in the genotype.

    Raises:
        ValueError: on an unknown policy or wrong shapes, if an edge's operation is not among those
            compared, if a mean z is not finite, or if a node has too few edges with an operation
            other than `none` to choose from.
    """
    _check(operations, mean_z, compared, policy)
    # `none` is never a candidate: what is ranked is the best of the others.
    worth = np.where(compared, mean_z.astype(np.float64), -np.inf)
    worth[..., NONE] = -np.inf
    cells: dict[str, tuple[Edge, ...]] = {}
    restored: list[Restored] = []
    for row, cell in enumerate(CELL_TYPES):
        left = [int(operation) for operation in operations[row]]
        chosen = _keep_all(left, worth[row]) if policy == "all" else _keep_two(left, worth[row])
        edges = []
        for column in sorted(chosen):
            source, target = EDGES[column]
            operation = chosen[column]
            edge = Edge(target=target, source=source, operation=OPERATIONS[operation])
            edges.append(edge)
            if left[column] != operation:
                reason = "dead node" if policy == "all" else "among the two best edges of its node"
                score = float(worth[row, column, operation])
                restored.append(Restored(cell, edge, score, reason))
        cells[cell] = tuple(edges)
    genotype = Genotype(
        normal=cells["normal"],
        reduce=cells["reduce"],
        edge_policy=policy,
        indicator=None if indicator is None else indicator_pairs(indicator, compared),
        provenance=tuple((provenance or {}).items()),
    )
    return Derivation(genotype, tuple(restored))


def _keep_all(left: list[int], worth: np.ndarray) -> dict[int, int]:
    """Give {column of EDGES: operation} of one cell under `all`."""
    chosen = dict(enumerate(left))
    for node in range(NUM_INPUTS, NUM_NODES):
        columns = _incoming(node)
        if all(left[column] == NONE for column in columns):
            best = _ranked(columns, worth)
            if not best:
                raise ValueError(f"node {node} is dead and no operation was compared with 'none'")
            chosen[best[0]] = int(worth[best[0]].argmax())
    return chosen


def _keep_two(left: list[int], worth: np.ndarray) -> dict[int, int]:
    """Give {column of EDGES: operation} of one cell under `top2`."""
    chosen = {}
    for node in range(NUM_INPUTS, NUM_NODES):
        best = _ranked(_incoming(node), worth)
        if len(best) < 2:
            raise ValueError(
                f"node {node} has {len(best)} edges with an operation other than 'none'; "
                "policy top2 needs 2"
            )
        for column in best[:2]:
            # What the search left stays, whatever mean z says, unless it is `none`.
            operation = left[column]
            chosen[column] = int(worth[column].argmax()) if operation == NONE else operation
    return chosen


def _incoming(node: int) -> list[int]:
    return [column for column, (_, target) in enumerate(EDGES) if target == node]


def _ranked(columns: list[int], worth: np.ndarray) -> list[int]:
    """Sort columns by their best worth, the highest first; those without any are left out."""
    usable = [column for column in columns if np.isfinite(worth[column]).any()]
    return sorted(usable, key=lambda column: -worth[column].max())


def _check(operations: np.ndarray, mean_z: np.ndarray, compared: np.ndarray, policy: str) -> None:
    if policy not in EDGE_POLICIES:
        raise ValueError(f"edge_policy is {policy!r}; it must be one of {', '.join(EDGE_POLICIES)}")
    shapes = (operations.shape, mean_z.shape, compared.shape)
    expected = (SHAPE, (*SHAPE, NUM_OPERATIONS), (*SHAPE, NUM_OPERATIONS))
    if shapes != expected:
        raise ValueError(f"operations, mean_z, compared have shapes {shapes}; must be {expected}")
    if not np.take_along_axis(compared, operations[..., None], axis=-1).all():
        raise ValueError("an edge was left with an operation that the last stage did not compare")
    if not np.isfinite(mean_z[compared]).all():
        raise ValueError("mean z of a compared operation is not finite")
