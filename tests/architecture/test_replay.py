import copy
import functools
import json

import numpy as np
import pytest

from cpnas_jax.architecture.alpha import restart, update_alpha
from cpnas_jax.architecture.events import sample_line, stage_line
from cpnas_jax.architecture.indicator import (
    child_parent_score,
    drop_worst,
    final_operations,
    indicator,
)
from cpnas_jax.architecture.parsing import parse_history, parse_line
from cpnas_jax.architecture.replay import replay
from cpnas_jax.architecture.sampling import all_survivors, stage_permutations
from cpnas_jax.architecture.strategy import ChildParent
from cpnas_jax.models.space import OPERATIONS
from cpnas_jax.runtime.errors import UserError

SETTINGS = {"seed": 5, "rounds": 2, "beta_p": 2.0}


@functools.cache
def logged(beta_p=SETTINGS["beta_p"], rounds=SETTINGS["rounds"]):
    """Search with random accuracies, writing the log as the search phase does."""
    generator = np.random.default_rng(0)
    survivors, lines = all_survivors(), []
    for stage in range(8, 1, -1):
        state = restart()
        for t in range(1, rounds + 1):
            drawn = stage_permutations(SETTINGS["seed"], stage, t, survivors)
            for s, architecture in enumerate(drawn, start=1):
                child, parent = generator.uniform(size=2)
                z = child_parent_score(child, parent, beta_p)
                state = update_alpha(*state, architecture, z, t)
                lines.append(
                    sample_line(
                        stage=stage,
                        round_index=t,
                        sample=s,
                        architecture=architecture,
                        child_accuracy=child,
                        parent_accuracy=parent,
                        z=z,
                        seconds=0.5,
                    )
                )
        e = indicator(state[0], survivors)
        remaining, dropped = drop_worst(e, survivors)
        lines.append(stage_line(stage=stage, indicator=e, survivors=survivors, dropped=dropped))
        compared, survivors = survivors, remaining
    text = "".join(json.dumps(line) + "\n" for line in lines)
    return text, final_operations(survivors), compared


def genuine():
    return list(parse_history(logged()[0]))


def test_a_genuine_log_is_accepted():
    _, operations, compared = logged()
    result = replay(genuine(), ChildParent(**SETTINGS))
    assert result.finished
    assert result.stage == 1
    assert result.sampled_epochs == 35 * SETTINGS["rounds"]
    np.testing.assert_array_equal(result.operations, operations)
    np.testing.assert_array_equal(result.compared, compared)
    assert (np.isfinite(result.worth) == compared).all()


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 20, 76])
def test_an_unfinished_log_is_accepted(length):
    lines = genuine()[:length]
    result = replay(iter(lines), ChildParent(**SETTINGS))
    assert not result.finished
    assert result.operations is None
    assert result.sampled_epochs == sum(line["event"] == "sample" for line in lines)
    stages = sum(line["event"] == "stage" for line in lines)
    assert result.stage == 8 - stages
    assert (result.survivors.sum(axis=-1) == 8 - stages).all()
    assert (result.worth is None) == (stages == 0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 6}, "line 1: architecture of the normal cell"),
        ({"rounds": 3}, "line 17: it is the stage line of stage 8; expected the sample line"),
        ({"rounds": 1}, "line 9: it is the sample line of .* round 2.* expected the stage line"),
        ({"beta_p": 1.0}, "line 1: z is .* of these accuracies it must be"),
    ],
)
def test_the_log_of_another_search_is_refused(changed, message):
    with pytest.raises(UserError, match=message):
        replay(genuine(), ChildParent(**{**SETTINGS, **changed}))


def tamper_architecture(lines):
    cell = lines[3]["architecture"][1]
    cell[5] = OPERATIONS[(OPERATIONS.index(cell[5]) + 1) % 8]


def swap_samples(lines):
    lines[0]["architecture"], lines[1]["architecture"] = (
        lines[1]["architecture"],
        lines[0]["architecture"],
    )


def swap_lines(lines):
    lines[4], lines[5] = lines[5], lines[4]


def nudge_indicator(lines):
    edge = lines[16]["indicator"]["reduce"][2]
    first, second = list(edge)[:2]
    edge[first] += 1e-4
    edge[second] -= 1e-4


def drop_another(lines):
    edge = lines[16]["indicator"]["normal"][7]
    lines[16]["dropped"][0][7] = max(edge, key=edge.get)


def accuracy_and_z(lines):
    # z agrees with the accuracy again, so that only the indicator gives it away.
    line = lines[2]
    line["child_accuracy"] = 1 - line["child_accuracy"]
    line["z"] = child_parent_score(line["child_accuracy"], line["parent_accuracy"], 2.0)


def put(number, key, value):
    def apply(lines):
        lines[number][key] = value

    return apply


