"""Check of a whole search from its own log: every decision follows from the logged accuracies."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cpnas_jax.architecture.events import (
    ChoiceEvent,
    Event,
    PruningEvent,
    SampleEvent,
    ScoresEvent,
    StageEvent,
)
from cpnas_jax.architecture.indicator import drop_worst, final_operations, indicator
from cpnas_jax.architecture.parsing import parse_line
from cpnas_jax.architecture.plus import ChildParentPlus
from cpnas_jax.architecture.sampling import LAST_STAGE, all_survivors, operation_names
from cpnas_jax.architecture.strategy import ChildParent, RandomSearch, Strategy
from cpnas_jax.models.space import CELL_TYPES, CHILD, EDGES, OPERATIONS, PARENT
from cpnas_jax.runtime.errors import UserError

TOLERANCE = 1e-6
"""Allowed difference of z and e from their recomputed values, for each unit of |z| above one: alpha
is float32."""

_ENDINGS: dict[type[Strategy], str] = {
    ChildParent: "stage",
    RandomSearch: "choice",
    ChildParentPlus: "pruning",
}
"""What the line is called that ends a stage."""

_NONE = OPERATIONS.index("none")


@dataclasses.dataclass(frozen=True)
class ReplayResult:
    """What a consistent log says; what a genotype is derived from.

    Attributes:
        stage: K of the stage the log is in; 1 when the search is finished.
        sampled_epochs: how many it holds.
        survivors: bool[2, 14, 8] at the end of the log.
        operations: int32[2, 14], the one left on every edge, or None if unfinished.
        worth: f64[2, 14, 8], what edges are ranked by, NaN where not compared: in CP-NAS the mean z
            of the last stage that was finished; None before there is any.
        compared: bool[2, 14, 8], the operations that have a worth, or None.
        indicator: f64[2, 14, 8], e of that stage, or None where the strategy has none.
    """

    stage: int
    sampled_epochs: int
    survivors: np.ndarray
    operations: np.ndarray | None
    worth: np.ndarray | None
    compared: np.ndarray | None
    indicator: np.ndarray | None

    @property
    def finished(self) -> bool:
        """Tell whether the log goes to the end of the search."""
        return self.operations is not None


class _State:
    """Where a replay stands: the stage's survivors and its lines so far."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.survivors = all_survivors(strategy.operations)
        self.stage = len(strategy.operations)
        self.sampled_epochs = 0
        self.worth: np.ndarray | None = None
        self.compared: np.ndarray | None = None
        self.indicator: np.ndarray | None = None
        self.operations: np.ndarray | None = None
        self.lines: list[Mapping[str, Any]] = []
        self._begin_stage()

    def _begin_stage(self) -> None:
        self.samples: list[SampleEvent] = []
        self.round_index, self.sample, self.scored = 1, 1, 0
        self.scale = 1.0
        self.architectures: np.ndarray | None = None

    def expected(self) -> str:
        if self.stage < LAST_STAGE:
            return "no line, as the search is finished"
        if self.round_index > self.strategy.rounds(self.stage):
            if not self.strategy.is_enough(self.stage, self.survivors, self.lines):
                return f"the scores line of stage {self.stage}, round {self.scored + 1}"
            return f"the {_ENDINGS[type(self.strategy)]} line of stage {self.stage}"
        return (
            f"the sample line of stage {self.stage}, round {self.round_index}, sample {self.sample}"
        )

    def take(self, event: Event, line: Mapping[str, Any]) -> None:
        if isinstance(event, SampleEvent):
            self._take_sample(event, line)
        elif isinstance(event, StageEvent):
            self._take_stage(event)
        elif isinstance(event, ChoiceEvent):
            self._take_choice(event)
        elif isinstance(event, ScoresEvent):
            self._take_scores(event)
        elif isinstance(event, PruningEvent):
            self._take_pruning(event)
        else:
            raise ValueError("it is an epoch line, which strategies of sampled paths do not have")
        self.lines.append(line)

    def _require_expected(self, found: str) -> None:
        if self.expected() != found:
            raise ValueError(f"it is {found}; expected {self.expected()}")

    def _take_sample(self, event: SampleEvent, line: Mapping[str, Any]) -> None:
        self._require_expected(
            f"the sample line of stage {event.stage}, round {event.round_index}, sample "
            f"{event.sample}"
        )
        if event.sample == 1:
            self.architectures = self.strategy.sample(self.stage, event.round_index, self.survivors)
        assert self.architectures is not None
        _check_equal(
            "architecture",
            event.architecture,
            self.architectures[event.sample - 1],
            "by the run's seed it must be",
        )
        accuracies = {CHILD: event.child_accuracy, PARENT: event.parent_accuracy}
        for model, accuracy in accuracies.items():
            if (accuracy is not None) != (model in self.strategy.models):
                raise ValueError(
                    f"{model}_accuracy is {accuracy}; the {model} is "
                    f"{'not ' if accuracy is not None else ''}trained by this strategy"
                )
        z = self.strategy.score({k: v for k, v in accuracies.items() if v is not None})
        self.scale = max(self.scale, abs(z))
        if abs(event.z - z) > TOLERANCE * self.scale:
            raise ValueError(f"z is {event.z!r}; of these accuracies it must be {z!r}")
        self.samples.append(event)
        self.sampled_epochs += 1
        self.sample += 1
        if self.sample > len(self.architectures):
            self.round_index, self.sample = self.round_index + 1, 1

    def _take_stage(self, event: StageEvent) -> None:
        self._require_expected(f"the stage line of stage {event.stage}")
        sums, counts = np.zeros(self.survivors.shape), np.zeros(self.survivors.shape, np.int64)
        for sample in self.samples:
            one_hot = np.eye(len(OPERATIONS), dtype=bool)[sample.architecture]
            sums[one_hot] += sample.z
            counts[one_hot] += 1
        # Follows from the permutations that each sample was checked against.
        assert (counts == np.where(self.survivors, self.strategy.rounds(self.stage), 0)).all()
        worth = np.where(self.survivors, sums / np.maximum(counts, 1), np.nan)
        expected = indicator(dict(zip(CELL_TYPES, worth, strict=True)), self.survivors)
        self._check_table(
            "indicator", event.indicator, event.compared, expected, self.scale, "by eq. 4.16"
        )
        # From the logged e, whose last digits may decide between near equals.
        remaining, dropped = drop_worst(event.indicator, self.survivors)
        _check_equal("dropped", event.dropped, dropped, "the smallest indicator is that of")
        self.worth, self.compared, self.indicator = worth, self.survivors, expected
        self._end_stage(remaining)

    def _end_stage(self, remaining: np.ndarray) -> None:
        self.survivors = remaining
        self.stage = int(remaining.sum(axis=-1).max())
        if self.stage < LAST_STAGE and self.operations is None:
            self.operations = final_operations(remaining)
        self._begin_stage()

    def _take_choice(self, event: ChoiceEvent) -> None:
        self._require_expected(f"the choice line of stage {event.stage}")
        strategy = self.strategy
        assert isinstance(strategy, RandomSearch)
        decision = strategy.decide(self.stage, {}, self.survivors, self.lines)
        for key, why in (
            ("candidate", "the highest accuracy after its last epoch is that of"),
            ("child_accuracy", "after its last epoch it had"),
        ):
            if getattr(event, key) != decision.line[key]:
                raise ValueError(f"{key} is {getattr(event, key)!r}; {why} {decision.line[key]!r}")
        candidate = strategy.candidate(event.candidate, self.survivors)
        _check_equal(
            "architecture", event.architecture, candidate.architecture, "the candidate has"
        )
        self.worth = np.where(self.survivors, candidate.values, np.nan)
        self.compared, self.operations = candidate.compared, candidate.drawn
        self._end_stage(decision.survivors)

    def _take_scores(self, event: ScoresEvent) -> None:
        self._require_expected(f"the scores line of stage {event.stage}, round {event.round_index}")
        models = {name.partition("_")[0] for name in event.measures}
        if models != set(self.strategy.models):
            raise ValueError(
                f"it has scores of {', '.join(sorted(models))}; this strategy has those of "
                f"{', '.join(self.strategy.models)}"
            )
        for name, values in event.measures.items():
            if len(values) != self.stage:
                raise ValueError(
                    f"{name} has {len(values)} numbers; a round of stage {self.stage} has "
                    f"{self.stage} architectures"
                )
        self.scored += 1

    def _take_pruning(self, event: PruningEvent) -> None:
        self._require_expected(f"the pruning line of stage {event.stage}")
        strategy = self.strategy
        assert isinstance(strategy, ChildParentPlus)
        alpha, state = strategy.begin_alpha()
        alpha, _ = strategy.end_alpha(alpha, state, self.lines)
        decision = strategy.decide(self.stage, alpha, self.survivors, self.lines)
        expected = parse_line(decision.line)
        assert isinstance(expected, PruningEvent)
        if event.scored != expected.scored:
            raise ValueError(f"scored is {event.scored}; so far it is {expected.scored}")
        scale = max(1.0, float(np.abs(expected.effects).max()))
        if abs(event.reliability - expected.reliability) > TOLERANCE:
            raise ValueError(
                f"reliability is {event.reliability!r}; of these scores it must be "
                f"{expected.reliability!r}"
            )
        self._check_table(
            "effects", event.effects, event.compared, expected.effects, scale, "of these scores"
        )
        # From the logged effects, whose last digits may decide between near equals.
        dropped = strategy.dropped(event.effects, self.survivors, self.lines)
        for row, column in np.argwhere((event.dropped != dropped).any(axis=-1)):
            names = [
                ", ".join(np.array(OPERATIONS)[mask[row, column]]) or "nothing"
                for mask in (event.dropped, dropped)
            ]
            raise ValueError(
                f"dropped of {_place(row, column)} is {names[0]}; of these scores it must be "
                f"{names[1]}"
            )
        # Ranked by what an edge gains over having nothing, where that was ever tried.
        offered = all_survivors(strategy.operations)
        effects = strategy.credit_of(self.lines).effects
        least = np.where(offered, effects, np.inf).min(axis=-1, keepdims=True)
        nothing = effects[..., [_NONE]] if "none" in strategy.operations else least
        self.worth, self.compared = np.where(offered, effects - nothing, np.nan), offered
        self.indicator = indicator(dict(zip(CELL_TYPES, effects, strict=True)), offered)
        self._end_stage(self.survivors & ~dropped)

    def _check_table(
        self,
        name: str,
        found: np.ndarray,
        given: np.ndarray,
        expected: np.ndarray,
        scale: float,
        because: str,
    ) -> None:
        """Compare a number for each surviving operation of each edge."""
        wrong = (given != self.survivors) | (np.abs(found - expected) > TOLERANCE * scale)
        for row, column, operation in np.argwhere(wrong):
            where = f"{name} of {_place(row, column)}, {OPERATIONS[operation]}"
            survives = self.survivors[row, column, operation]
            if given[row, column, operation] and survives:
                value = float(found[row, column, operation])
                right = float(expected[row, column, operation])
                raise ValueError(f"{where} is {value!r}; {because} it must be {right!r}")
            raise ValueError(
                f"{where} is {'missing' if survives else 'given'}; "
                f"the operation {'survives' if survives else 'was dropped before'}"
            )


