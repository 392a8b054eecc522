"""Lines of a search's log, history.jsonl, read: every key is checked."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from cpnas_jax.architecture.events import (
    EVENTS,
    ChoiceEvent,
    EpochEvent,
    Event,
    PruningEvent,
    SampleEvent,
    ScoresEvent,
    StageEvent,
    dropped_mask,
)
from cpnas_jax.architecture.sampling import operation_positions
from cpnas_jax.models.space import (
    CELL_TYPES,
    MODELS,
    NUM_EDGES,
    NUM_OPERATIONS,
    OPERATIONS,
    PARENT,
)
from cpnas_jax.runtime.errors import UserError, shown


def parse_line(line: Mapping[str, Any]) -> Event:
    """Read a line that a function of `events` built. Further keys are not looked at.

    Raises:
        ValueError: in one line, with the key, the value and what would be right.
    """
    if not isinstance(line, Mapping):
        raise ValueError(f"{shown(line)} is not an object with a key 'event'")
    event = line.get("event")
    if event == "sample":
        return SampleEvent(
            stage=_integer(line, "stage"),
            round_index=_integer(line, "round"),
            sample=_integer(line, "sample"),
            architecture=_architecture(line, "architecture"),
            child_accuracy=_number(line, "child_accuracy", 0, 1),
            parent_accuracy=_number_or_none(line, "parent_accuracy", 0, 1),
            z=_number(line, "z", -math.inf, math.inf),
            seconds=_number(line, "seconds", 0, math.inf),
        )
    if event == "epoch":
        return EpochEvent(
            epoch=_integer(line, "epoch"),
            child_accuracy=_number_or_none(line, "child_accuracy", 0, 1),
            parent_accuracy=_number_or_none(line, "parent_accuracy", 0, 1),
            alpha=_alpha(line),
            seconds=_number(line, "seconds", 0, math.inf),
        )
    if event == "scores":
        return ScoresEvent(
            stage=_integer(line, "stage"),
            round_index=_integer(line, "round"),
            measures=_measures(line),
            seconds=_number(line, "seconds", 0, math.inf),
        )
    if event == "pruning":
        effects, compared = _operation_table(line, "effects", -math.inf, math.inf)
        return PruningEvent(
            stage=_integer(line, "stage"),
            scored=_integer(line, "scored"),
            reliability=_number(line, "reliability", -1, 1),
            effects=effects,
            compared=compared,
            dropped=_dropped(line),
        )
    if event == "stage":
        indicator, compared = _operation_table(line, "indicator", 0, 1)
        return StageEvent(
            stage=_integer(line, "stage"),
            indicator=indicator,
            compared=compared,
            dropped=_architecture(line, "dropped"),
        )
    if event == "choice":
        return ChoiceEvent(
            stage=_integer(line, "stage"),
            candidate=_integer(line, "candidate"),
            architecture=_architecture(line, "architecture"),
            child_accuracy=_number_or_none(line, "child_accuracy", 0, 1),
        )
    raise ValueError(f"event is {shown(event)}; it must be one of {', '.join(EVENTS)}")


def parse_events(
    lines: Iterable[Mapping[str, Any]], name: str = "history.jsonl"
) -> tuple[Event, ...]:
    """Read the lines of a log.

    Args:
        lines: as objects, of a finished search or not.
        name: what an error calls the log.

    Raises:
        UserError: a line is damaged.
    """
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(parse_line(line))
        except ValueError as error:
            raise UserError(f"{name}, line {number}: {error}") from error
    return tuple(events)


def parse_history(text: str, name: str = "history.jsonl") -> Iterator[dict[str, Any]]:
    """Give the lines of a log file as objects.

    A last line without its line end was being written when the run was killed; it is left out.

    Args:
        text: content of the file.
        name: what an error calls it, such as the file's path.

    Raises:
        UserError: if a line is not a JSON object.
    """
    lines = text.split("\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}, line {number}: {shown(line)} is not JSON") from error
        if not isinstance(value, dict):
            raise UserError(f"{name}, line {number}: {shown(line)} is not a JSON object")
        yield value


def _require(line: Mapping[str, Any], key: str) -> Any:
    if key not in line:
        raise ValueError(f"there is no key {key!r}")
    return line[key]


def _integer(line: Mapping[str, Any], key: str) -> int:
    value = _require(line, key)
    if type(value) is not int or value < 1:
        raise ValueError(f"{key} is {shown(value)}; it must be an integer from 1")
    return value


def _number(line: Mapping[str, Any], key: str, low: float, high: float) -> float:
    value = _require(line, key)
    if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{key} is {shown(value)}; it must be a number in [{low}, {high}]")
    return float(value)


def _number_or_none(line: Mapping[str, Any], key: str, low: float, high: float) -> float | None:
    return None if _require(line, key) is None else _number(line, key, low, high)


def _architecture(line: Mapping[str, Any], key: str) -> np.ndarray:
    value = _require(line, key)
    if not isinstance(value, list) or not all(isinstance(cell, list) for cell in value):
        raise ValueError(f"{key} is {shown(value)}; it must be two lists of 14 operations")
    try:
        return operation_positions(value)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _measures(line: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    found = {}
    for model in MODELS:
        ranges = {f"{model}_accuracy": (0, 1), f"{model}_log_likelihood": (-math.inf, 0)}
        if model == PARENT and not set(ranges) & set(line):
            continue
        for key, (low, high) in ranges.items():
            value = _require(line, key)
            if not isinstance(value, list):
                raise ValueError(f"{key} is {shown(value)}; it must be a list of numbers")
            # One by one, as each is named in what is wrong with it.
            found[key] = tuple(_number({key: number}, key, low, high) for number in value)
    return found


def _alpha(line: Mapping[str, Any]) -> dict[str, np.ndarray]:
    value = _require(line, "alpha")
    if not isinstance(value, Mapping) or not set(CELL_TYPES) <= set(value):
        raise ValueError(f"alpha is {shown(value)}; it must have {', '.join(CELL_TYPES)}")
    arrays = {}
    for name, table in value.items():
        cell, edges, _ = name.partition("_edges")
        shape = (NUM_EDGES,) if edges else (NUM_EDGES, NUM_OPERATIONS)
        try:
            arrays[name] = np.asarray(table, np.float64)
        except (TypeError, ValueError):
            arrays[name] = np.zeros(0)
        if cell not in CELL_TYPES or arrays[name].shape != shape:
            raise ValueError(f"alpha of {name!r} is not an array of numbers {list(shape)}")
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"alpha of {name!r} is not finite")
    return arrays


def _dropped(line: Mapping[str, Any]) -> np.ndarray:
    value = _require(line, "dropped")
    cells = value if isinstance(value, list) else []
    shape = [len(cell) if isinstance(cell, list) else -1 for cell in cells]
    if shape != [NUM_EDGES] * len(CELL_TYPES):
        raise ValueError(f"dropped is {shown(value)}; it must be two lists of 14 lists")
    for edge in (edge for cell in value for edge in cell):
        if not isinstance(edge, list) or not all(name in OPERATIONS for name in edge):
            raise ValueError(
                f"dropped of an edge is {shown(edge)}; it must be a list of operations"
            )
    return dropped_mask(value)


def _operation_table(
    line: Mapping[str, Any], key: str, low: float, high: float
) -> tuple[np.ndarray, np.ndarray]:
    tables = _require(line, key)
    if not isinstance(tables, Mapping) or set(tables) != set(CELL_TYPES):
        raise ValueError(f"{key} is {shown(tables)}; it must have {', '.join(CELL_TYPES)}")
    values = np.zeros((len(CELL_TYPES), NUM_EDGES, NUM_OPERATIONS))
    compared = np.zeros(values.shape, dtype=bool)
    for row, cell in enumerate(CELL_TYPES):
        table = tables[cell]
        if not isinstance(table, list) or len(table) != NUM_EDGES:
            raise ValueError(
                f"{key} of {cell} is {shown(table)}; it must be a list of {NUM_EDGES} edges"
            )
        for column, edge in enumerate(table):
            if not isinstance(edge, Mapping) or not set(edge) <= set(OPERATIONS):
                raise ValueError(
                    f"{key} of {cell}, edge {column} is {shown(edge)}; "
                    "it must be {operation: number}"
                )
            for operation in edge:
                position = OPERATIONS.index(operation)
                values[row, column, position] = _number(edge, operation, low, high)
                compared[row, column, position] = True
    return values, compared
