import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpnas_jax.architecture.edge_policy import derive
from cpnas_jax.architecture.genotype import from_architecture
from cpnas_jax.models.space import EDGES, OPERATIONS

NONE = OPERATIONS.index("none")


def last_stage(seed, none_share=0.5):
    """Two operations an edge, `none` among them on a share of the edges; the higher z is left."""
    generator = np.random.default_rng(seed)
    compared = np.zeros((2, 14, 8), bool)
    for cell in range(2):
        for edge in range(14):
            pair = generator.choice(np.arange(1, 8), size=2, replace=False)
            if generator.random() < none_share:
                pair[0] = NONE
            compared[cell, edge, pair] = True
    mean_z = np.where(compared, generator.uniform(size=(2, 14, 8)), np.nan)
    return np.nanargmax(mean_z, axis=-1), mean_z, compared


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 1.0]))
def test_top2_takes_the_two_best_operations_other_than_none(seed, none_share):
    operations, mean_z, compared = last_stage(seed, none_share)
    result = derive(operations, mean_z, compared, "top2")
    restored = set()
    for row, (cell, edges) in enumerate(result.genotype.cells()):
        for node in range(2, 6):
            found = []
            for column, (source, target) in enumerate(EDGES):
                if target == node:
                    others = [k for k in np.flatnonzero(compared[row, column]) if k != NONE]
                    best = max(others, key=lambda k: mean_z[row, column, k])
                    found.append((mean_z[row, column, best], source, OPERATIONS[best]))
                    if operations[row, column] == NONE:
                        restored.add((cell, source, target))
            expected = {(source, name) for _, source, name in sorted(found)[-2:]}
            assert {(e.source, e.operation) for e in edges if e.target == node} == expected
    kept = {(cell, e.source, e.target) for cell, edges in result.genotype.cells() for e in edges}
    reported = {(r.cell, r.edge.source, r.edge.target) for r in result.restored}
    assert reported == restored & kept


@given(st.integers(0, 10**6))
def test_all_is_what_the_search_left(seed):
    operations, mean_z, compared = last_stage(seed, 0.2)
    operations[:, [0, 2, 5, 9]] = np.where(
        operations[:, [0, 2, 5, 9]] == NONE, 3, operations[:, [0, 2, 5, 9]]
    )
    np.put_along_axis(compared, operations[..., None], True, axis=-1)
    mean_z = np.where(compared, np.nan_to_num(mean_z), np.nan)
    result = derive(operations, mean_z, compared, "all")
    assert result.genotype == from_architecture(operations)
    assert result.restored == ()


def test_all_restores_the_best_edge_of_a_dead_node():
    operations, mean_z, compared = last_stage(1, 0.0)
    # Node 3 has columns 2, 3, 4; `none` wins on all of them, over operations of known worth.
    for column, loser, worth in ((2, 4, 0.1), (3, 6, 0.3), (4, 5, 0.2)):
        operations[1, column] = NONE
        compared[1, column] = False
        compared[1, column, [NONE, loser]] = True
        mean_z[1, column, NONE] = 0.9
        mean_z[1, column, loser] = worth
    result = derive(operations, mean_z, compared, "all")
    (restored,) = result.restored
    assert (restored.cell, restored.edge.source, restored.edge.target) == ("reduce", 1, 3)
    assert str(restored) == (
        "reduce cell, edge c_{k-1} -> node 1: 'none' was left, restored 'dil_conv_3x3' with mean z "
        "0.300000 (dead node)"
    )
    names = {(e.source, e.target): e.operation for e in result.genotype.reduce}
    assert [names[source, 3] for source in range(3)] == ["none", "dil_conv_3x3", "none"]


def test_ties_keep_the_lowest_sources():
    operations, mean_z, compared = last_stage(2, 0.0)
    mean_z = np.where(compared, 0.5, np.nan)
    result = derive(operations, mean_z, compared, "top2")
    assert [edge.source for edge in result.genotype.normal] == [0, 1] * 4


def test_indicator_and_provenance_are_recorded():
    operations, mean_z, compared = last_stage(3, 0.0)
    result = derive(operations, mean_z, compared, "top2", np.where(compared, 0.5, 0.0), {"seed": 4})
    assert result.genotype.provenance == (("seed", 4),)
    assert result.genotype.indicator[1][13] == tuple(
        (OPERATIONS[k], 0.5) for k in np.flatnonzero(compared[1, 13])
    )


def test_bad_input_is_refused():
    operations, mean_z, compared = last_stage(4, 0.0)
    with pytest.raises(ValueError, match="edge_policy is 'top1'"):
        derive(operations, mean_z, compared, "top1")
    with pytest.raises(ValueError, match="shapes"):
        derive(operations[0], mean_z, compared, "all")
    with pytest.raises(ValueError, match="did not compare"):
        derive(np.zeros_like(operations), mean_z, compared, "all")
    with pytest.raises(ValueError, match="not finite"):
        derive(operations, mean_z * np.nan, compared, "all")
    only_none = np.zeros_like(compared)
    only_none[..., NONE] = True
    flat = np.zeros(only_none.shape)
    with pytest.raises(ValueError, match="top2 needs 2"):
        derive(np.zeros_like(operations), flat, only_none, "top2")
    with pytest.raises(ValueError, match="node 2 is dead"):
        derive(np.zeros_like(operations), flat, only_none, "all")
