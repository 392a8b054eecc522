"""Sampling of architectures without replacement (CP-NAS Algorithm 9).

An architecture is an int32[2, 14]: cell types in the order of `CELL_TYPES`, edges in the order of
`EDGES`, values are positions in `OPERATIONS`. Survivors are a bool[2, 14, 8] over the same axes.
"""

from collections.abc import Sequence

import numpy as np

from cpnas_jax.models.space import CELL_TYPES, NUM_EDGES, NUM_OPERATIONS, OPERATIONS

SHAPE = (len(CELL_TYPES), NUM_EDGES)
"""Shape of an architecture."""

FIRST_STAGE = NUM_OPERATIONS
"""A stage is named by the number K of operations left on each edge; the first one has all."""

LAST_STAGE = 2
"""The stage that leaves one operation on each edge."""


def all_survivors(operations: Sequence[str] = OPERATIONS) -> np.ndarray:
    """Give the survivors before the first stage: bool[2, 14, 8], the same on every edge.

    Args:
        operations: names that a search starts with; all 8 in the paper.
    """
    offered = np.array([name in operations for name in OPERATIONS])
    return np.broadcast_to(offered, (*SHAPE, NUM_OPERATIONS)).copy()


def num_sampled_epochs(rounds: int, first_stage: int = FIRST_STAGE) -> int:
    """Count the sampled epochs of a whole search, 35 * T: T rounds of K samples, K = 8 to 2.

    Args:
        rounds: T, the rounds of each stage, at least 1.
        first_stage: K of the first stage, 8 unless the search starts with fewer operations.

    Raises:
        ValueError: if `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"search.rounds is {rounds}; it must be at least 1")
    return rounds * sum(range(LAST_STAGE, first_stage + 1))


def num_surviving(survivors: np.ndarray) -> int:
    """Count the operations left on each edge, K.

    Args:
        survivors: bool[2, 14, 8].

    Raises:
        ValueError: on another shape or dtype, or when K differs between edges: a stage drops
            one operation of every edge, so it never does in a search.
    """
    if survivors.shape != (*SHAPE, NUM_OPERATIONS) or survivors.dtype != np.bool_:
        raise ValueError(
            f"survivors is {survivors.dtype}{list(survivors.shape)}; it must be bool[2, 14, 8]"
        )
    counts = survivors.sum(axis=-1)
    if counts.min() != counts.max() or counts.min() == 0:
        raise ValueError(
            f"edges have {counts.min()} to {counts.max()} surviving operations; "
            "every edge must have the same number, at least 1"
        )
    return int(counts.flat[0])


def stage_permutations(
    seed: int, stage: int, round_index: int, survivors: np.ndarray
) -> np.ndarray:
    """Draw the K architectures of one round: a random permutation of the survivors of each edge.

    The permutations of the 28 edges are independent. Over the K samples of a round every
    surviving operation of every edge comes up exactly once (sampling without replacement).

    A pure function of its arguments, the same on every machine and numpy version: it only uses
    the raw stream of a PCG64 seeded by a SeedSequence, which numpy promises to keep (NEP 19), and
    a stable sort. `Generator.permutation` has no such promise. So a resumed search needs no
    generator state, and a finished one can be checked from its log.

    Args:
        seed: the run's seed, not negative.
        stage: K, as the log names the stage.
        round_index: t, counted from 1.
        survivors: bool[2, 14, 8] with K true entries on every edge.

    Returns:
        int32[K, 2, 14]; row s - 1 is the architecture of sample s.

    Raises:
        ValueError: if seed, stage or round are out of range or `stage` is not the survivors' K.
    """
    remaining = num_surviving(survivors)
    if stage != remaining:
        raise ValueError(f"stage is {stage}, but {remaining} operations survive on each edge")
    if seed < 0 or round_index < 1:
        raise ValueError(
            f"seed {seed} must not be negative and round {round_index} must be at least 1"
        )
    stream = np.random.PCG64(np.random.SeedSequence([seed, stage, round_index]))
    keys = stream.random_raw(SHAPE[0] * SHAPE[1] * remaining).reshape(*SHAPE, remaining)
    order = np.argsort(keys, axis=-1, kind="stable")
    operations = np.nonzero(survivors)[2].reshape(*SHAPE, remaining)
    permuted = np.take_along_axis(operations, order, axis=-1)
    return np.ascontiguousarray(np.moveaxis(permuted, -1, 0), dtype=np.int32)


def operation_names(architecture: np.ndarray) -> list[list[str]]:
    """Name the operations of an architecture.

    Args:
        architecture: int[2, 14], positions in `OPERATIONS`.

    Returns:
        Two lists (normal, reduce) of 14 names, in the order of `EDGES`.

    Raises:
        ValueError: on another shape or a position outside `OPERATIONS`.
    """
    array = np.asarray(architecture)
    if array.shape != SHAPE:
        raise ValueError(f"architecture has shape {array.shape}; it must be {SHAPE}")
    if array.min() < 0 or array.max() >= NUM_OPERATIONS:
        raise ValueError(
            f"architecture has operations {array.min()} to {array.max()}; "
            f"they must be within 0 to {NUM_OPERATIONS - 1}"
        )
    return [[OPERATIONS[operation] for operation in cell] for cell in array]


def operation_positions(names: Sequence[Sequence[str]]) -> np.ndarray:
    """Invert `operation_names`.

    Args:
        names: two sequences of 14 operation names.

    Returns:
        int32[2, 14].

    Raises:
        ValueError: on another number of cells or edges, or an unknown operation.
    """
    if len(names) != SHAPE[0] or any(len(cell) != NUM_EDGES for cell in names):
        lengths = [len(cell) for cell in names]
        raise ValueError(f"there are cells of {lengths} operations; it must be [14, 14]")
    for cell in names:
        for name in cell:
            if name not in OPERATIONS:
                raise ValueError(f"unknown operation {name!r}; known: {', '.join(OPERATIONS)}")
    return np.array([[OPERATIONS.index(name) for name in cell] for cell in names], dtype=np.int32)


def num_paths(num_devices: int, num_operations: int) -> int:
    """Return how many architectures of a round are trained at the same time, by `path`.

    The largest number of equal groups of devices that is at most the number of operations an edge
    starts with: more could never have an architecture of their own (our choice).

    Args:
        num_devices: over all processes.
        num_operations: K of the first stage.
    """
    return max(n for n in range(1, num_operations + 1) if num_devices % n == 0)
