"""Random architectures, and how test programs are compiled."""

import numpy as np

from cpnas_jax.models.space import NUM_EDGES, OPERATIONS

QUICK = {"xla_backend_optimization_level": "0"}  # numbers are tested here, not speed


def random_architecture(seed):
    """An int32[2, 14]; of 28 edges, each operation on at least three."""
    operations = np.arange(2 * NUM_EDGES) % len(OPERATIONS)
    shuffled = np.random.default_rng(seed).permutation(operations)
    return shuffled.reshape(2, NUM_EDGES).astype(np.int32)