TAMPERINGS = {
    "architecture": (tamper_architecture, "line 4: architecture of the reduce cell, edge"),
    "samples swapped": (swap_samples, "line 1: architecture of the normal cell"),
    "lines swapped": (swap_lines, "line 5: .* sample 6; expected .* sample 5"),
    "line left out": (lambda lines: lines.pop(7), "line 8: .* round 2, sample 1; expected .* 8"),
    "line twice": (lambda lines: lines.insert(3, lines[2]), "line 4: .* sample 3; expected .* 4"),
    "stage left out": (lambda lines: lines.pop(16), "line 17: .* expected the stage line of stage"),
    "more": (lambda lines: lines.append(lines[-1]), "line 78: .* expected no line, as the search"),
    "z": (
        lambda lines: lines[9].update(z=lines[9]["z"] + 1e-3),
        "line 10: z is .* it must be",
    ),
    "accuracy": (put(9, "child_accuracy", 0.123), "line 10: z is"),
    "accuracy and z": (accuracy_and_z, "line 17: indicator of .* by eq. 4.16 it must be"),
    "indicator": (nudge_indicator, "line 17: indicator of the reduce cell, edge 0->3"),
    "no indicator": (
        lambda lines: lines[16]["indicator"]["normal"][0].pop("none"),
        "line 17: indicator of the normal cell, edge 0->2, none is missing",
    ),
    "indicator of the dropped": (
        lambda lines: [edge.setdefault("none", 0.0) for edge in lines[-1]["indicator"]["normal"]],
        "line 77: indicator of the normal cell, .* none is given; the operation was dropped",
    ),
    "dropped": (drop_another, "line 17: dropped of the normal cell, edge 2->4 is .* smallest"),
    "event": (put(0, "event", "stop"), "line 1: event is 'stop'; it must be one of sample, stage"),
    "stage number": (put(0, "stage", 7), "line 1: .* stage 7, round 1, sample 1; expected .* 8"),
    "stage type": (put(0, "stage", "8"), "line 1: stage is '8'; it must be an integer from 1"),
    "bool": (put(0, "round", True), "line 1: round is True"),
    "percent": (put(0, "parent_accuracy", 95.0), r"parent_accuracy is 95.0; .* \[0, 1\]"),
    "NaN": (put(0, "z", float("nan")), "line 1: z is nan; it must be a number"),
    "text": (put(0, "z", "1"), "line 1: z is '1'"),
    "seconds": (put(0, "seconds", -1), "line 1: seconds is -1"),
    "no key": (lambda lines: lines[0].pop("z"), "line 1: there is no key 'z'"),
    "unknown operation": (
        lambda lines: lines[0]["architecture"][0].__setitem__(0, "conv"),
        "line 1: architecture: unknown operation 'conv'",
    ),
    "short architecture": (
        lambda lines: lines[0]["architecture"][0].pop(),
        r"line 1: architecture: there are cells of \[13, 14\]",
    ),
    "architecture type": (put(0, "architecture", 3), "line 1: architecture is 3; it must be two"),
    "indicator type": (put(16, "indicator", []), r"line 17: indicator is \[\]; it must have"),
    "indicator cell": (
        lambda lines: lines[16]["indicator"].update(normal=[]),
        r"line 17: indicator of normal is \[\]; it must be a list of 14",
    ),
    "indicator edge": (
        lambda lines: lines[16]["indicator"]["normal"].__setitem__(3, {"conv": 1}),
        "line 17: indicator of normal, edge 3 is",
    ),
    "not an object": (lambda lines: lines.__setitem__(2, 7), "line 3: 7 is not an object"),
}


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_tampering_is_told_with_its_line(tampering):
    apply, message = TAMPERINGS[tampering]
    lines = copy.deepcopy(genuine())
    apply(lines)
    with pytest.raises(UserError, match=message) as error:
        replay(lines, ChildParent(**SETTINGS), name="run/history.jsonl")
    assert str(error.value).startswith("run/history.jsonl, line ")
    assert "\n" not in str(error.value)


def test_lines_have_the_keys_that_scripts_rely_on():
    lines = genuine()
    assert list(lines[0]) == [
        *("event", "stage", "round", "sample", "architecture"),
        *("child_accuracy", "parent_accuracy", "z", "seconds"),
    ]
    assert list(lines[16]) == ["event", "stage", "indicator", "dropped"]
    assert [len(cell) for cell in lines[16]["dropped"]] == [14, 14]
    assert {len(edge) for edge in lines[31]["indicator"]["reduce"]} == {7}


def test_lines_round_trip():
    line = genuine()[4]
    event = parse_line(line)
    assert (event.stage, event.round_index, event.sample) == (8, 1, 5)
    assert event.z == line["z"]
    stage = parse_line(genuine()[-1])
    assert (stage.compared.sum(axis=-1) == 2).all()
    np.testing.assert_allclose(stage.indicator.sum(axis=-1), 1, rtol=1e-12)


def test_history_text():
    whole = '{"event": 1}\n{"event": 2}\n'
    assert [line["event"] for line in parse_history(whole)] == [1, 2]
    # The run was killed while it wrote the last line.
    assert [line["event"] for line in parse_history(whole[:-4])] == [1]
    with pytest.raises(UserError, match=r"h\.jsonl, line 2: 'what' is not JSON"):
        list(parse_history('{"a": 1}\nwhat\n', "h.jsonl"))
    with pytest.raises(UserError, match=r"line 1: '\[\]' is not a JSON object"):
        list(parse_history("[]\n"))


@pytest.mark.parametrize("beta_p", [-100.0, 2.0, 100.0])
def test_a_true_log_passes_at_the_largest_settings(beta_p):
    """Alpha is float32: what it loses must never pass for a wrong log."""
    text, _, _ = logged(beta_p=beta_p, rounds=10)
    result = replay(parse_history(text), ChildParent(seed=5, rounds=10, beta_p=beta_p))
    assert result.finished
