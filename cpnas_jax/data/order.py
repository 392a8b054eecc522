"""The order of examples, as a pure function of (key, epoch, step): no iterator, no state.

A resumed run therefore goes on with exactly the batches that an uninterrupted one would have seen,
and neither the batches nor what is drawn for their examples depends on how many devices share them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The uses of one key are told apart before anything else is folded in.
_PERMUTATION = 0
_STEP = 1
_WEIGHTS = 2
_VALIDATION = 3
_SAMPLE = 4
_ALPHA = 5


def epoch_permutation(key: jax.Array, epoch: int | jax.Array, n: int) -> jax.Array:
    """Return the order of `n` examples in an epoch.

    Args:
        key: random key of the run.
        epoch: int32[], may be traced.
        n: number of examples, static.

    Returns:
        int32[n], a permutation of 0 .. n-1.
    """
    epoch_key = jax.random.fold_in(jax.random.fold_in(key, _PERMUTATION), epoch)
    return jax.random.permutation(epoch_key, jnp.arange(n, dtype=jnp.int32))


def step_key(key: jax.Array, epoch: int | jax.Array, step: int | jax.Array) -> jax.Array:
    """Return the key for the randomness of one step; independent of the permutation.

    What an example draws from it depends on its position in the global batch (`position_draws`).

    Args:
        key: random key of the run.
        epoch: int32[], may be traced.
        step: int32[], step within the epoch, may be traced.
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, _STEP), epoch), step)


def shard_positions(shard: int | jax.Array, size: int) -> jax.Array:
    """Return the positions in the global batch of a shard's examples, int32[size].

    Args:
        shard: int32[], which of the parts of this size, may be traced.
        size: examples of a shard, static.
    """
    return jnp.asarray(shard, jnp.int32) * size + jnp.arange(size, dtype=jnp.int32)


def weights_key(key: jax.Array, model: int) -> jax.Array:
    """Return the key of a model's initial weights; independent of the order and the steps.

    Args:
        key: random key of the run.
        model: number of the model.
    """
    return jax.random.fold_in(jax.random.fold_in(key, _WEIGHTS), model)


def validation_key(key: jax.Array) -> jax.Array:
    """Return the key for the order and the augmentation of a second part of the data.

    Args:
        key: random key of the run, which the training part uses itself.
    """
    return jax.random.fold_in(key, _VALIDATION)


def sample_key(key: jax.Array, epoch: int | jax.Array, step: int | jax.Array) -> jax.Array:
    """Return the key for what a step draws beside its images, such as an architecture.

    Args:
        key: random key of the run.
        epoch: int32[], may be traced.
        step: int32[], step within the epoch, may be traced.
    """
    return step_key(jax.random.fold_in(key, _SAMPLE), epoch, step)


def alpha_key(key: jax.Array) -> jax.Array:
    """Return the key for the initial architecture parameters.

    Args:
        key: random key of the run.
    """
    return jax.random.fold_in(key, _ALPHA)


def batch_indices(
    permutation: jax.Array,
    step: int | jax.Array,
    global_batch: int,
    shard: int | jax.Array,
    shard_size: int,
) -> jax.Array:
    """Return the examples of one part of the batch in one step of an epoch.

    An epoch has `n // global_batch` steps. The examples left over are other ones in every epoch.

    Args:
        permutation: int32[n], from `epoch_permutation`.
        step: int32[], below `n // global_batch`, may be traced.
        global_batch: examples a step over all devices, static, at most n.
        shard: int32[], which part, such as the index of a device, may be traced.
        shard_size: examples of a part, static; a divisor of `global_batch`.

    Returns:
        int32[shard_size].

    Raises:
        ValueError: the sizes do not fit each other.
    """
    if not 0 < global_batch <= permutation.shape[0]:
        raise ValueError(f"global_batch {global_batch} of {permutation.shape[0]} examples")
    if shard_size < 1 or global_batch % shard_size:
        raise ValueError(f"shard_size {shard_size} of global_batch {global_batch}")
    start = jnp.asarray(step, jnp.int32) * global_batch
    start += jnp.asarray(shard, jnp.int32) * shard_size
    return lax.dynamic_slice_in_dim(permutation, start, shard_size)


def scoring_indices(n: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return batches over a whole split in which every example counts exactly once.

    The last batch is filled with other examples, from the start of the split, with mask 0. They are
    real ones because scoring uses the batch's own statistics, which black images would distort.

    Args:
        n: number of examples, positive.
        batch: examples a batch over all devices, positive.

    Returns:
        indices int32[steps, batch] and mask f32[steps, batch], 1 for the examples that count and
        0 for the filling; steps = ceil(n / batch).

    Raises:
        ValueError: `n` or `batch` is not positive.
    """
    if n < 1 or batch < 1:
        raise ValueError(f"n {n} and batch {batch} must be positive")
    positions = np.arange(-(-n // batch) * batch).reshape(-1, batch)
    return (positions % n).astype(np.int32), (positions < n).astype(np.float32)
