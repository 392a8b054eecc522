"""Devices: replication, and the one name of the axis that gradients are averaged over."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flax import jax_utils
from jax.experimental import multihost_utils

AXIS = "devices"
"""Axis of all devices of all processes in a pmapped function."""


def replicate(tree: Any) -> Any:
    """Put a copy of every array on every local device, with a leading device axis."""
    # From host memory: a device array would be stacked n times on the first device.
    return jax_utils.replicate(jax.tree.map(np.asarray, jax.device_get(tree)))


def to_host(tree: Any) -> Any:
    """Return the first local device's copy as numpy arrays."""

    def first(array: jax.Array) -> np.ndarray:
        # The shard itself: indexing the whole array would compile a slice for every shape.
        return np.asarray(array.addressable_shards[0].data)[0]

    return jax.tree.map(first, tree)


def union(numbers: Iterable[int]) -> set[int]:
    """Return the numbers, from 0 to 2**31 - 1, that any process gives; all must call it."""
    own = set(numbers)
    if jax.process_count() == 1:
        return own
    longest = int(np.max(multihost_utils.process_allgather(np.asarray(len(own), np.int32))))
    if not longest:
        return own
    padded = np.full(longest, -1, np.int32)
    padded[: len(own)] = sorted(own)
    return set(np.unique(multihost_utils.process_allgather(padded)).tolist()) - {-1}


def pmap_donated(function: Callable[..., Any]) -> Any:
    """pmap over all devices; the first argument, the state, is donated."""
    return jax.pmap(function, axis_name=AXIS, donate_argnums=(0,))


def pmap_kept(function: Callable[..., Any]) -> Any:
    """pmap over all devices; nothing is donated."""
    return jax.pmap(function, axis_name=AXIS)
