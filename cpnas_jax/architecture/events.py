"""Lines of a search's log, history.jsonl: what they are, and how they are written."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cpnas_jax.architecture.sampling import operation_names
from cpnas_jax.models.space import (
    CELL_TYPES,
    MODELS,
    OPERATIONS,
)


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
