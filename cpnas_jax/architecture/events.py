"""Lines of a search's log, history.jsonl: one definition of their keys for writer and checker."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cpnas_jax.architecture.sampling import operation_names, operation_positions
from cpnas_jax.models.space import CELL_TYPES, NUM_EDGES, NUM_OPERATIONS, OPERATIONS
from cpnas_jax.runtime.errors import UserError, shown


@dataclasses.dataclass(frozen=True)
class SampleEvent:
    """One sampled epoch.

    Attributes:
        stage: K, the operations left on each edge.
        round_index: t, counted from 1.
        sample: s, counted from 1.
        architecture: int32[2, 14].
        child_accuracy: A_C in [0, 1].
        parent_accuracy: A_P in [0, 1]; None where no parent is trained.
        z: the score, that of eq. 4.15 in CP-NAS.
        seconds: duration of the epoch.
    """

    stage: int
    round_index: int
    sample: int
    architecture: np.ndarray
    child_accuracy: float
    parent_accuracy: float | None
    z: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class StageEvent:
    """The end of a stage.

    Attributes:
        stage: K, the operations left on each edge before the drop.
        indicator: f64[2, 14, 8], e of eq. 4.16, 0 where `compared` is false.
        compared: bool[2, 14, 8], the operations that have an indicator.
        dropped: int32[2, 14].
    """

    stage: int
    indicator: np.ndarray
    compared: np.ndarray
    dropped: np.ndarray


@dataclasses.dataclass(frozen=True)
class ChoiceEvent:
    """The end of a search that chose among architectures drawn at random.

    Attributes:
        stage: K, the operations that every edge had to choose from.
        candidate: number of the chosen one, from 1.
        architecture: int32[2, 14].
        child_accuracy: A_C in [0, 1] that it was chosen by; None where nothing was trained.
    """

    stage: int
    candidate: int
    architecture: np.ndarray
    child_accuracy: float | None


Event = SampleEvent | StageEvent | ChoiceEvent


def sample_line(
    *,
    stage: int,
    round_index: int,
    sample: int,
    architecture: np.ndarray,
    child_accuracy: float,
    parent_accuracy: float | None,
    z: float,
    seconds: float,
) -> dict[str, Any]:
    """Build the line of a sampled epoch; arguments as in `SampleEvent`."""
    return {
        "event": "sample",
        "stage": int(stage),
        "round": int(round_index),
        "sample": int(sample),
        "architecture": operation_names(architecture),
        "child_accuracy": float(child_accuracy),
        "parent_accuracy": None if parent_accuracy is None else float(parent_accuracy),
        "z": float(z),
        "seconds": float(seconds),
    }


def stage_line(
    *, stage: int, indicator: np.ndarray, survivors: np.ndarray, dropped: np.ndarray
) -> dict[str, Any]:
    """Build the line that ends a stage.

    Args:
        stage: K, the operations left on each edge before the drop.
        indicator: f[2, 14, 8].
        survivors: bool[2, 14, 8] before the drop.
        dropped: int[2, 14].
    """
    tables = {
        cell: [
            {OPERATIONS[k]: float(indicator[row, edge, k]) for k in np.flatnonzero(mask)}
            for edge, mask in enumerate(survivors[row])
        ]
        for row, cell in enumerate(CELL_TYPES)
    }
    return {
        "event": "stage",
        "stage": int(stage),
        "indicator": tables,
        "dropped": operation_names(dropped),
    }


def choice_line(
    *, stage: int, candidate: int, architecture: np.ndarray, child_accuracy: float | None
) -> dict[str, Any]:
    """Build the line that ends a random search; arguments as in `ChoiceEvent`."""
    return {
        "event": "choice",
        "stage": int(stage),
        "candidate": int(candidate),
        "architecture": operation_names(architecture),
        "child_accuracy": None if child_accuracy is None else float(child_accuracy),
    }


def parse_line(line: Mapping[str, Any]) -> Event:
    """Read a line that a function of this module built. Further keys are not looked at.

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
    if event == "stage":
        indicator, compared = _indicator(line)
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
    raise ValueError(f"event is {shown(event)}; it must be 'sample', 'stage' or 'choice'")


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


def _indicator(line: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    tables = _require(line, "indicator")
    if not isinstance(tables, Mapping) or set(tables) != set(CELL_TYPES):
        raise ValueError(f"indicator is {shown(tables)}; it must have {', '.join(CELL_TYPES)}")
    indicator = np.zeros((len(CELL_TYPES), NUM_EDGES, NUM_OPERATIONS))
    compared = np.zeros(indicator.shape, dtype=bool)
    for row, cell in enumerate(CELL_TYPES):
        table = tables[cell]
        if not isinstance(table, list) or len(table) != NUM_EDGES:
            raise ValueError(
                f"indicator of {cell} is {shown(table)}; it must be a list of {NUM_EDGES} edges"
            )
        for column, edge in enumerate(table):
            if not isinstance(edge, Mapping) or not set(edge) <= set(OPERATIONS):
                raise ValueError(
                    f"indicator of {cell}, edge {column} is {shown(edge)}; "
                    "it must be {operation: number}"
                )
            for operation in edge:
                position = OPERATIONS.index(operation)
                indicator[row, column, position] = _number(edge, operation, 0, 1)
                compared[row, column, position] = True
    return indicator, compared
