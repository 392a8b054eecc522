"""Strategies of sampled paths: what they sample, score and leave; random draws."""

import numpy as np
import pytest

from cpnas_jax.architecture.edge_policy import derive
from cpnas_jax.architecture.sampling import all_survivors, stage_permutations
from cpnas_jax.architecture.strategy import ChildParent, RandomSearch, draw_candidate
from cpnas_jax.models.space import CHILD, EDGES, OPERATIONS, PARENT

NONE = OPERATIONS.index("none")


def test_without_a_parent_the_score_is_the_childs_accuracy():
    child = ChildParent(seed=3, rounds=2, beta_p=0.0, models=(CHILD,))
    both = ChildParent(seed=3, rounds=2, beta_p=0.0)
    assert child.score({CHILD: 0.3}) == both.score({CHILD: 0.3, PARENT: 0.9}) == 0.3
    assert child.total == both.total == 70
    survivors = all_survivors()
    np.testing.assert_array_equal(
        child.sample(8, 2, survivors), stage_permutations(3, 8, 2, survivors)
    )


def test_a_score_that_needs_a_parent_is_refused_without_one():
    with pytest.raises(ValueError, match="without a parent"):
        ChildParent(seed=0, rounds=1, beta_p=2.0, models=(CHILD,))


def test_draws_are_uniform_over_the_offered_operations():
    offered = all_survivors(("skip_connect", "sep_conv_3x3", "avg_pool_3x3"))
    drawn = np.stack([draw_candidate(7, n, offered, "all").drawn for n in range(1, 301)])
    counts = np.stack([(drawn == k).sum(axis=0) for k in range(len(OPERATIONS))], axis=-1)
    assert (counts[~offered] == 0).all()
    # 84 shares of 300 draws with p = 1/3: five standard deviations of one are 41.
    assert np.abs(counts[offered] - 100).max() < 41
    assert counts[offered].std() == pytest.approx((300 * 2 / 9) ** 0.5, rel=0.35)


@pytest.mark.parametrize("policy", ["all", "top2"])
@pytest.mark.parametrize("operations", [OPERATIONS, OPERATIONS[1:4]])
def test_what_is_trained_is_what_is_derived(policy, operations):
    offered = all_survivors(operations)
    for number in range(1, 30):
        found = draw_candidate(1, number, offered, policy)
        genotype = derive(found.drawn, found.values, offered, policy).genotype
        np.testing.assert_array_equal(found.architecture, genotype.architecture())
        for cell in found.architecture:
            for node in range(2, 6):
                into = [cell[e] for e, (_, target) in enumerate(EDGES) if target == node]
                kept = sum(operation != NONE for operation in into)
                assert kept == 2 if policy == "top2" else kept >= 1


def test_candidates_obey_the_limit_of_skips():
    offered = all_survivors(("none", "skip_connect", "sep_conv_3x3"))
    skip = OPERATIONS.index("skip_connect")
    most = 0
    for number in range(1, 20):
        free = draw_candidate(2, number, offered, "all")
        most = max(most, int((free.architecture == skip).sum(axis=-1).max()))
        found = draw_candidate(2, number, offered, "all", max_skips=2)
        assert (found.architecture == skip).sum(axis=-1).max() <= 2
        genotype = derive(found.drawn, found.values, found.compared, "all").genotype
        np.testing.assert_array_equal(found.architecture, genotype.architecture())
    assert most > 2


def test_draws_differ_by_seed_and_number_and_repeat():
    offered = all_survivors()
    first = draw_candidate(0, 1, offered, "all")
    np.testing.assert_array_equal(first.values, draw_candidate(0, 1, offered, "all").values)
    for seed, number in ((1, 1), (0, 2)):
        other = draw_candidate(seed, number, offered, "all")
        assert (other.drawn != first.drawn).sum() > 14


def test_the_first_of_the_best_candidates_is_left():
    strategy = RandomSearch(seed=0, candidates=3, epochs=2, policy="all")
    accuracies = {(1, 1): 0.9, (1, 2): 0.4, (2, 1): 0.1, (2, 2): 0.5, (3, 1): 0.1, (3, 2): 0.5}
    samples = [{"round": r, "sample": s, "child_accuracy": a} for (r, s), a in accuracies.items()]
    decision = strategy.decide(8, {}, all_survivors(), samples)
    assert decision.line["candidate"] == 2
    assert decision.line["child_accuracy"] == 0.5
    np.testing.assert_array_equal(
        decision.survivors.argmax(axis=-1), strategy.candidate(2, all_survivors()).architecture
    )
    assert (decision.survivors.sum(axis=-1) == 1).all()


def test_candidates_cannot_be_told_apart_untrained():
    with pytest.raises(ValueError, match="cannot be told apart"):
        RandomSearch(seed=0, candidates=2, epochs=0, policy="all")
