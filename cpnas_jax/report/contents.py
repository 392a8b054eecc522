"""What a workdir holds, read and checked, for its report."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from cpnas_jax import predictions
from cpnas_jax.architecture.events import Event
from cpnas_jax.architecture.genotype import Genotype
from cpnas_jax.architecture.notation import load_genotype
from cpnas_jax.architecture.parsing import parse_events, parse_history
from cpnas_jax.runtime.errors import UserError, shown
from cpnas_jax.runtime.paths import user_path
from cpnas_jax.trained import directory_name

TRAININGS = tuple(directory_name(binary) for binary in (True, False))
"""Where child and parent of a workdir have their files."""


@dataclasses.dataclass(frozen=True)
class Training:
    """One trained network.

    Attributes:
        name: its directory, one of `TRAININGS`.
        lines: of `metrics.jsonl`, one an epoch.
        results: what `results.json` says of it; empty until it is finished.
        evaluation: content of `evaluation.json`, or None.
        answers: content of `predictions.npz`, or None.
    """

    name: str
    lines: tuple[Mapping[str, Any], ...]
    results: Mapping[str, Any]
    evaluation: Mapping[str, Any] | None
    answers: Mapping[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Contents:
    """What is known of a run.

    Attributes:
        path: of the workdir.
        keys: all config keys, dotted.
        records: phase -> where it began: command, versions, devices.
        results: content of `results.json`, empty where there is none.
        history: lines of the search's log as objects.
        events: the same, read.
        genotype: the cells found or trained, or None.
        trainings: those that began.
        summary: content of `summary.json`, or None.
        shipped: `train` and `parent` -> content of `export.json`, where it was exported.
    """

    path: epath.Path
    keys: Mapping[str, Any]
    records: Mapping[str, Mapping[str, Any]]
    results: Mapping[str, Any]
    history: tuple[Mapping[str, Any], ...]
    events: tuple[Event, ...]
    genotype: Genotype | None
    trainings: tuple[Training, ...]
    summary: Mapping[str, Any] | None
    shipped: Mapping[str, Mapping[str, Any]]


def read_contents(workdir: str | os.PathLike[str]) -> Contents:
    """Read the files of a run, finished, under way or killed; nothing is locked or written.

    Raises:
        UserError: there is no run, or a file is damaged; the file, what it says, what is right.
    """
    path = user_path("--workdir", workdir)
    if not path.exists():
        raise UserError(f"there is no --workdir={path}; give that of a search or a training")
    if not path.is_dir():
        raise UserError(f"--workdir={path} is no directory; give that of a search or a training")
    stored = _object(path / "config.json")
    if stored is None:
        raise UserError(
            f"--workdir={path} holds no run: there is no config.json in it; give the directory of "
            "a search or a training"
        )
    keys = section(stored, "config", path / "config.json")
    if not isinstance(keys.get("seed"), int):
        raise UserError(
            f"{path / 'config.json'}: config.seed is {shown(keys.get('seed'))}; it must be an "
            "integer"
        )
    results = _object(path / "results.json") or {}
    history = _lines(path / "search" / "history.jsonl")
    return Contents(
        path=path,
        keys=keys,
        records={
            name: section(stored, name, path / "config.json")
            for name in ("search", *TRAININGS)
            if name in stored
        },
        results={
            name: section(results, name, path / "results.json")
            for name in ("search", *TRAININGS)
            if name in results
        },
        history=history,
        events=parse_events(history, os.fspath(path / "search" / "history.jsonl")),
        genotype=_genotype(path),
        trainings=tuple(filter(None, (_training(path, name, results) for name in TRAININGS))),
        summary=_summary(path),
        shipped={name: found for name in TRAININGS if (found := _shipped(path, name)) is not None},
    )


def section(data: Mapping[str, Any], key: str, path: epath.Path) -> Mapping[str, Any]:
    """Return an object inside a file; empty where it is absent.

    Raises:
        UserError: it is something else.
    """
    value = data.get(key, {})
    if not isinstance(value, Mapping):
        raise UserError(f"{path}: {key} is {shown(value)}; it must be an object")
    return value


def _text(path: epath.Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged (not UTF-8 text); restore it") from error


def _object(path: epath.Path) -> dict[str, Any] | None:
    """Read a JSON object, or None where the file is absent."""
    if not path.exists():
        return None
    text = _text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({shown(text)} is not JSON: {' '.join(str(error).split())}); "
            "restore it, or delete it and run the phase again"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged ({shown(value)} is no JSON object); restore it")
    return value


def _lines(path: epath.Path) -> tuple[dict[str, Any], ...]:
    return tuple(parse_history(_text(path), os.fspath(path))) if path.exists() else ()


def _genotype(path: epath.Path) -> Genotype | None:
    files = [path / "genotype.json", *(path / name / "genotype.json" for name in TRAININGS)]
    return next((load_genotype(file) for file in files if file.exists()), None)


def number(data: Mapping[str, Any], key: str, where: str) -> float:
    """Return a finite number of a file.

    Raises:
        UserError: it is something else.
    """
    value: Any = data.get(key)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise UserError(f"{where}: {key} is {shown(value)}; it must be a finite number")
    return value


def _training(path: epath.Path, name: str, results: Mapping[str, Any]) -> Training | None:
    file = path / name / "metrics.jsonl"
    lines = _lines(file)
    for count, line in enumerate(lines, start=1):
        for key in ("epoch", "loss", "accuracy", "learning_rate", "images_per_second", "seconds"):
            number(line, key, f"{file}, line {count}")
        for key, value in line.items():
            if key != "event" and value is not None:
                number(line, key, f"{file}, line {count}")
    own = section(results, name, path / "results.json")
    if own:
        where = f"{path / 'results.json'}, {name}"
        number(own, "seconds", where)
        number(section(own, "test", path / "results.json"), "top1", where)
    evaluation = _evaluation(path / name / "evaluation.json")
    answers = predictions.load(path / name / predictions.NAME)
    if not (lines or own or evaluation):
        return None
    return Training(name, lines, own, evaluation, answers)


def _evaluation(path: epath.Path) -> dict[str, Any] | None:
    found = _object(path)
    if found is None:
        return None
    for key in ("examples", "top1", "loss", "epoch"):
        number(found, key, os.fspath(path))
    names, confusion = found.get("class_names"), found.get("confusion")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: class_names is {shown(names)}; it must be a list of names")
    if not isinstance(confusion, list) or not all(
        isinstance(row, list)
        and len(row) == len(confusion) == len(names)
        and all(type(count) is int and count >= 0 for count in row)
        for row in confusion
    ):
        raise UserError(
            f"{path}: confusion is {shown(confusion)}; it must be {len(names)} rows of "
            f"{len(names)} counts"
        )
    return found


def _shipped(path: epath.Path, name: str) -> dict[str, Any] | None:
    file = path / name / "export.json"
    found = _object(file)
    for key in ("bytes", "images", "close", "largest", "shipped", "trained", "epoch"):
        if found is not None:
            number(found, key, os.fspath(file))
    return found


def _summary(path: epath.Path) -> dict[str, Any] | None:
    file = path / "summary.json"
    found = _object(file)
    if found is None:
        return None
    for key, parts in {
        "parameters": ("total", "binary", "float"),
        "memory_bytes": ("packed", "float"),
        "macs": ("binary", "binary_depthwise", "float"),
    }.items():
        for part in parts:
            number(section(found, key, file), part, f"{file}, {key}")
    for key in ("ops", "compression"):
        number(found, key, os.fspath(file))
    layers = found.get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, Mapping) for layer in layers):
        raise UserError(f"{file}: layers is {shown(layers)}; it must be a list of objects")
    return found
