import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from cpnas_jax.data import order

KEY = jax.random.key(0)
# A few sizes only: each one is compiled.
SIZES = st.sampled_from([1, 2, 7, 64, 100])


@hypothesis.given(n=SIZES, epoch=st.integers(0, 10_000), seed=st.integers(0, 1000))
def test_an_epoch_has_every_example_once_and_is_repeatable(n, epoch, seed):
    permutation = order.epoch_permutation(jax.random.key(seed), epoch, n)
    assert permutation.dtype == np.int32
    assert sorted(np.asarray(permutation).tolist()) == list(range(n))
    again = order.epoch_permutation(jax.random.key(seed), epoch, n)
    np.testing.assert_array_equal(permutation, again)


@hypothesis.given(epochs=st.lists(st.integers(0, 10_000), min_size=2, max_size=2, unique=True))
def test_epochs_and_keys_differ(epochs):
    first, second = (np.asarray(order.epoch_permutation(KEY, epoch, 100)) for epoch in epochs)
    other_key = np.asarray(order.epoch_permutation(jax.random.key(1), epochs[0], 100))
    assert (first != second).any()
    assert (first != other_key).any()


def test_traced_epoch_gives_the_same_order():
    traced = jax.jit(order.epoch_permutation, static_argnums=2)
    for epoch in (0, 5):
        np.testing.assert_array_equal(
            traced(KEY, np.int32(epoch), 50), order.epoch_permutation(KEY, epoch, 50)
        )


@hypothesis.given(
    devices=st.sampled_from([1, 2, 8]),
    per_device=st.integers(1, 4),
    extra=st.integers(0, 5),
    steps=st.integers(1, 4),
)
def test_devices_partition_the_batch_and_steps_the_epoch(devices, per_device, extra, steps):
    batch = devices * per_device
    # Leftover examples, too few for a step of their own.
    n = steps * batch + min(extra, batch - 1)
    permutation = np.random.default_rng(0).permutation(n).astype(np.int32)
    for step in range(steps):
        slices = [
            np.asarray(order.batch_indices(permutation, step, batch, device, per_device))
            for device in range(devices)
        ]
        assert all(s.dtype == np.int32 and s.shape == (per_device,) for s in slices)
        expected = permutation[step * batch : (step + 1) * batch]
        np.testing.assert_array_equal(np.concatenate(slices), expected)


def test_inside_pmap_with_traced_step_and_axis_index():
    permutation = order.epoch_permutation(KEY, 0, 50)

    def function(step):
        return order.batch_indices(permutation, step, 16, jax.lax.axis_index("devices"), 4)

    found = jax.pmap(function, axis_name="devices")(np.full(4, 2, np.int32))
    np.testing.assert_array_equal(np.ravel(found), permutation[32:48])


@pytest.mark.parametrize(("batch", "per_device"), [(0, 1), (51, 51), (10, 3), (10, 0)])
def test_sizes_that_do_not_fit(batch, per_device):
    with pytest.raises(ValueError, match="batch"):
        order.batch_indices(np.arange(50, dtype=np.int32), 0, batch, 0, per_device)


@hypothesis.given(n=st.integers(1, 300), batch=st.integers(1, 400))
def test_scoring_counts_every_example_once(n, batch):
    indices, mask = order.scoring_indices(n, batch)
    assert indices.shape == mask.shape == (-(-n // batch), batch)
    assert (indices.dtype, mask.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(np.bincount(indices.ravel(), mask.ravel(), n), 1)
    assert set(np.unique(mask)) <= {0.0, 1.0}
    # The filling is of real examples, other ones than the batch has as long as there are enough.
    assert indices.min() >= 0
    assert indices.max() < n
    if batch <= n:
        assert all(len(np.unique(row)) == batch for row in indices)


@pytest.mark.parametrize(("n", "batch"), [(0, 4), (4, 0)])
def test_nothing_to_score(n, batch):
    with pytest.raises(ValueError, match="positive"):
        order.scoring_indices(n, batch)


def test_step_keys_are_all_different():
    places = [(e, s) for e in range(8) for s in range(8)]
    keys = [jax.random.key_data(order.step_key(KEY, *place)).tobytes() for place in places]
    permutation_keys = [
        jax.random.key_data(jax.random.fold_in(jax.random.fold_in(KEY, 0), epoch)).tobytes()
        for epoch in range(4)
    ]
    assert len({*keys, *permutation_keys}) == len(keys) + len(permutation_keys)
    traced = jax.jit(order.step_key)(KEY, np.int32(1), np.int32(2))
    assert jax.random.key_data(traced).tobytes() == keys[places.index((1, 2))]


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_shards_have_the_positions_of_the_batch(shards):
    size = 16 // shards
    found = [jax.jit(order.shard_positions, static_argnums=1)(s, size) for s in range(shards)]
    np.testing.assert_array_equal(np.concatenate(found), np.arange(16, dtype=np.int32))


def test_validation_samples_and_alpha_draw_from_keys_of_their_own():
    own = [
        order.validation_key(KEY),
        order.alpha_key(KEY),
        *(order.sample_key(KEY, epoch, step) for epoch in range(3) for step in range(3)),
    ]
    others = [
        *(order.step_key(KEY, epoch, step) for epoch in range(3) for step in range(3)),
        *(order.weights_key(KEY, model) for model in range(2)),
        *(order.step_key(order.validation_key(KEY), epoch, step) for epoch, step in [(0, 0)]),
    ]
    keys = {jax.random.key_data(key).tobytes() for key in own + others}
    assert len(keys) == len(own) + len(others)


def test_weights_order_and_steps_draw_from_different_keys():
    key = jax.random.key(5)
    keys = [order.weights_key(key, model) for model in range(3)]
    keys += [order.step_key(key, epoch, 0) for epoch in range(3)]
    used = {tuple(np.asarray(jax.random.key_data(k)).tolist()) for k in keys}
    assert len(used) == len(keys)
    # Folding a model or an epoch into the run's own key would be the tag of another use.
    plain = {
        tuple(np.asarray(jax.random.key_data(jax.random.fold_in(key, tag))).tolist())
        for tag in range(3)
    }
    assert not used & plain