def replay(
    lines: Iterable[Mapping[str, Any]], strategy: Strategy, name: str = "history.jsonl"
) -> ReplayResult:
    """Check a search of sampled paths, finished or not, from the lines of its log.

    Checked: the lines come in the strategy's order; architectures are those that the seed gives, so
    that in CP-NAS every surviving operation of every edge comes up exactly T times a stage; z is
    that of the accuracies (eq. 4.15); the indicator is eq. 4.16 of the mean z, and the operation
    with the smallest one is dropped on every edge; a random search ends with its best candidate.

    Args:
        lines: objects as the functions of `events` build them; a log that stops anywhere is checked
            as far as it goes.
        strategy: that made the log.
        name: what an error calls the log, such as its path.

    Raises:
        UserError: at the first inconsistent line, with its number, what it says and what would
            be right.
    """
    state = _State(strategy)
    for number, line in enumerate(lines, start=1):
        try:
            state.take(parse_line(line), line)
        except ValueError as error:
            raise UserError(f"{name}, line {number}: {error}") from error
    return ReplayResult(
        stage=state.stage,
        sampled_epochs=state.sampled_epochs,
        survivors=state.survivors,
        operations=state.operations,
        worth=state.worth,
        compared=state.compared,
        indicator=state.indicator,
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
