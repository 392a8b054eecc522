"""Gradient strategies between their epochs: when and what they drop, what is derived, replayed."""

import copy

import numpy as np
import pytest

from cpnas_jax.architecture.events import epoch_line
from cpnas_jax.architecture.gradient import GradientRule, derived, replay_gradient
from cpnas_jax.architecture.sampling import all_survivors
from cpnas_jax.models.space import EDGES, OPERATIONS
from cpnas_jax.runtime.errors import UserError

NONE = OPERATIONS.index("none")


def alphas(seed, edges=False):
    generator = np.random.default_rng(seed)
    found = {cell: generator.normal(size=(14, 8)) for cell in ("normal", "reduce")}
    if edges:
        found |= {f"{cell}_edges": generator.normal(size=14) for cell in ("normal", "reduce")}
    return found


@pytest.mark.parametrize(("epochs", "warmup"), [(50, 15), (8, 1), (22, 15)])
def test_drops_come_at_equal_distances_and_end_with_the_search(epochs, warmup):
    ends = GradientRule(OPERATIONS, epochs, warmup, drops=True).stage_ends()
    assert len(set(ends)) == 7
    assert ends == sorted(ends)
    assert (ends[0] > warmup, ends[-1]) == (True, epochs)
    distances = np.diff([warmup, *ends])
    assert distances.max() - distances.min() <= 1


def test_the_operation_with_the_smallest_alpha_is_dropped():
    rule, survivors = GradientRule(OPERATIONS, 50, 15, drops=True), all_survivors()
    survivors[1, 3, 2] = False
    survivors = np.where(np.arange(8) == 2, False, survivors)
    alpha = alphas(0)
    decision = rule.decide(alpha, survivors)
    for row, cell in enumerate(("normal", "reduce")):
        for edge in range(14):
            worst = min(np.flatnonzero(survivors[row, edge]), key=lambda k: alpha[cell][edge, k])
            assert decision.line["dropped"][row][edge] == OPERATIONS[worst]
            assert not decision.survivors[row, edge, worst]
    assert (decision.survivors.sum(axis=-1) == 6).all()


def test_a_mixture_ends_with_the_largest_weight_but_none():
    alpha = alphas(1)
    alpha["normal"][4, NONE] = 9.0
    operations, worth, weights = derived(alpha, all_survivors())
    for row, cell in enumerate(("normal", "reduce")):
        exponentials = np.exp(alpha[cell])
        np.testing.assert_allclose(weights[row], exponentials / exponentials.sum(1, keepdims=True))
        others = np.delete(alpha[cell], NONE, axis=1)
        names = np.delete(np.array(OPERATIONS), NONE)
        assert [OPERATIONS[k] for k in operations[row]] == list(names[others.argmax(axis=1)])
    np.testing.assert_array_equal(worth, weights)


def test_edges_are_ranked_by_their_normalised_weights_too():
    alpha = alphas(2, edges=True)
    _, worth, weights = derived(alpha, all_survivors())
    for row, cell in enumerate(("normal", "reduce")):
        for node in range(2, 6):
            into = [n for n, (_, target) in enumerate(EDGES) if target == node]
            share = np.exp(alpha[f"{cell}_edges"][into])
            np.testing.assert_allclose(
                worth[row, into], weights[row, into] * (share / share.sum())[:, None]
            )


def log(rule, edges=False):
    survivors, lines = all_survivors(rule.operations), []
    for epoch in range(1, rule.epochs + 1):
        alpha = alphas(max(epoch, rule.warmup), edges)
        lines.append(
            epoch_line(
                epoch=epoch,
                accuracies={"child": 0.5},
                losses={"child": 1.0},
                objective=1.0,
                alpha=alpha,
                seconds=1.0,
            )
        )
        if rule.ends_stage(epoch):
            decision = rule.decide(alpha, survivors)
            lines.append(decision.line)
            survivors = decision.survivors
    return lines, survivors


@pytest.mark.parametrize("drops", [True, False])
def test_a_genuine_log_is_accepted_as_far_as_it_goes(drops):
    rule = GradientRule(OPERATIONS, 9, 2, drops, edges=not drops)
    lines, survivors = log(rule, edges=not drops)
    whole = replay_gradient(lines, rule)
    assert whole.finished
    assert whole.sampled_epochs == 9
    np.testing.assert_array_equal(whole.survivors, survivors)
    if drops:
        np.testing.assert_array_equal(whole.operations, survivors.argmax(axis=-1))
        assert (whole.compared.sum(axis=-1) == 2).all()
    else:
        expected, worth, _ = derived(alphas(9, edges=True), all_survivors())
        np.testing.assert_array_equal(whole.operations, expected)
        np.testing.assert_array_equal(whole.worth, worth)
    for length in range(len(lines)):
        assert not replay_gradient(lines[:length], rule).finished


def put(number, key, value):
    def apply(lines):
        lines[number][key] = value

    return apply


def tables(seed, edges=False):
    return {name: leaf.tolist() for name, leaf in alphas(seed, edges).items()}


def other_drop(lines):
    names = lines[3]["dropped"][0]
    left = [name for name in lines[3]["indicator"]["normal"][5] if name != names[5]]
    names[5] = left[0]


def other_indicator(lines):
    lines[3]["indicator"]["reduce"][2]["none"] += 0.01


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (put(1, "epoch", 3), "line 2: it is the line of epoch 3; expected epoch 2"),
        (lambda lines: lines.pop(3), "line 4: it is an epoch line; expected the stage line"),
        (lambda lines: lines.insert(1, lines[3]), "line 2: it is a stage line; no stage ends here"),
        (other_drop, "line 4: what it drops is not what has the smallest indicator"),
        (other_indicator, "line 4: its indicator is not the softmax of the last alpha"),
        (put(2, "alpha", {}), "line 3: alpha is {}; it must have normal, reduce"),
        (put(2, "alpha", {"normal": [[1]], "reduce": [[1]]}), "line 3: alpha of 'normal' is not"),
        (lambda lines: lines.append(lines[-2]), "line 17: .* expected no line"),
        (put(0, "event", "choice"), "line 1: there is no key 'stage'"),
        (put(1, "alpha", tables(9)), "line 2: alpha moves in epoch 2; its warm-up has 2 epochs"),
        (put(0, "child_accuracy", None), "line 1: child_accuracy is None; this strategy trains"),
        (put(0, "parent_accuracy", 0.5), "line 1: parent_accuracy is 0.5; this strategy trains"),
        (put(4, "alpha", tables(5, True)), "line 5: alpha has .*; it must have normal, reduce"),
    ],
)
def test_tampering_is_told_with_its_line(tamper, words):
    rule = GradientRule(OPERATIONS, 9, 2, drops=True)
    lines = copy.deepcopy(log(rule)[0])
    tamper(lines)
    with pytest.raises(UserError, match=words):
        replay_gradient(lines, rule)
