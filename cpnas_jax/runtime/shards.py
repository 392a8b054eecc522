"""How a global batch is divided among the devices, and its parts' results put together.

Usually a device has one shard and sums are the library's, whose order of additions depends on the
number of devices. In the deterministic mode the batch is cut into a fixed number of virtual shards:
a device computes its own one after the other, and all are added up in their order, so that the
result has the same bits on any number of devices that divides the number of shards.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cpnas_jax.models.layers import StatisticsAxis
from cpnas_jax.runtime.parallel import AXIS

Results = tuple[Any, Any]
"""A tree of what is averaged over the shards, and one of what is summed."""


@dataclasses.dataclass(frozen=True)
class Shards:
    """The shards of a batch; hashable.

    Attributes:
        num_devices: over all processes.
        virtual: shards of the deterministic mode, a multiple of `num_devices`; 0 is the usual mode.

    Raises:
        ValueError: the devices do not divide the virtual shards.
    """

    num_devices: int
    virtual: int = 0

    def __post_init__(self) -> None:
        if self.virtual % self.num_devices:
            raise ValueError(f"{self.virtual} virtual shards on {self.num_devices} devices")

    @property
    def count(self) -> int:
        """Return the number of shards of a batch."""
        return self.virtual or self.num_devices

    @property
    def passes(self) -> int:
        """Return the number of shards of a device."""
        return self.count // self.num_devices

    def statistics(self, synchronise: bool) -> StatisticsAxis | None:
        """Return over which devices a network's batch statistics are taken; None: no others.

        A virtual shard has statistics of its own: those of a whole batch would need all shards
        to be computed side by side.
        """
        together = synchronise and not self.virtual and self.num_devices > 1
        return StatisticsAxis(AXIS) if together else None

    def local_rows(self, tree: Any, shard: jax.Array) -> Any:
        """Return a shard's rows of arrays that hold the device's part of a batch.

        Args:
            tree: arrays [rows of a device, ...].
            shard: int32[], one of the device's own.
        """
        if not self.virtual:
            return tree
        size = jax.tree.leaves(tree)[0].shape[0] // self.passes
        first = (shard - self._first()) * size
        rows = first + jnp.arange(size, dtype=jnp.int32)
        return jax.tree.map(lambda leaf: leaf[rows], tree)

    def combine(self, compute: Callable[[jax.Array], Results], passes: jax.Array) -> Results:
        """Compute every shard of a batch and return the results of the whole batch.

        To be called inside a function that is pmapped over `AXIS`; every device gets the same.

        Args:
            compute: (shard int32[]) -> results of the shard, a function of its number alone and of
                what is the same on all devices, or in the usual mode of what the device holds.
            passes: int32[], the property `passes`, as an input of the program: XLA would write out
                a loop that it knows to be passed once, and round otherwise than in a longer one.

        Returns:
            Means and sums over the shards.
        """
        if not self.virtual:
            means, sums = compute(self._first())
            return lax.pmean(means, AXIS), lax.psum(sums, AXIS)
        means, sums = self._added_in_order(compute, passes)
        return jax.tree.map(lambda leaf: leaf / self.virtual, means), sums

    def _first(self) -> jax.Array:
        return lax.axis_index(AXIS).astype(jnp.int32) * self.passes

    def _added_in_order(
        self, compute: Callable[[jax.Array], Results], passes: jax.Array
    ) -> Results:
        """Return the sums of all shards' results, added up from the first to the last.

        Both loops are the same program on any number of devices, down to the shapes of what they
        carry: a device's own results stand in an array for all shards.
        """
        first = self._first()
        blank = jax.tree.map(
            lambda shape: jnp.zeros((self.virtual, *shape.shape), shape.dtype),
            jax.eval_shape(compute, first),
        )

        def computed(offset: jax.Array, results: Results) -> Results:
            shard = first + offset
            return jax.tree.map(
                lambda rows, row: lax.dynamic_update_index_in_dim(rows, row, shard, 0),
                results,
                compute(shard),
            )

        results = lax.fori_loop(jnp.int32(0), passes, computed, blank)
        if self.num_devices > 1:
            own = jax.tree.map(
                lambda rows: lax.dynamic_slice_in_dim(rows, first, self.passes), results
            )
            results = lax.all_gather(own, AXIS, tiled=True)

        def added(shard: jax.Array, total: Results) -> Results:
            return jax.tree.map(
                lambda sum_, rows: sum_ + lax.dynamic_index_in_dim(rows, shard, keepdims=False),
                total,
                results,
            )

        start = jax.tree.map(lambda rows: rows[0], results)
        return lax.fori_loop(jnp.int32(1), passes * self.num_devices, added, start)
