"""Results of a batch put together from its shards, on some of eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpnas_jax.models.layers import StatisticsAxis
from cpnas_jax.runtime.parallel import AXIS
from cpnas_jax.runtime.shards import Shards

BATCH = 16
# Of sizes so different that every order of additions rounds to another sum.
VALUES = (np.random.default_rng(0).normal(size=(BATCH, 3)) * 10.0 ** np.arange(-3, 0)).astype(
    np.float32
) * np.float32(7) ** (np.arange(BATCH, dtype=np.float32)[:, None] % 5)


def combined(shards, values=VALUES):
    """Mean of the squares and sum of the rows, as every device has them."""
    size = BATCH // shards.count

    def on_a_device(values, passes):
        def compute(shard):
            own = jax.lax.dynamic_slice_in_dim(values, shard * size, size)
            return {"square": jnp.mean(own * own, 0)}, (jnp.sum(own, 0), jnp.int32(size))

        return shards.combine(compute, passes)

    devices = jax.devices()[: shards.num_devices]
    program = jax.pmap(on_a_device, axis_name=AXIS, in_axes=(None, 0), devices=devices)
    passes = np.full(shards.num_devices, shards.passes, np.int32)
    means, (sums, counts) = jax.device_get(program(values, passes))
    for leaf in (means["square"], sums, counts):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    return means["square"][0], sums[0], counts[0]


@pytest.mark.parametrize("virtual", [0, 8])
@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_means_and_sums_are_those_of_the_batch(num_devices, virtual):
    square, total, count = combined(Shards(num_devices, virtual))
    np.testing.assert_allclose(square, np.mean(np.square(VALUES), 0), rtol=1e-5)
    np.testing.assert_allclose(total, np.sum(VALUES, 0, np.float64), rtol=1e-4, atol=1e-3)
    assert count == BATCH


def test_virtual_shards_are_added_in_their_order():
    """By numpy, one shard after the other; and any other order gives other bits."""
    parts = VALUES.reshape(8, 2, 3)
    shard_sums = parts[:, 0] + parts[:, 1]

    def added(order):
        total = shard_sums[order[0]]
        for shard in order[1:]:
            total = total + shard_sums[shard]
        return total

    expected = added(range(8))
    assert (added(range(7, -1, -1)) != expected).any()
    assert (added([0, 2, 4, 6, 1, 3, 5, 7]) != expected).any()
    for num_devices in (1, 2, 4, 8):
        _, total, _ = combined(Shards(num_devices, 8))
        np.testing.assert_array_equal(total, expected)


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_the_rows_of_a_shard_in_what_a_device_holds(num_devices):
    shards = Shards(num_devices, 4)
    size = BATCH // 4

    def on_a_device(part, passes):
        def compute(shard):
            (rows,) = shards.local_rows((part,), shard)
            row = jax.lax.dynamic_update_index_in_dim(jnp.zeros((4, size)), rows, shard, 0)
            return None, row

        return shards.combine(compute, passes)[1]

    numbers = np.arange(BATCH, dtype=np.float32)
    program = jax.pmap(
        on_a_device,
        axis_name=AXIS,
        in_axes=(0, None),
        devices=jax.devices()[:num_devices],
    )
    found = program(numbers.reshape(num_devices, -1), np.int32(shards.passes))
    np.testing.assert_array_equal(np.asarray(found)[0].ravel(), numbers)


def test_statistics_are_taken_together_where_that_means_something():
    assert Shards(2).statistics(True) == StatisticsAxis(AXIS)
    for shards, synchronise in ((Shards(2), False), (Shards(1), True), (Shards(2, 4), True)):
        assert shards.statistics(synchronise) is None


def test_devices_that_do_not_divide_the_shards():
    with pytest.raises(ValueError, match="4 virtual shards on 3 devices"):
        Shards(3, 4)
