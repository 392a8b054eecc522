"""`cp_plus`: what it samples, when it has scored enough, what it drops."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpnas_jax.architecture.events import scores_line
from cpnas_jax.architecture.parsing import parse_line
from cpnas_jax.architecture.plus import ChildParentPlus, PlusSettings, balanced_permutations
from cpnas_jax.architecture.sampling import all_survivors, stage_permutations
from cpnas_jax.models.space import OPERATIONS

SETTINGS = PlusSettings(
    beta_p=0.5,
    measure="accuracy",
    max_scored=320,
    reliability=0.8,
    certainty=0.95,
    carry=0.5,
    training=2,
    paths="epoch",
)


def plus(**changed):
    return ChildParentPlus(seed=0, rounds=1, settings=dataclasses.replace(SETTINGS, **changed))


@st.composite
def uneven_survivors(draw):
    seed = draw(st.integers(0, 2**16))
    generator = np.random.default_rng(seed)
    counts = generator.integers(1, 9, (2, 14))
    ranks = generator.random((2, 14, 8)).argsort(axis=-1).argsort(axis=-1)
    return ranks < counts[..., None]


@given(uneven_survivors(), st.integers(1, 2**21))
def test_operations_of_an_edge_come_up_equally_often(survivors, round_index):
    stage = int(survivors.sum(axis=-1).max())
    found = balanced_permutations(3, stage, round_index, survivors)
    assert found.shape == (stage, 2, 14)
    counts = (found[..., None] == np.arange(8)).sum(axis=0)
    assert (counts[~survivors] == 0).all()
    left = survivors.sum(axis=-1, keepdims=True)
    assert ((counts == stage // left) | (counts == -(-stage // left)))[survivors].all()
    np.testing.assert_array_equal(found, balanced_permutations(3, stage, round_index, survivors))


def test_edges_with_equal_numbers_are_those_of_algorithm_9():
    survivors = all_survivors(OPERATIONS[2:7])
    np.testing.assert_array_equal(
        balanced_permutations(3, 5, 2, survivors), stage_permutations(3, 5, 2, survivors)
    )


def test_which_operation_comes_up_more_often_is_left_to_chance():
    survivors = all_survivors()
    survivors[0, 0] = np.arange(8) < 3
    counts = np.zeros(3)
    for round_index in range(1, 301):
        sampled = balanced_permutations(0, 8, round_index, survivors)[:, 0, 0]
        counts += np.bincount(sampled, minlength=3)
    # 8 = 3 + 3 + 2: which one has 2 is uniform; five standard deviations of 300 draws are 41.
    assert np.abs(counts - 800).max() < 41


def test_stages_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="edges have 8 to 8 survivors; stage 7"):
        balanced_permutations(0, 7, 1, all_survivors())


def test_the_supernet_is_trained_at_halvings():
    assert plus().total == 28
    assert [plus().rounds(stage) for stage in range(8, 1, -1)] == [2, 0, 0, 0, 2, 0, 2]
    child = ChildParentPlus(seed=0, rounds=1, settings=SETTINGS, models=("child",))
    assert (child.total, child.rounds(4)) == (56, 4)
    assert (plus(training=1).total, plus(training=1).rounds(4)) == (14, 1)
    five = ChildParentPlus(seed=0, rounds=3, settings=SETTINGS, operations=OPERATIONS[:5])
    assert [five.rounds(stage) for stage in (5, 4, 3, 2)] == [6, 0, 0, 6]
    assert five.total == 6 * (5 + 2)


@given(uneven_survivors(), st.integers(1, 20))
def test_steps_train_the_operations_of_an_edge_equally_often(survivors, steps):
    stage, strategy = int(survivors.sum(axis=-1).max()), plus(paths="step")
    epochs = [(t, sample) for t in (1, 2) for sample in range(1, stage + 1)]
    trained = [strategy.turns(stage, *epoch, survivors, steps) for epoch in epochs]
    assert {own.shape for own in trained} == {(steps, 2, 14)}
    # All epochs of a stage are one sequence, which does not ask how long an epoch is.
    sequence = np.concatenate(trained)
    at_once = strategy.turns(stage, 1, 1, survivors, len(sequence))
    np.testing.assert_array_equal(sequence, at_once)
    rounds = sequence.reshape(-1, stage, 2, 14)
    counts = (rounds[..., None] == np.arange(8)).sum(axis=1)
    left = survivors.sum(axis=-1, keepdims=True)
    fair = (counts == stage // left) | (counts == -(-stage // left))
    assert np.where(survivors, fair, counts == 0).all()


def test_what_steps_train_is_neither_sampled_nor_scored():
    strategy, survivors = plus(paths="step"), all_survivors()
    assert strategy.takes_turns
    assert not plus().takes_turns
    trained = strategy.turns(8, 1, 1, survivors, 16)
    others = [strategy.sample(8, t, survivors) for t in (1, 2)]
    others += [strategy.to_score(8, t, survivors) for t in (1, 2)]
    assert len(np.unique(np.concatenate([trained, *others]), axis=0)) == 16 + 4 * 8
    other_seed = ChildParentPlus(seed=1, rounds=1, settings=strategy.settings)
    assert (other_seed.turns(8, 1, 1, survivors, 16) != trained).any()


class Worlds:
    """Scores of an additive world: each operation of an edge is worth so much, and noise."""

    def __init__(self, strategy, noise, seed=0):
        generator = np.random.default_rng(seed)
        self.worth = generator.normal(0, 0.01, (2, 1, 8)) + generator.normal(0, 0.004, (2, 14, 8))
        self.strategy, self.noise, self.generator = strategy, noise, generator

    def line(self, stage, number, survivors):
        chosen = self.strategy.to_score(stage, number, survivors)
        clean = np.take_along_axis(self.worth[None], chosen[..., None], -1).sum(axis=(1, 2, 3))
        measures = {}
        for model, level in (("child", 0.3), ("parent", 0.5)):
            noisy = np.clip(level + clean + self.generator.normal(0, self.noise, stage), 0, 1)
            measures[f"{model}_accuracy"] = noisy
            measures[f"{model}_log_likelihood"] = noisy - 1
        line = scores_line(stage=stage, round_index=number, measures=measures, seconds=1.0)
        parse_line(line)
        return line

    def stage(self, survivors, lines):
        """Score and end a stage; return its decision."""
        stage, number = int(survivors.sum(axis=-1).max()), 0
        while not self.strategy.is_enough(stage, survivors, lines):
            number += 1
            lines.append(self.line(stage, number, survivors))
        alpha, _ = self.strategy.end_alpha(*self.strategy.begin_alpha(), lines)
        decision = self.strategy.decide(stage, alpha, survivors, lines)
        lines.append(decision.line)
        return decision


def whole(world):
    survivors, lines = all_survivors(), []
    while survivors.sum(axis=-1).max() > 1:
        survivors = world.stage(survivors, lines).survivors
    return survivors.argmax(axis=-1), lines


def test_a_quiet_world_is_found_out_with_few_scores():
    strategy = plus(max_scored=900)
    world = Worlds(strategy, noise=0.002)
    found, lines = whole(world)
    best = world.worth.max(axis=-1)
    lost = best - np.take_along_axis(world.worth, found[..., None], -1)[..., 0]
    # The mean operation loses this much.
    assert lost.mean() < 0.1 * (best - world.worth.mean(axis=-1)).mean()
    scores = [line for line in lines if line["event"] == "scores"]
    first = [line for line in scores if line["stage"] == 8]
    assert len(first) == 8
    prunings = [line for line in lines if line["event"] == "pruning"]
    assert prunings[0]["reliability"] >= SETTINGS.reliability
    # Several at once where they are certain: fewer stages than operations.
    assert len(prunings) < 7


def test_noise_alone_is_never_certain_and_scored_to_the_limit():
    strategy = plus(max_scored=7 * 96)
    world = Worlds(strategy, noise=0.05)
    world.worth[:] = 0
    survivors, lines = all_survivors(), []
    decision = world.stage(survivors, lines)
    assert sum(line["event"] == "scores" for line in lines) == 96 // 8
    assert decision.line["reliability"] < 0.8
    # The worst of every edge, and hardly anything else.
    dropped = (survivors & ~decision.survivors).sum(axis=-1)
    assert dropped.min() == 1
    assert dropped.sum() <= 28 + 3


def test_alpha_is_the_credit():
    strategy = plus(max_scored=7 * 64)
    world, lines = Worlds(strategy, noise=0.002), []
    decision = world.stage(all_survivors(), lines)
    alpha, _ = strategy.end_alpha(*strategy.begin_alpha(), lines[:-1])
    effects = strategy.credit_of(lines[:-1]).effects
    for row, cell in enumerate(("normal", "reduce")):
        np.testing.assert_allclose(alpha[cell], effects[row], rtol=1e-6)
        for edge, own in enumerate(decision.line["effects"][cell]):
            np.testing.assert_allclose(list(own.values()), effects[row, edge], rtol=1e-6)


def test_the_score_is_of_the_chosen_measure_and_beta():
    for measure, beta, expected in (("accuracy", 2.0, 0.5), ("log_likelihood", 0.5, -0.8)):
        strategy = plus(measure=measure, beta_p=beta)
        numbers = {"child_accuracy": 0.1, "parent_accuracy": 0.3}
        numbers |= {"child_log_likelihood": -1.0, "parent_log_likelihood": -0.6}
        line = scores_line(
            stage=8,
            round_index=1,
            measures={name: [value] * 8 for name, value in numbers.items()},
            seconds=1.0,
        )
        _, scores, weights, groups, rounds = strategy._observations([line])
        np.testing.assert_allclose(scores, expected)
        assert (weights == 1).all()
        assert set(groups) == {0}
        assert set(rounds) == {1}


def test_scores_of_older_stages_count_less():
    strategy = plus(max_scored=7 * 32, carry=0.25)
    world, lines, survivors = Worlds(strategy, noise=0.01), [], all_survivors()
    for _ in range(3):
        survivors = world.stage(survivors, lines).survivors
    _, _, weights, groups, _ = strategy._observations(lines)
    for group, weight in ((0, 1 / 16), (1, 1 / 4), (2, 1.0)):
        assert set(weights[groups == group]) == {weight}
