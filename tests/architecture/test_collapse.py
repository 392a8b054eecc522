"""The share of operations without parameters, and the limit of skip connections."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpnas_jax.architecture.collapse import limit_skips, parameter_free_share
from cpnas_jax.architecture.edge_policy import derive
from cpnas_jax.architecture.sampling import all_survivors
from cpnas_jax.models.space import OPERATIONS

NONE, SKIP = OPERATIONS.index("none"), OPERATIONS.index("skip_connect")


def test_the_share_counts_skip_pooling_and_none():
    assert parameter_free_share(all_survivors()) == 0.5
    assert parameter_free_share(all_survivors(("none", "skip_connect", "max_pool_3x3"))) == 1.0
    survivors = all_survivors(OPERATIONS[4:])
    assert parameter_free_share(survivors) == 0.0
    survivors[0, 0, SKIP] = True
    assert parameter_free_share(survivors) == pytest.approx(1 / (28 * 4 + 1))


def result(seed, share):
    """Skips compared with another operation on every edge, left on a share of them."""
    generator = np.random.default_rng(seed)
    compared = np.zeros((2, 14, 8), bool)
    compared[..., SKIP] = True
    others = generator.choice([k for k in range(1, 8) if k != SKIP], size=(2, 14))
    np.put_along_axis(compared, others[..., None], True, axis=-1)
    worth = np.where(compared, generator.random((2, 14, 8)), np.nan)
    operations = np.where(generator.random((2, 14)) < share, SKIP, others)
    return operations.astype(np.int32), worth, compared


@given(st.integers(0, 10**6), st.sampled_from(["all", "top2"]), st.integers(0, 3))
def test_a_cell_has_at_most_so_many_and_keeps_the_best(seed, policy, most):
    operations, worth, compared = result(seed, 0.7)
    before = derive(operations, worth, compared, policy).genotype.operation_counts()
    limited = limit_skips(operations, worth, compared, policy, most)
    genotype = derive(limited.operations, worth, limited.compared, policy).genotype
    counts = genotype.operation_counts()
    for row, cell in enumerate(("normal", "reduce")):
        assert counts[cell]["skip_connect"] <= most
        if before[cell]["skip_connect"] <= most:
            assert counts[cell] == before[cell]
        lost = operations[row] != limited.operations[row]
        assert (operations[row][lost] == SKIP).all()
        assert (limited.operations[row][lost] != NONE).all()
        if policy == "all" and lost.any() and most:
            kept = (operations[row] == SKIP) & ~lost
            assert worth[row, kept, SKIP].min() > worth[row, lost, SKIP].max()
    assert all("a skip connection is over" in change for change in limited.changes)
    again = limit_skips(limited.operations, worth, limited.compared, policy, most)
    assert again.changes == ()


def test_none_comes_where_nothing_else_was_compared():
    operations = np.full((2, 14), SKIP, np.int32)
    compared = all_survivors(("none", "skip_connect"))
    compared[..., 4] = np.arange(14) < 2
    worth = np.where(compared, 0.5, np.nan)
    limited = limit_skips(operations, worth, compared, "all", 12)
    assert (limited.operations[:, :2] == 4).all()
    assert len(limited.changes) == 4


def test_a_node_is_not_left_with_nothing():
    operations = np.full((2, 14), SKIP, np.int32)
    compared = all_survivors(("none", "skip_connect"))
    worth = np.where(compared, 0.5, np.nan)
    limited = limit_skips(operations, worth, compared, "all", 1)
    genotype = derive(limited.operations, worth, limited.compared, "all").genotype
    # One edge into each of the four nodes.
    assert [genotype.operation_counts()[cell]["skip_connect"] for cell in ("normal", "reduce")] == [
        4,
        4,
    ]
    assert sum("4 skip connections stay" in change for change in limited.changes) == 2
    alone = limit_skips(operations, worth, all_survivors(("skip_connect",)), "all", 3)
    assert (alone.operations == SKIP).all()
    assert len(alone.changes) == 2
