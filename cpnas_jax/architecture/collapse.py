"""Guards against cells of skip connections, pooling and nothing, to which searches may collapse."""

import dataclasses

import numpy as np

from cpnas_jax.architecture.edge_policy import derive
from cpnas_jax.architecture.genotype import EdgePolicy
from cpnas_jax.models.space import CELL_TYPES, EDGES, OPERATIONS

_NONE, _SKIP = OPERATIONS.index("none"), OPERATIONS.index("skip_connect")
_FREE = np.array(["conv" not in name for name in OPERATIONS])


def parameter_free_share(survivors: np.ndarray) -> float:
    """Return which share of the surviving operations is skip, pooling or none.

    Args:
        survivors: bool[2, 14, 8], at least one true.
    """
    return float((survivors & _FREE).sum() / survivors.sum())


@dataclasses.dataclass(frozen=True)
class Limited:
    """A search's result with few enough skip connections; arguments of `derive`.

    Attributes:
        operations: int32[2, 14].
        compared: bool[2, 14, 8].
        changes: what was done, and which cells keep too many, in words.
    """

    operations: np.ndarray
    compared: np.ndarray
    changes: tuple[str, ...]


def limit_skips(
    operations: np.ndarray,
    worth: np.ndarray,
    compared: np.ndarray,
    policy: EdgePolicy,
    most: int,
) -> Limited:
    """Take skip connections from a result until a derived cell has at most so many.

    The skip of the least worth goes first; in its place comes what was compared with it and is
    worth most, `none` last. P-DARTS limits the skips of a cell likewise [kin]; that `none` may come
    is ours. A skip without which a node would have nothing stays.

    Args:
        operations: as of `derive`.
        worth: likewise.
        compared: likewise.
        policy: likewise.
        most: skips of a cell.
    """
    changes: list[str] = []
    for row, cell in enumerate(CELL_TYPES):
        needed: set[int] = set()
        while True:
            genotype = derive(operations, worth, compared, policy).genotype
            skips = [
                EDGES.index((edge.source, edge.target))
                for edge in dict(genotype.cells())[cell]
                if edge.operation == "skip_connect"
            ]
            if len(skips) <= most:
                break
            choice = [column for column in skips if column not in needed]
            if not choice:
                changes.append(
                    f"{cell} cell: {len(skips)} skip connections stay, more than "
                    f"config.search.max_skips={most}; nothing else was compared with them"
                )
                break
            column = min(choice, key=lambda column: worth[row, column, _SKIP])
            without = _without_skip(operations, worth, compared, row, column)
            if without is None or not _derives(*without, worth, policy):
                needed.add(column)
                continue
            operations, compared = without
            left = dict(derive(operations, worth, compared, policy).genotype.cells())[cell]
            kept = {(edge.source, edge.target): edge.operation for edge in left}
            source, target = EDGES[column]
            changes.append(
                f"{cell} cell, edge {source}->{target}: a skip connection is over "
                f"config.search.max_skips={most}; it has {kept.get((source, target), 'no edge')!r}"
            )
    return Limited(operations, compared, tuple(changes))


def _without_skip(
    operations: np.ndarray, worth: np.ndarray, compared: np.ndarray, row: int, column: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return operations and what is compared without an edge's skip; None if nothing is left."""
    operations, compared = operations.copy(), compared.copy()
    compared[row, column, _SKIP] = False
    others = np.where(compared[row, column], worth[row, column], -np.inf)
    if not np.isfinite(others).any():
        return None
    if np.isfinite(np.delete(others, _NONE)).any():
        others[_NONE] = -np.inf
    # Where `none` was left, the policy had brought the skip back, and now may not.
    if operations[row, column] == _SKIP:
        operations[row, column] = others.argmax()
    return operations, compared


def _derives(
    operations: np.ndarray, compared: np.ndarray, worth: np.ndarray, policy: EdgePolicy
) -> bool:
    try:
        derive(operations, worth, compared, policy)
    except ValueError:
        return False
    return True
