"""Lines of a search's log, history.jsonl: one definition of their keys for writer and checker."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cpnas_jax.architecture.sampling import operation_names, operation_positions
from cpnas_jax.models.space import (
    CELL_TYPES,
    MODELS,
    NUM_EDGES,
    NUM_OPERATIONS,
    OPERATIONS,
    PARENT,
)
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


@dataclasses.dataclass(frozen=True)
class ScoresEvent:
    """Architectures of a round that were scored and not trained.

    Attributes:
        stage: K, the operations left on the edges that have most.
        round_index: of the stage's scored rounds, from 1.
        measures: `child_accuracy`, `child_log_likelihood` and those of the parent where there is
            one -> a number for each architecture, in the order that the seed gives them.
        seconds: for all of them.
    """

    stage: int
    round_index: int
    measures: Mapping[str, tuple[float, ...]]
    seconds: float


@dataclasses.dataclass(frozen=True)
class PruningEvent:
    """The end of a stage that dropped any number of operations of an edge.

    Attributes:
        stage: K.
        scored: architectures scored so far.
        reliability: of the effects, by split halves.
        effects: f64[2, 14, 8], 0 where `compared` is false.
        compared: bool[2, 14, 8], the operations that survived until then.
        dropped: bool[2, 14, 8].
    """

    stage: int
    scored: int
    reliability: float
    effects: np.ndarray
    compared: np.ndarray
    dropped: np.ndarray


@dataclasses.dataclass(frozen=True)
class EpochEvent:
    """One epoch of a gradient strategy.

    Attributes:
        epoch: its number, from 1.
        child_accuracy: on the validation part, in [0, 1]; None where no child is trained.
        parent_accuracy: likewise.
        alpha: f64[14, 8] for each cell type after the epoch; with edge normalisation also f64[14]
            under `<cell>_edges`.
        seconds: duration of the epoch.
    """

    epoch: int
    child_accuracy: float | None
    parent_accuracy: float | None
    alpha: Mapping[str, np.ndarray]
    seconds: float


Event = SampleEvent | StageEvent | ChoiceEvent | ScoresEvent | PruningEvent | EpochEvent


EVENTS = ("sample", "stage", "choice", "scores", "pruning", "epoch")
"""What a line can be of."""

EPOCHS = ("sample", "epoch")
"""The lines of what was trained."""


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
    return {
        "event": "stage",
        "stage": int(stage),
        "indicator": _tables(indicator, survivors),
        "dropped": operation_names(dropped),
    }


def _tables(values: np.ndarray, mask: np.ndarray) -> dict[str, list[dict[str, float]]]:
    """Return cell -> for each edge operation -> value, of the operations in the mask."""
    return {
        cell: [
            {OPERATIONS[k]: float(values[row, edge, k]) for k in np.flatnonzero(own)}
            for edge, own in enumerate(mask[row])
        ]
        for row, cell in enumerate(CELL_TYPES)
    }


def scores_line(
    *, stage: int, round_index: int, measures: Mapping[str, Sequence[float]], seconds: float
) -> dict[str, Any]:
    """Build the line of a round of scored architectures; arguments as in `ScoresEvent`."""
    return {
        "event": "scores",
        "stage": int(stage),
        "round": int(round_index),
        **{name: [float(value) for value in values] for name, values in measures.items()},
        "seconds": float(seconds),
    }


def pruning_line(
    *,
    stage: int,
    scored: int,
    reliability: float,
    effects: np.ndarray,
    survivors: np.ndarray,
    dropped: np.ndarray,
) -> dict[str, Any]:
    """Build the line that ends a stage; arguments as in `PruningEvent`, survivors before it."""
    return {
        "event": "pruning",
        "stage": int(stage),
        "scored": int(scored),
        "reliability": float(reliability),
        "effects": _tables(effects, survivors),
        "dropped": [
            [[OPERATIONS[k] for k in np.flatnonzero(edge)] for edge in cell] for cell in dropped
        ],
    }


def epoch_line(
    *,
    epoch: int,
    accuracies: Mapping[str, float],
    losses: Mapping[str, float],
    objective: float,
    alpha: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Build the line of an epoch of a gradient strategy.

    Args:
        epoch: its number, from 1.
        accuracies: model -> accuracy on the validation part.
        losses: model -> mean training loss.
        objective: mean of alpha's objective; 0 where alpha does not move.
        alpha: after the epoch.
        seconds: duration.
    """
    return {
        "event": "epoch",
        "epoch": int(epoch),
        **{f"{model}_accuracy": accuracies.get(model) for model in MODELS},
        "losses": {model: float(loss) for model, loss in losses.items()},
        "objective": float(objective),
        "alpha": {name: np.asarray(leaf, np.float64).tolist() for name, leaf in alpha.items()},
        "seconds": float(seconds),
    }


def dropped_mask(names: Sequence[Sequence[Sequence[str]]]) -> np.ndarray:
    """Return bool[2, 14, 8] of what a line of pruning names as dropped."""
    return np.array([[np.isin(OPERATIONS, edge) for edge in cell] for cell in names])


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
        for name, low, high in (("accuracy", 0, 1), ("log_likelihood", -math.inf, 0)):
            key = f"{model}_{name}"
            if key not in line and model == PARENT:
                continue
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
    shape = [len(cell) if isinstance(cell, list) else -1 for cell in value or ()]
    if shape != [NUM_EDGES] * len(CELL_TYPES):
        raise ValueError(f"dropped is {shown(value)}; it must be two lists of 14 lists")
    for edge in (edge for cell in value for edge in cell):
        if not isinstance(edge, list) or not set(edge) <= set(OPERATIONS):
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
