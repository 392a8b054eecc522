"""`cp_plus`: Child-Parent search with many scored architectures, shared credit and certain drops.

All of it is [ours]; docs/indicator.md derives it and has the figures. The supernet is trained as in
CP-NAS, by rounds in which every surviving operation of every edge comes up equally often, though
another path each step (`PATHS`), and it is scored apart from that: scoring an architecture is a
forward pass, so that there can be far more scored architectures than trained ones. Ridge regression
shares the credit among their operations (`credit.py`), until it repeats itself with a stated
reliability.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from cpnas_jax.architecture.alpha import alpha_optimizer, apply_gradient
from cpnas_jax.architecture.credit import Credit, drops, reliability, ridge
from cpnas_jax.architecture.events import dropped_mask, pruning_line
from cpnas_jax.architecture.sampling import LAST_STAGE, SHAPE, stage_permutations
from cpnas_jax.architecture.strategy import Decision, Strategy
from cpnas_jax.models.space import (
    CELL_TYPES,
    CHILD,
    MODELS,
    NUM_OPERATIONS,
    OPERATIONS,
    PARENT,
    Alpha,
)

MEASURES = ("accuracy", "log_likelihood")
"""What a scored architecture can be judged by."""

_SPLITS = 4
"""Random halvings that the reliability is a mean over."""

PATHS = ("epoch", "step")
"""How long a path is trained before the next one."""

# Far from the rounds of training and each other: what is scored, and what single steps train (whose
# round 0 has the stream of a candidate of `random_search`; no search has both).
_SCORED = 2**20
_STEPS = 2**32


def balanced_permutations(
    seed: int, stage: int, round_index: int, survivors: np.ndarray
) -> np.ndarray:
    """Draw a round's architectures where edges have different numbers of survivors.

    An edge with all K has a random permutation of them. Another one repeats a random permutation of
    what it has left until there are K, in random order: no operation comes up more than once more
    often than another of its edge. With K on every edge it is `sampling.stage_permutations`.

    Args:
        seed: the run's seed.
        stage: K, the largest number of survivors of an edge.
        round_index: t, from 1.
        survivors: bool[2, 14, 8], at least one on every edge.

    Returns:
        int32[K, 2, 14].
    """
    counts = survivors.sum(axis=-1)
    if counts.min() < 1 or counts.max() != stage:
        raise ValueError(
            f"edges have {counts.min()} to {counts.max()} survivors; stage {stage} needs 1 to "
            f"{stage}"
        )
    if counts.min() == stage:
        return stage_permutations(seed, stage, round_index, survivors)
    stream = np.random.PCG64(np.random.SeedSequence([seed, stage, round_index]))
    raw = stream.random_raw(SHAPE[0] * SHAPE[1] * (NUM_OPERATIONS + stage))
    keys = raw.reshape(*SHAPE, NUM_OPERATIONS + stage)
    architectures = np.empty((stage, *SHAPE), np.int32)
    for cell, edge in np.ndindex(*SHAPE):
        own, slots = np.split(keys[cell, edge], [NUM_OPERATIONS])
        left = np.flatnonzero(survivors[cell, edge])
        order = left[np.argsort(own[: len(left)], kind="stable")]
        # np.resize repeats.
        architectures[:, cell, edge] = np.resize(order, stage)[np.argsort(slots, kind="stable")]
    return architectures


@dataclasses.dataclass(frozen=True)
class PlusSettings:
    """Settings of `cp_plus`, keys of `config.search`.

    Attributes:
        beta_p: of z = beta_P * (P - C) + C, with the measures P and C of parent and child.
        measure: one of `MEASURES`.
        max_scored: architectures that are scored at most, in the whole search; what is left is
            shared equally by the stages to come. Each has two rounds in any case, so that it is at
            least twice the operations of all stages, 70 with K = 8.
        reliability: a stage is scored until its credit has this reliability.
        certainty: of dropping more than the worst, see `credit.drops`.
        carry: weight of a score one stage later, against 1.
        training: the supernet is trained for so many times T rounds at each halving.
        paths: one of `PATHS`: `epoch` trains the sampled architecture for an epoch, as CP-NAS does;
            `step` another architecture each step, so that no path is the last one trained.
    """

    beta_p: float
    measure: str
    max_scored: int
    reliability: float
    certainty: float
    carry: float
    training: int
    paths: str


class ChildParentPlus(Strategy):
    """The strategy `cp_plus`.

    With T = `rounds` and a `training` of 2 child and parent are trained for 2 T rounds with all K
    operations, 2 T more when half of them are left, and so on: 28 T sampled epochs with K = 8, 80 %
    of the 35 T of `cp`; the others pay for scoring. The child alone has twice as many. A number
    that is passed over, where several are dropped at once, is not trained: the search is shorter,
    and ends at a higher rate. Between these, operations are dropped one stage after the other on
    new scores. Alpha is the credit: its gradient is that of 1/2 * (alpha - effect)^2, at rate 1.
    """

    def __init__(
        self,
        *,
        seed: int,
        rounds: int,
        settings: PlusSettings,
        operations: Sequence[str] = OPERATIONS,
        models: tuple[str, ...] = MODELS,
    ) -> None:
        """Take the settings of a search.

        Args:
            seed: of what is sampled.
            rounds: T.
            settings: see `PlusSettings`.
            operations: names that every edge starts with.
            models: both, or the child alone with beta_P = 0.
        """
        self.seed, self.settings, self.operations = seed, settings, tuple(operations)
        self.models, self.takes_turns = models, settings.paths == "step"
        stages, trained = len(self.operations), []
        while stages >= LAST_STAGE:
            trained.append(stages)
            stages //= 2
        # The child alone costs half.
        each = settings.training * rounds * len(MODELS) // len(models)
        self._rounds = dict.fromkeys(trained, each)
        self.total = self.schedule = each * sum(trained)

    def describe(self) -> str:
        """Name the rounds and what is scored."""
        own = self.settings
        return (
            f"{', '.join(f'{n} rounds of {stage}' for stage, n in self._rounds.items())} "
            f"operations, another path each {own.paths}; at most {own.max_scored} "
            f"scored by {own.measure}, in each stage until their credit is reliable to "
            f"{own.reliability:g}, beta_P = {own.beta_p:g}"
        )

    def rounds(self, stage: int) -> int:
        """Return how many rounds of training a stage has; 0 between the halvings."""
        return self._rounds.get(stage, 0)

    def sample(self, stage: int, round_index: int, survivors: np.ndarray) -> np.ndarray:
        """Return a round's architectures: every surviving operation of an edge equally often."""
        return balanced_permutations(self.seed, stage, round_index, survivors)

    def turns(
        self, stage: int, round_index: int, sample: int, survivors: np.ndarray, steps: int
    ) -> np.ndarray:
        """Return an epoch's part of a sequence of rounds, which are balanced as those of `sample`.

        A stage has a multiple of K epochs, so that its last round is whole.
        """
        first = ((round_index - 1) * stage + sample - 1) * steps
        rounds = range(first // stage, -(-(first + steps) // stage))
        drawn = [
            balanced_permutations(self.seed, stage, _STEPS + number, survivors) for number in rounds
        ]
        return np.concatenate(drawn)[first % stage :][:steps]

    def to_score(self, stage: int, number: int, survivors: np.ndarray) -> np.ndarray:
        """Return the architectures that a stage scores together, by their round's number from 1."""
        return balanced_permutations(self.seed, stage, _SCORED + number, survivors)

    def score(self, accuracies: Mapping[str, float]) -> float:
        """Return z of a sampled epoch, as `cp` has it; it decides nothing here."""
        return self._z(accuracies[CHILD], accuracies.get(PARENT, accuracies[CHILD]))

    def _z(self, child: Any, parent: Any) -> Any:
        beta = self.settings.beta_p
        return beta * (parent - child) + child

    def is_enough(
        self, stage: int, survivors: np.ndarray, lines: Sequence[Mapping[str, Any]]
    ) -> bool:
        """Tell whether a stage has scored enough: reliably, or as many as it may.

        Args:
            stage: K.
            survivors: bool[2, 14, 8].
            lines: of the history so far.
        """
        rounds = [line for line in _scores(lines) if line["stage"] == stage]
        before = sum(line["stage"] for line in _scores(lines) if line["stage"] != stage)
        own_share = (self.settings.max_scored - before) // (stage - 1)
        # Two rounds at least, or there is nothing to estimate from.
        if len(rounds) >= 2 and (len(rounds) + 1) * stage > own_share:
            return True
        # Halves of fewer say too little of each other, and looking costs time.
        if not rounds or len(rounds) % 8:
            return False
        return self.reliability(survivors, lines) >= self.settings.reliability

    def reliability(self, survivors: np.ndarray, lines: Sequence[Mapping[str, Any]]) -> float:
        """Return the reliability of the credit so far; see `credit.reliability`."""
        architectures, scores, weights, groups, rounds = self._observations(lines)
        return reliability(
            architectures,
            scores,
            survivors,
            weights=weights,
            groups=groups,
            rounds=rounds,
            splits=_SPLITS,
        )

    def credit_of(self, lines: Sequence[Mapping[str, Any]]) -> Credit:
        """Return the credit of all scores so far, older stages' with less weight."""
        architectures, scores, weights, groups, _ = self._observations(lines)
        return ridge(architectures, scores, weights=weights, groups=groups)

    def _observations(
        self, lines: Sequence[Mapping[str, Any]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return architectures, scores, weights, stages and rounds of everything scored.

        Architectures are those that the seed gives: survivors follow from the lines of pruning.
        """
        survivors = np.isin(OPERATIONS, self.operations)
        survivors = np.broadcast_to(survivors, (*SHAPE, NUM_OPERATIONS)).copy()
        architectures, scores, stages, rounds = [], [], [], []
        for line in lines:
            if line["event"] == "pruning":
                survivors = survivors & ~dropped_mask(line["dropped"])
            elif line["event"] == "scores":
                own = self.to_score(line["stage"], line["round"], survivors)
                child, parent = (
                    np.asarray(line[f"{model}_{self.settings.measure}"])
                    for model in (CHILD, self.models[-1])
                )
                architectures.append(own)
                scores.append(self._z(child, parent))
                stages += [line["stage"]] * len(own)
                rounds += [line["round"]] * len(own)
        order = sorted(set(stages), reverse=True)
        # The last group's intercept is that of the supernet as it is.
        groups = np.array([order.index(stage) for stage in stages])
        weights = self.settings.carry ** (len(order) - 1.0 - groups)
        return (
            np.concatenate(architectures),
            np.concatenate(scores),
            weights,
            groups,
            np.array(rounds),
        )

    def end_alpha(
        self, alpha: Alpha, state: optax.OptState, lines: Sequence[Mapping[str, Any]]
    ) -> tuple[Alpha, optax.OptState]:
        """Take the credit into alpha, by the gradient of 1/2 * (alpha - effect)^2 at rate 1."""
        effects = np.asarray(self.credit_of(lines).effects, np.float32)
        gradient = {cell: alpha[cell] - own for cell, own in zip(CELL_TYPES, effects, strict=True)}
        return apply_gradient(alpha_optimizer(), alpha, state, gradient, jnp.int32(1))

    def dropped(
        self, effects: np.ndarray, survivors: np.ndarray, lines: Sequence[Mapping[str, Any]]
    ) -> np.ndarray:
        """Return what effects f64[2, 14, 8] lead to, bool[2, 14, 8]; arguments as of `decide`."""
        credit = dataclasses.replace(self.credit_of(lines), effects=effects)
        return drops(credit, survivors, self.settings.certainty)

    def decide(
        self,
        stage: int,
        alpha: Alpha,
        survivors: np.ndarray,
        lines: Sequence[Mapping[str, Any]],
    ) -> Decision:
        """Drop the worst of the edges with most operations, and what is certainly not the best."""
        effects = np.stack([np.asarray(alpha[cell], np.float64) for cell in CELL_TYPES])
        dropped = self.dropped(effects, survivors, lines)
        line = pruning_line(
            stage=stage,
            scored=sum(len(own["child_accuracy"]) for own in _scores(lines)),
            reliability=self.reliability(survivors, lines),
            effects=effects,
            survivors=survivors,
            dropped=dropped,
        )
        return Decision(survivors & ~dropped, line)


def _scores(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [line for line in lines if line["event"] == "scores"]
