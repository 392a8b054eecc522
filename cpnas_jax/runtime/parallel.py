"""Devices: replication, and the one name of the axis that gradients are averaged over."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import jax_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cpnas_jax.runtime import processes, stall

AXIS = "devices"
"""Axis of all devices of all processes in a pmapped function."""


_DEVICES = "the devices to compute, in a step those of all processes"


def local_positions() -> list[int]:
    """Return where this process' devices stand among those of all processes, on `AXIS`."""
    positions = {device: position for position, device in enumerate(_in_order())}
    return [positions[device] for device in jax.local_devices()]


def _in_order() -> list[jax.Device]:
    """Return the devices as pmap takes them: process by process, whatever their numbers."""
    return [
        device
        for process in range(jax.process_count())
        for device in jax.local_devices(process_index=process)
    ]


def replicate(tree: Any) -> Any:
    """Put a copy of every array on every local device, with a leading device axis."""
    # From host memory: a device array would be stacked n times on the first device.
    return jax_utils.replicate(jax.tree.map(np.asarray, jax.device_get(tree)))


def to_host(tree: Any) -> Any:
    """Return the first local device's copy as numpy arrays."""

    def first(array: jax.Array) -> np.ndarray:
        # The shard itself: indexing the whole array would compile a slice for every shape.
        return np.asarray(array.addressable_shards[0].data)[0]

    with stall.waiting(_DEVICES):
        return jax.tree.map(first, tree)


def pmap_donated(function: Callable[..., Any]) -> Any:
    """pmap over all devices; the first argument, the state, is donated."""
    return _pmap(function, donate_argnums=(0,))


def pmap_kept(function: Callable[..., Any]) -> Any:
    """pmap over all devices; nothing is donated."""
    return _pmap(function)


def _pmap(function: Callable[..., Any], **options: Any) -> Any:
    # Told the size, it takes arrays of all processes as well as those of one.
    return jax.pmap(function, axis_name=AXIS, axis_size=jax.device_count(), **options)


class Program:
    """A pmapped function, compiled; called with local arrays, whatever the number of processes.

    What it returns are arrays over all devices, which it takes again as they are.
    """

    def __init__(self, function: Any, arguments: tuple[Any, ...], options: dict[str, int]) -> None:
        """Compile for arguments like these, with options of XLA."""
        with stall.waiting("the compiler"):
            self._compiled = function.lower(*_over_all_devices(arguments)).compile(options)
        processes.meet("program compiled")

    def __call__(self, *arguments: Any) -> Any:
        """Run on all devices; to be called by all processes."""
        with stall.waiting(_DEVICES):
            return self._compiled(*_over_all_devices(arguments))

    def temporary_bytes(self) -> int:
        """Return what a device needs beside arguments and results."""
        return getattr(self._compiled.memory_analysis(), "temp_size_in_bytes", 0)


def _over_all_devices(tree: Any) -> Any:
    """Turn every process' local arrays into its part of arrays over the devices of all."""
    if jax.process_count() == 1:
        return tree
    sharding = NamedSharding(Mesh(np.asarray(_in_order()), (AXIS,)), PartitionSpec(AXIS))

    def joined(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array):
            if not leaf.is_fully_addressable:
                return leaf
            shards = [shard.data for shard in leaf.addressable_shards]
        else:
            rows = np.split(np.asarray(leaf), jax.local_device_count())
            shards = [
                jax.device_put(row, device)
                for row, device in zip(rows, jax.local_devices(), strict=True)
            ]
        shape = (jax.device_count(), *shards[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)

    return jax.tree.map(joined, tree)


def bytes_a_device(tree: Any) -> int:
    """Return what a tree of pmapped arrays takes on a device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
