"""What was run, how far it is, what it cost, and the commands, for a report."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from cpnas_jax.architecture.events import EpochEvent, SampleEvent
from cpnas_jax.architecture.gradient import GradientRule
from cpnas_jax.architecture.plus import ChildParentPlus
from cpnas_jax.config import base_config
from cpnas_jax.config_keys import flatten
from cpnas_jax.report.contents import Contents, Training, number, section
from cpnas_jax.runtime.console import duration
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.strategies import replayed_by, stored_rule

TRAINING_TITLES = {"train": "1-bit child", "parent": "float parent"}
PHASES = {
    "search": "Search",
    "train": "Training of the 1-bit child",
    "parent": "Training of the float parent",
}


def differing_keys(keys: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return key -> (default, value here) of all keys that are not as in `config.py`."""
    defaults = flatten(base_config())
    return {
        key: (defaults.get(key, "-"), value)
        for key, value in keys.items()
        if key not in defaults or defaults[key] != value
    }


def search_state(contents: Contents) -> dict[str, Any] | None:
    """Return how far the search is, and whether its log is consistent; None where there is none.

    `fault` says what of the log does not follow from the rest; `checked` is whether that was looked
    at, which for `cp_plus` it is not.
    """
    epochs = [e for e in contents.events if isinstance(e, SampleEvent | EpochEvent)]
    finished = "search" in contents.results
    if not contents.events and not finished:
        return None
    state: dict[str, Any] = {
        "strategy": contents.keys.get("search.strategy", "cp"),
        "epochs": len(epochs),
        "total": None,
        "finished": finished,
        "fault": None,
        "checked": False,
        "seconds": sum(getattr(event, "seconds", 0.0) for event in contents.events),
        "last": epochs[-1] if epochs else None,
        "sampled": "sampled " if epochs and isinstance(epochs[-1], SampleEvent) else "",
        "scored": sum(
            len(line["child_accuracy"]) for line in contents.history if line["event"] == "scores"
        ),
        "restored": _texts(contents, "restored"),
        "limited": _texts(contents, "limited"),
    }
    try:
        rule = stored_rule(contents.keys)
    except ValueError:
        state["fault"] = "its config is of another version, so it is not checked"
        return state
    state["total"] = rule.epochs if isinstance(rule, GradientRule) else rule.total
    if isinstance(rule, ChildParentPlus):
        # The credit of a whole search takes minutes.
        return state
    state["checked"] = True
    try:
        replayed_by(rule, contents.history, "history.jsonl")
    except UserError as error:
        state["fault"] = str(error)
    return state


def _texts(contents: Contents, key: str) -> list[str]:
    found = contents.results.get("search", {}).get(key, [])
    return [str(text) for text in found] if isinstance(found, list) else []


def training_state(contents: Contents, training: Training) -> dict[str, Any]:
    """Return how far a training is and what it reached so far."""
    last = training.lines[-1] if training.lines else {}
    evaluated = [line for line in training.lines if "test_accuracy" in line]
    total = contents.keys.get("train.epochs")
    test = section(training.results, "test", contents.path / "results.json")
    found = training.evaluation or {}
    finished = bool(training.results)
    so_far = evaluated[-1]["test_accuracy"] if evaluated else found.get("top1")
    return {
        "name": training.name,
        "title": TRAINING_TITLES[training.name],
        "epochs": int(last.get("epoch", training.results.get("epochs", 0))),
        "total": total,
        "finished": finished,
        # An evaluation may be of the middle of a training.
        "accuracy": test.get("top1", found.get("top1")) if finished else None,
        "so_far": so_far,
        "split": training.results.get("split", found.get("split", "test")),
        "best": training.results.get("best_test_accuracy"),
        "best_epoch": training.results.get("best_epoch"),
        "lines": training.lines,
    }


def costs(contents: Contents, searched: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return a row for each phase: its time without compiling, its epochs, its rate."""
    rows = []
    if searched is not None:
        flops = contents.results.get("search", {}).get("flops")
        rows.append(
            {
                "phase": PHASES["search"],
                "finished": searched["finished"],
                "epochs": searched["epochs"],
                "time": duration(searched["seconds"]),
                "rate": None,
                "flops": flops if isinstance(flops, int | float) else None,
            }
        )
    for training in contents.trainings:
        seconds = sum(line["seconds"] for line in training.lines)
        if not seconds and training.results:
            seconds = number(training.results, "seconds", "results.json")
        rates = [line["images_per_second"] for line in training.lines]
        rows.append(
            {
                "phase": PHASES[training.name],
                "finished": bool(training.results),
                "epochs": len(training.lines),
                "time": duration(seconds),
                "rate": sum(rates) / len(rates) if rates else None,
                "flops": None,
            }
        )
    return rows


def machines(contents: Contents) -> list[dict[str, Any]]:
    """Return where the phases began: those of the same versions and devices together."""
    found: list[dict[str, Any]] = []
    for phase, record in contents.records.items():
        place = {
            "devices": record.get("devices", []),
            "backend": record.get("backend", ""),
            "versions": section(record, "versions", contents.path / "config.json"),
        }
        same = [machine for machine in found if machine["place"] == place]
        if same:
            same[0]["phases"].append(PHASES[phase])
        else:
            found.append({"phases": [PHASES[phase]], "place": place, **place})
    return found


def commands(contents: Contents) -> dict[str, Any]:
    """Return the command lines that made the run, and those that look at it.

    A run of an older version has not noted its command; it is put together from the config then.
    """
    noted = [record.get("command") for record in contents.records.values()]
    made = list(dict.fromkeys(command for command in noted if isinstance(command, str)))
    if not made:
        # That file changes none of the defaults, from which the keys below differ.
        config = f"configs/cifar10.py:{contents.keys.get('mode', 'search')}"
        made = [_command(contents, config, differing_keys(contents.keys))]
    return {
        "made": made,
        "noted": any(isinstance(command, str) for command in noted),
        "report": _command(contents, f"configs/{_config_file(contents.keys)}.py:report", {}),
        "check": "python -c "
        + shlex.quote(
            "from cpnas_jax.strategies import check_search; "
            f"print(check_search({json.dumps(str(contents.path))}).finished)"
        ),
    }


def _config_file(keys: Mapping[str, Any]) -> str:
    name = str(keys.get("dataset.name", "cifar10"))
    return name if name in ("mnist5k", "cifar100") else "cifar10"


def _command(contents: Contents, config: str, changed: Mapping[str, Sequence[Any]]) -> str:
    flags = [f"--config={config}", f"--workdir={contents.path}"]
    for key, (_, value) in changed.items():
        if key not in ("mode",):
            written = tuple(value) if isinstance(value, list) else value
            flags.append(f"--config.{key}={written}")
    return "python -m cpnas_jax.main " + shlex.join(flags)
