"""Strategies whose alpha has a gradient: when they drop what, and what is derived in the end.

`darts` and `pc_darts` drop nothing; in the end every edge has the operation other than `none` with
the largest weight [kin: DARTS]. `cp_gradient` drops, at equal distances after its warm-up, the
operation with the smallest alpha on every edge, until one is left [ours].
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cpnas_jax.architecture.events import EpochEvent, StageEvent, stage_line
from cpnas_jax.architecture.indicator import drop_worst, final_operations, indicator
from cpnas_jax.architecture.parsing import parse_line
from cpnas_jax.architecture.replay import TOLERANCE, ReplayResult
from cpnas_jax.architecture.sampling import LAST_STAGE, all_survivors, num_surviving
from cpnas_jax.architecture.strategy import Decision
from cpnas_jax.models.space import (
    CELL_TYPES,
    CHILD,
    EDGE_PARAMETERS,
    EDGES,
    NUM_EDGES,
    OPERATIONS,
    PARENT,
)
from cpnas_jax.runtime.errors import UserError

_NONE = OPERATIONS.index("none")


@dataclasses.dataclass(frozen=True)
class GradientRule:
    """What a gradient strategy does with alpha between its epochs.

    Attributes:
        operations: names that every edge starts with.
        epochs: of the whole search.
        warmup: epochs at the start in which alpha does not move.
        drops: whether operations are dropped.
        models: that are trained.
        edges: whether edges have parameters too (PC-DARTS).
    """

    operations: tuple[str, ...]
    epochs: int
    warmup: int
    drops: bool
    models: tuple[str, ...] = (CHILD,)
    edges: bool = False

    def stage_ends(self) -> list[int]:
        """Return after how many epochs each stage ends; the last one with the search."""
        if not self.drops:
            return []
        moving, stages = self.epochs - self.warmup, len(self.operations) - 1
        return [self.warmup + -(-moving * (i + 1) // stages) for i in range(stages)]

    def ends_stage(self, epoch: int) -> bool:
        """Tell whether a stage ends after so many epochs."""
        return epoch in self.stage_ends()

    def decide(self, alpha: Mapping[str, Any], survivors: np.ndarray) -> Decision:
        """Drop the operation with the smallest alpha on every edge."""
        values = indicator(alpha, survivors)
        remaining, dropped = drop_worst(values, survivors)
        stage = num_surviving(survivors)
        line = stage_line(stage=stage, indicator=values, survivors=survivors, dropped=dropped)
        return Decision(remaining, line)


def derived(
    alpha: Mapping[str, np.ndarray], survivors: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what a mixture ends with.

    Args:
        alpha: f[14, 8] for each cell type; with edge normalisation f[14] under `<cell>_edges`.
        survivors: bool[2, 14, 8], what took part.

    Returns:
        The operation of every edge, int32[2, 14]; what edges are ranked by, f64[2, 14, 8], NaN
        where an operation took no part: its weight, times that of the edge among those that enter
        the node where edges have weights [kin: PC-DARTS]; and the operations' weights.
    """
    weights = indicator(alpha, survivors)
    edges = np.ones((len(CELL_TYPES), NUM_EDGES))
    targets = np.array([target for _, target in EDGES])
    for row, cell in enumerate(CELL_TYPES):
        if EDGE_PARAMETERS[cell] in alpha:
            own = np.exp(np.asarray(alpha[EDGE_PARAMETERS[cell]], np.float64))
            totals = np.array([own[targets == target].sum() for target in targets])
            edges[row] = own / totals
    other = np.where(survivors, weights, -1.0)
    other[..., _NONE] = -1.0
    operations = other.argmax(axis=-1).astype(np.int32)
    return operations, np.where(survivors, weights * edges[..., None], np.nan), weights


