"""Check of a whole search from its own log: every decision follows from the logged accuracies."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cpnas_jax.architecture.events import SampleEvent, StageEvent, parse_line
from cpnas_jax.architecture.indicator import (
    child_parent_score,
    drop_worst,
    final_operations,
    indicator,
)
from cpnas_jax.architecture.sampling import (
    LAST_STAGE,
    all_survivors,
    num_sampled_epochs,
    operation_names,
    stage_permutations,
)
from cpnas_jax.models.space import CELL_TYPES, EDGES, OPERATIONS
from cpnas_jax.runtime.errors import UserError

TOLERANCE = 1e-6
"""Allowed difference of z and e from their recomputed values, for each unit of |z| above one: alpha
is float32."""


@dataclasses.dataclass(frozen=True)
class ReplayResult:
    """What a consistent log says.

    Attributes:
        stage: K of the stage the log is in; 1 when the search is finished.
        sampled_epochs: how many it holds.
        survivors: bool[2, 14, 8] at the end of the log.
        operations: int32[2, 14], the one left on every edge, or None if unfinished.
        mean_z: f64[2, 14, 8], mean z in the last stage that was finished, NaN where not compared;
            None before the first one is.
        compared: bool[2, 14, 8], the survivors during that stage, or None.
    """

    stage: int
    sampled_epochs: int
    survivors: np.ndarray
    operations: np.ndarray | None
    mean_z: np.ndarray | None
    compared: np.ndarray | None

    @property
    def finished(self) -> bool:
        """Tell whether the log goes to the end of the search."""
        return self.operations is not None


class _State:
    """Where a replay stands: the stage's survivors and the z of its samples so far."""

    def __init__(self, seed: int, rounds: int, beta_p: float, operations: Sequence[str]) -> None:
        self.seed, self.rounds, self.beta_p = seed, rounds, beta_p
        self.survivors = all_survivors(operations)
        self.stage = len(operations)
        self.sampled_epochs = 0
        self.mean_z: np.ndarray | None = None
        self.compared: np.ndarray | None = None
        self._begin_stage()

    def _begin_stage(self) -> None:
        self.position = 0
        self.sums = np.zeros(self.survivors.shape)
        self.counts = np.zeros(self.survivors.shape, dtype=np.int64)
        self.scale = 1.0
        self.permutations: np.ndarray | None = None

    def expected(self) -> str:
        if self.stage < LAST_STAGE:
            return "no line, as the search is finished"
        if self.position == self.rounds * self.stage:
            return f"the stage line of stage {self.stage}"
        round_index, sample = divmod(self.position, self.stage)
        return (
            f"the sample line of stage {self.stage}, round {round_index + 1}, sample {sample + 1}"
        )

    def take_sample(self, event: SampleEvent) -> None:
        found = f"stage {event.stage}, round {event.round_index}, sample {event.sample}"
        if self.expected() != f"the sample line of {found}":
            raise ValueError(f"it is the sample line of {found}; expected {self.expected()}")
        if event.sample == 1:
            self.permutations = stage_permutations(
                self.seed, self.stage, event.round_index, self.survivors
            )
        assert self.permutations is not None
        _check_equal(
            "architecture",
            event.architecture,
            self.permutations[event.sample - 1],
            f"seed {self.seed} gives",
        )
        z = child_parent_score(event.child_accuracy, event.parent_accuracy, self.beta_p)
        self.scale = max(self.scale, abs(z))
        if abs(event.z - z) > TOLERANCE * self.scale:
            raise ValueError(
                f"z is {event.z!r}; by eq. 4.15 with beta_p {self.beta_p:g} it must be {z!r}"
            )
        sampled = event.architecture[..., None]
        for array, value in ((self.sums, event.z), (self.counts, 1)):
            entries = np.take_along_axis(array, sampled, axis=-1) + value
            np.put_along_axis(array, sampled, entries, axis=-1)
        self.position += 1
        self.sampled_epochs += 1

    def take_stage(self, event: StageEvent) -> None:
        found = f"the stage line of stage {event.stage}"
        if self.expected() != found:
            raise ValueError(f"it is {found}; expected {self.expected()}")
        # Follows from the permutations that each sample was checked against.
        assert (self.counts == np.where(self.survivors, self.rounds, 0)).all()
        mean_z = np.where(self.survivors, self.sums / self.rounds, np.nan)
        self._check_indicator(event, mean_z)
        # From the logged e, whose last digits may decide between near equals.
        remaining, dropped = drop_worst(event.indicator, self.survivors)
        _check_equal("dropped", event.dropped, dropped, "the smallest indicator is that of")
        self.mean_z, self.compared = mean_z, self.survivors
        self.survivors = remaining
        self.stage -= 1
        self._begin_stage()

    def _check_indicator(self, event: StageEvent, mean_z: np.ndarray) -> None:
        expected = indicator(dict(zip(CELL_TYPES, mean_z, strict=True)), self.survivors)
        wrong = (event.compared != self.survivors) | (
            np.abs(event.indicator - expected) > TOLERANCE * self.scale
        )
        for row, column, operation in np.argwhere(wrong):
            where = f"indicator of {_place(row, column)}, {OPERATIONS[operation]}"
            if event.compared[row, column, operation] and self.survivors[row, column, operation]:
                value = float(event.indicator[row, column, operation])
                right = float(expected[row, column, operation])
                raise ValueError(f"{where} is {value!r}; by eq. 4.16 it must be {right!r}")
            survives = self.survivors[row, column, operation]
            raise ValueError(
                f"{where} is {'missing' if survives else 'given'}; "
                f"the operation {'survives' if survives else 'was dropped before'}"
            )


