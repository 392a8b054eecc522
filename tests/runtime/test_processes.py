"""Two processes that tell each other what they find; and one that is alone."""

import json

import numpy as np
import pytest
from pod import run_together

from cpnas_jax.runtime import processes
from cpnas_jax.runtime.errors import UserError

SCRIPT = """
import json, os, pathlib, sys
import numpy as np
from etils import epath
from cpnas_jax.runtime import processes
from cpnas_jax.runtime.errors import UserError

coordinator, index, directory = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
processes.start(coordinator, 2, index, "off")
found = {"several": processes.several(), "first": processes.is_first(), "name": processes.name()}
calls = []

def value(n):
    calls.append(n)
    return {"array": np.arange(n), "process": index}

def refusal(function):
    try:
        function()
    except (UserError, OSError) as error:
        return [type(error).__name__, str(error), processes.is_everywhere(error)]

told = processes.from_first(lambda: value(5000))
found["told"] = [told["process"], int(told["array"].sum())]
found["nested"] = processes.from_first(lambda: processes.from_first(lambda: index))
found["long"] = len(processes.from_first(lambda: bytes(3 * 2**20 + 1)))
found["calls"] = calls

def mistake():
    raise UserError(f"mistake of {index}")

found["mistake"] = refusal(lambda: processes.from_first(mistake))
found["os error"] = refusal(lambda: processes.first_alone((directory / "none").rmdir))

# The others see what the first one made.
prepared = directory / "prepared"
processes.first_before_others(lambda: prepared.exists() or prepared.write_text(str(index)))
found["prepared"] = prepared.read_text()

found["any"] = [processes.any_process(index == 1), processes.any_process(False)]
same = {"a": np.arange(3), "b": {"c": 1.5, "d": [True, None]}}
found["agreement"] = refusal(lambda: processes.require_agreement("now", **same))
found["disagreement"] = refusal(
    lambda: processes.require_agreement("epoch 3", a=np.arange(3), alpha=np.float32(index))
)
found["shape"] = refusal(
    lambda: processes.require_agreement("now", a=np.zeros((1, 2) if index else (2, 1)))
)
found["shared"] = refusal(lambda: processes.require_shared(epath.Path(directory)))
own = directory / f"own-{index}"
own.mkdir()
found["own"] = refusal(lambda: processes.require_shared(epath.Path(own)))
found["left"] = sorted(path.name for path in directory.glob("**/.shared*"))
processes.meet("the end")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    script = directory / "script.py"
    script.write_text(SCRIPT)
    ended = run_together(lambda coordinator, index: (script, coordinator, index, directory), 2)
    assert [status for status, *_ in ended] == [0, 0], ended
    return [json.loads(output.splitlines()[-1]) for _, output, _ in ended]


def test_both_learn_what_the_first_one_finds(two):
    for index, found in enumerate(two):
        assert found["several"]
        assert found["first"] == (index == 0)
        assert found["name"] == f"process {index} of 2"
        assert found["told"] == [0, sum(range(5000))]
        assert found["nested"] == 0
        assert found["long"] == 3 * 2**20 + 1
        assert found["calls"] == ([] if index else [5000])
        assert found["prepared"] == "0"
        assert found["any"] == [True, False]


def test_errors_are_raised_in_both(two):
    assert two[0]["mistake"] == two[1]["mistake"] == ["UserError", "mistake of 0", True]
    assert two[0]["os error"] == two[1]["os error"]
    assert two[0]["os error"][0] == "FileNotFoundError"


def test_disagreement_is_named(two):
    for found in two:
        assert found["agreement"] is None
        kind, text, everywhere = found["disagreement"]
        assert kind == "UserError"
        assert "disagree at epoch 3: alpha is another in process 1 than in process 0" in text
        assert everywhere
        assert "a is another" in found["shape"][1]


def test_a_directory_that_is_not_shared(two):
    for found in two:
        assert found["shared"] is None
        assert "is not shared: process 1 does not see what process 0 writes" in found["own"][1]
        assert found["left"] == []


def test_alone_a_process_just_calls(tmp_path):
    assert not processes.several()
    assert processes.from_first(lambda: 3) == 3
    assert processes.first_before_others(lambda: 4) == 4
    assert processes.any_process(True)
    processes.require_agreement("now", a=np.zeros(3))
    processes.require_shared(tmp_path)
    with pytest.raises(UserError, match="no"):
        processes.first_alone(refuse)
    assert processes.is_everywhere(UserError("any"))


def refuse():
    raise UserError("no")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", None, 0), "--num_processes is missing; --coordinator, --num_processes,"),
        ((None, 2, 0), "--coordinator is missing"),
        (("host:1", 2, None), "--process_id is missing"),
        (("host", 2, 0), "--coordinator is 'host'; it must be HOST:PORT"),
        (("host:port", 2, 0), "it must be HOST:PORT"),
        (("host:1", 0, 0), "--num_processes is 0; it must be at least 1"),
        (("host:1", 2, 2), "--process_id is 2; with --num_processes=2 it must be 0 to 1"),
        (("host:1", 2, -1), "--process_id is -1"),
    ],
)
def test_flags_that_do_not_fit(arguments, message):
    with pytest.raises(UserError) as caught:
        processes.start(*arguments, "auto")
    assert message in str(caught.value)


@pytest.mark.parametrize("detection", ["auto", "off"])
def test_without_flags_a_machine_without_a_tpu_is_alone(detection):
    processes.start(None, None, None, detection)
    assert not processes.several()


def test_no_others_are_found(monkeypatch):
    monkeypatch.setattr(processes.jax.distributed, "initialize", nobody)
    with pytest.raises(UserError, match=r"do not find each other \(nobody there\); see --coord"):
        processes.start(None, None, None, "on")


def nobody():
    raise ValueError("nobody\nthere")