def replay_gradient(
    lines: Iterable[Mapping[str, Any]], rule: GradientRule, name: str = "history.jsonl"
) -> ReplayResult:
    """Check a gradient strategy's log: its epochs come in order, drops follow from alpha.

    Args:
        lines: objects as the functions of `events` build them.
        rule: of the strategy that made the log.
        name: what an error calls the log.

    Raises:
        UserError: at the first inconsistent line, with its number and what would be right.
    """
    state = _Replay(rule)
    for number, line in enumerate(lines, start=1):
        try:
            state.take(parse_line(line), line)
        except ValueError as error:
            raise UserError(f"{name}, line {number}: {error}") from error
    return state.result()


class _Replay:
    """Where a replay stands."""

    def __init__(self, rule: GradientRule) -> None:
        self.rule, self.epochs = rule, 0
        self.survivors = self.compared = all_survivors(rule.operations)
        self.alpha: dict[str, np.ndarray] = {}
        self.decided = True

    def take(self, event: Any, line: Mapping[str, Any]) -> None:
        if isinstance(event, EpochEvent):
            self._take_epoch(event)
        elif isinstance(event, StageEvent):
            self._take_stage(event, line)
        else:
            raise ValueError(f"it is of the event {line['event']}, which gradient strategies lack")

    def _take_epoch(self, event: EpochEvent) -> None:
        if not self.decided:
            raise ValueError(f"it is an epoch line; expected the stage line after {self.epochs}")
        if event.epoch != self.epochs + 1 or event.epoch > self.rule.epochs:
            expected = (
                f"epoch {self.epochs + 1}"
                if self.epochs < self.rule.epochs
                else "no line, as the search is finished"
            )
            raise ValueError(f"it is the line of epoch {event.epoch}; expected {expected}")
        for model, accuracy in ((CHILD, event.child_accuracy), (PARENT, event.parent_accuracy)):
            if (accuracy is not None) != (model in self.rule.models):
                raise ValueError(
                    f"{model}_accuracy is {accuracy}; this strategy trains "
                    f"{' and '.join(self.rule.models)}"
                )
        names = set(CELL_TYPES) | {EDGE_PARAMETERS[cell] for cell in CELL_TYPES if self.rule.edges}
        if set(event.alpha) != names:
            raise ValueError(
                f"alpha has {', '.join(sorted(event.alpha))}; it must have "
                f"{', '.join(sorted(names))}"
            )
        if 1 < event.epoch <= self.rule.warmup and any(
            (event.alpha[name] != self.alpha[name]).any() for name in names
        ):
            raise ValueError(
                f"alpha moves in epoch {event.epoch}; its warm-up has {self.rule.warmup} epochs"
            )
        self.epochs, self.alpha = event.epoch, dict(event.alpha)
        self.decided = not self.rule.ends_stage(self.epochs)

    def _take_stage(self, event: StageEvent, line: Mapping[str, Any]) -> None:
        if self.decided:
            raise ValueError("it is a stage line; no stage ends here")
        expected = parse_line(self.rule.decide(self.alpha, self.survivors).line)
        assert isinstance(expected, StageEvent)
        if event.stage != expected.stage or (event.compared != expected.compared).any():
            raise ValueError(f"it is not of stage {expected.stage} with what survived it")
        if np.abs(event.indicator - expected.indicator).max() > TOLERANCE:
            raise ValueError("its indicator is not the softmax of the last alpha")
        remaining, dropped = drop_worst(event.indicator, self.survivors)
        if (dropped != event.dropped).any():
            raise ValueError("what it drops is not what has the smallest indicator")
        self.compared, self.survivors, self.decided = self.survivors, remaining, True

    def result(self) -> ReplayResult:
        finished = self.epochs == self.rule.epochs and self.decided
        stage = num_surviving(self.survivors)
        operations = worth = weights = None
        if self.alpha:
            operations, worth, weights = derived(self.alpha, self.compared)
        if self.rule.drops and stage < LAST_STAGE:
            operations = final_operations(self.survivors)
        return ReplayResult(
            stage=stage,
            sampled_epochs=self.epochs,
            survivors=self.survivors,
            operations=operations if finished else None,
            worth=worth,
            compared=self.compared if self.alpha else None,
            indicator=weights,
        )