def replay(
    lines: Iterable[Mapping[str, Any]],
    *,
    seed: int,
    rounds: int,
    beta_p: float,
    operations: Sequence[str] = OPERATIONS,
    name: str = "history.jsonl",
) -> ReplayResult:
    """Check a CP-NAS search, finished or not, from the lines of its log.

    Checked: the lines come in the order of Algorithm 9; architectures are those that
    `stage_permutations` gives, so that every surviving operation of every edge comes up exactly T
    times a stage; z is eq. 4.15 of the accuracies; the indicator is eq. 4.16 of the mean z; the
    operation with the smallest indicator is dropped on every edge.

    Args:
        lines: objects as `events.sample_line` and `events.stage_line` build them; a log that
            stops anywhere is checked as far as it goes.
        seed: the run's seed.
        rounds: T.
        beta_p: beta_P of eq. 4.15.
        operations: names that the search started with.
        name: what an error calls the log, such as its path.

    Raises:
        UserError: at the first inconsistent line, with its number, what it says and what would
            be right.
        ValueError: if `rounds` is below 1.
    """
    num_sampled_epochs(rounds)
    state = _State(seed, rounds, beta_p, operations)
    for number, line in enumerate(lines, start=1):
        try:
            event = parse_line(line)
            if isinstance(event, SampleEvent):
                state.take_sample(event)
            else:
                state.take_stage(event)
        except ValueError as error:
            raise UserError(f"{name}, line {number}: {error}") from error
    finished = state.stage < LAST_STAGE
    return ReplayResult(
        stage=state.stage,
        sampled_epochs=state.sampled_epochs,
        survivors=state.survivors,
        operations=final_operations(state.survivors) if finished else None,
        mean_z=state.mean_z,
        compared=state.compared,
    )


def _place(row: int, column: int) -> str:
    source, target = EDGES[column]
    return f"the {CELL_TYPES[row]} cell, edge {source}->{target}"


def _check_equal(key: str, found: np.ndarray, expected: np.ndarray, because: str) -> None:
    if (found == expected).all():
        return
    row, column = np.argwhere(found != expected)[0]
    raise ValueError(
        f"{key} of {_place(row, column)} is {operation_names(found)[row][column]!r}; "
        f"{because} {operation_names(expected)[row][column]!r}"
    )
