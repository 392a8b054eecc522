"""Strategies of sampled paths: what is trained, what is sampled, what alpha gets, what is dropped.

Every strategy here trains one architecture of the supernet at a time, in stages named by the number
K of operations left on each edge, rounds and samples, as CP-NAS does (Algorithm 9). It is a pure
function of its settings, so that a search is checked from its own log by the strategy that made it
(`replay.py`).
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optax

from cpnas_jax.architecture.alpha import restart, update_alpha
from cpnas_jax.architecture.collapse import limit_skips
from cpnas_jax.architecture.edge_policy import derive
from cpnas_jax.architecture.events import choice_line, stage_line
from cpnas_jax.architecture.genotype import EdgePolicy
from cpnas_jax.architecture.indicator import child_parent_score, drop_worst, indicator
from cpnas_jax.architecture.sampling import SHAPE, num_sampled_epochs, stage_permutations
from cpnas_jax.models.space import CHILD, MODELS, NUM_OPERATIONS, OPERATIONS, PARENT, Alpha


@dataclasses.dataclass(frozen=True)
class Decision:
    """What the end of a stage decided.

    Attributes:
        survivors: bool[2, 14, 8], what is left.
        line: of the history.
    """

    survivors: np.ndarray
    line: dict[str, Any]


class Strategy(abc.ABC):
    """The interface; attributes are the same for a whole search.

    Attributes:
        models: what is trained and scored, in this order.
        operations: names that every edge starts with.
        total: sampled epochs of the whole search, at most.
        schedule: sampled epochs after which the learning rate has come to 0.
        restarts: whether a round begins with fresh weights.
        takes_turns: whether an epoch trains other architectures than the sampled one, see `turns`.
    """

    models: tuple[str, ...] = MODELS
    operations: tuple[str, ...]
    total: int
    schedule: int
    restarts = False
    takes_turns = False

    @abc.abstractmethod
    def describe(self) -> str:
        """Say how the sampled epochs come about, in a few words."""

    @abc.abstractmethod
    def rounds(self, stage: int) -> int:
        """Return how many rounds a stage has."""

    @abc.abstractmethod
    def sample(self, stage: int, round_index: int, survivors: np.ndarray) -> np.ndarray:
        """Return the architectures of a round, int32[n, 2, 14], in their order."""

    def turns(
        self, stage: int, round_index: int, sample: int, survivors: np.ndarray, steps: int
    ) -> np.ndarray:
        """Return what the steps of a sampled epoch train where it `takes_turns`.

        Args:
            stage: K.
            round_index: t, from 1.
            sample: s, from 1.
            survivors: bool[2, 14, 8].
            steps: of an epoch.

        Returns:
            int32[steps, 2, 14].
        """
        raise NotImplementedError(f"{type(self).__name__} trains what it samples")

    @abc.abstractmethod
    def decide(
        self,
        stage: int,
        alpha: Alpha,
        survivors: np.ndarray,
        lines: Sequence[Mapping[str, Any]],
    ) -> Decision:
        """End a stage.

        Args:
            stage: K.
            alpha: of `end_alpha`.
            survivors: bool[2, 14, 8] before.
            lines: of the history so far.
        """

    def is_enough(
        self, stage: int, survivors: np.ndarray, lines: Sequence[Mapping[str, Any]]
    ) -> bool:
        """Tell whether a stage whose rounds are over needs no (more) scored architectures.

        Args:
            stage: K.
            survivors: bool[2, 14, 8].
            lines: of the history so far.
        """
        del stage, survivors, lines
        return True

    def to_score(self, stage: int, number: int, survivors: np.ndarray) -> np.ndarray:
        """Return architectures int32[n, 2, 14] to be scored together, by their number from 1."""
        raise NotImplementedError(f"{type(self).__name__} scores what it trains")

    def score(self, accuracies: Mapping[str, float]) -> float:
        """Return the score z of a sampled architecture, the child's accuracy."""
        return float(accuracies[CHILD])

    def begin_alpha(self) -> tuple[Alpha, optax.OptState]:
        """Return alpha and its optimizer's state, as every stage begins with."""
        return restart()

    def credit(
        self,
        alpha: Alpha,
        state: optax.OptState,
        architecture: np.ndarray,
        z: float,
        round_index: int,
    ) -> tuple[Alpha, optax.OptState]:
        """Give alpha what a sampled epoch says: here nothing."""
        del architecture, z, round_index
        return alpha, state

    def end_alpha(
        self, alpha: Alpha, state: optax.OptState, lines: Sequence[Mapping[str, Any]]
    ) -> tuple[Alpha, optax.OptState]:
        """Give alpha what the end of a stage says: here nothing."""
        del lines
        return alpha, state


class ChildParent(Strategy):
    """CP-NAS (Algorithm 9): K permutations a round, mean of z, the worst of every edge is dropped.

    With `models` the child alone it is the indicator of BNAS, beta_P = 0 [paper]; the parent, which
    then has no say, is not trained (our choice).
    """

    def __init__(
        self,
        *,
        seed: int,
        rounds: int,
        beta_p: float,
        operations: Sequence[str] = OPERATIONS,
        models: tuple[str, ...] = MODELS,
    ) -> None:
        """Take the settings of a search.

        Args:
            seed: of the permutations.
            rounds: T.
            beta_p: of eq. 4.15; 0 where the parent is not trained.
            operations: names that every edge starts with.
            models: both, or the child alone.

        Raises:
            ValueError: `rounds` is below 1, or beta_P needs a parent that is not trained.
        """
        if PARENT not in models and beta_p:
            raise ValueError(f"beta_p is {beta_p}; without a parent it must be 0")
        self.seed, self.beta_p, self.models = seed, beta_p, models
        self.operations, self._rounds = tuple(operations), rounds
        self.total = self.schedule = num_sampled_epochs(rounds, len(operations))

    def describe(self) -> str:
        """Name T and beta_P."""
        return f"T = {self._rounds}, beta_P = {self.beta_p:g}"

    def rounds(self, stage: int) -> int:
        """Return T."""
        del stage
        return self._rounds

    def sample(self, stage: int, round_index: int, survivors: np.ndarray) -> np.ndarray:
        """Return a round's K architectures: every surviving operation of every edge once."""
        return stage_permutations(self.seed, stage, round_index, survivors)

    def score(self, accuracies: Mapping[str, float]) -> float:
        """Return z of eq. 4.15."""
        child = accuracies[CHILD]
        return child_parent_score(child, accuracies.get(PARENT, child), self.beta_p)

    def credit(
        self,
        alpha: Alpha,
        state: optax.OptState,
        architecture: np.ndarray,
        z: float,
        round_index: int,
    ) -> tuple[Alpha, optax.OptState]:
        """Take z into the means of the sampled operations."""
        return update_alpha(alpha, state, architecture, z, round_index)

    def decide(
        self,
        stage: int,
        alpha: Alpha,
        survivors: np.ndarray,
        lines: Sequence[Mapping[str, Any]],
    ) -> Decision:
        """Drop the operation with the smallest indicator (eq. 4.16) on every edge."""
        del lines
        values = indicator(alpha, survivors)
        remaining, dropped = drop_worst(values, survivors)
        line = stage_line(stage=stage, indicator=values, survivors=survivors, dropped=dropped)
        return Decision(remaining, line)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An architecture that was drawn at random.

    Attributes:
        values: f64[2, 14, 8], uniform in [0, 1); what a policy ranks edges by.
        drawn: int32[2, 14], the offered operation with the largest value of every edge.
        compared: bool[2, 14, 8], what was offered, less the skips that a limit took.
        architecture: int32[2, 14], what the derived network has, `none` where it has no edge.
    """

    values: np.ndarray
    drawn: np.ndarray
    compared: np.ndarray
    architecture: np.ndarray


def draw_candidate(
    seed: int, number: int, offered: np.ndarray, policy: EdgePolicy, max_skips: int = -1
) -> Candidate:
    """Draw an architecture uniformly, as far as the edge policy leaves it.

    It uses the raw stream of a PCG64, as `sampling.stage_permutations` does. What is trained must
    be what is derived in the end: a dead node is given an edge, and of `top2` the other edges are
    `none` (our choice).

    Args:
        seed: the run's seed.
        number: from 1.
        offered: bool[2, 14, 8].
        policy: of the derived genotype.
        max_skips: of a derived cell; -1 for any number.
    """
    # The last number keeps the stream apart from those of the permutations.
    stream = np.random.PCG64(np.random.SeedSequence([seed, number, 0, 1]))
    raw = stream.random_raw(SHAPE[0] * SHAPE[1] * NUM_OPERATIONS).reshape(*SHAPE, NUM_OPERATIONS)
    values = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    drawn = np.where(offered, values, -1.0).argmax(axis=-1).astype(np.int32)
    compared = offered
    if max_skips >= 0:
        limited = limit_skips(drawn, values, offered, policy, max_skips)
        drawn, compared = limited.operations, limited.compared
    genotype = derive(drawn, values, compared, policy).genotype
    return Candidate(values, drawn, compared, genotype.architecture())


class RandomSearch(Strategy):
    """The best of n architectures drawn uniformly, each trained from its own fresh weights.

    A round is a candidate and a sample is an epoch of its child. With n candidates of m epochs it
    costs n*m epochs of a child. With no epochs at all it is a single random architecture.
    """

    models = (CHILD,)
    restarts = True

    def __init__(
        self,
        *,
        seed: int,
        candidates: int,
        epochs: int,
        policy: EdgePolicy,
        operations: Sequence[str] = OPERATIONS,
        max_skips: int = -1,
    ) -> None:
        """Take the settings of a search.

        Args:
            seed: of the draws.
            candidates: n.
            epochs: m, of each; 0 trains nothing, and n must be 1.
            policy: of the derived genotype.
            operations: names that an edge chooses from.
            max_skips: of a derived cell; -1 for any number.
        """
        if not epochs and candidates != 1:
            raise ValueError(f"{candidates} candidates cannot be told apart without training")
        self.seed, self.candidates, self.epochs, self.policy = seed, candidates, epochs, policy
        self.operations, self.max_skips = tuple(operations), max_skips
        self.total, self.schedule = candidates * epochs, epochs

    def describe(self) -> str:
        """Name n and m."""
        return f"{self.candidates} random architectures, {self.epochs} epochs of each"

    def rounds(self, stage: int) -> int:
        """Return n, or 0 without training."""
        del stage
        return self.candidates if self.epochs else 0

    def candidate(self, number: int, survivors: np.ndarray) -> Candidate:
        """Return a candidate by its number, from 1."""
        return draw_candidate(self.seed, number, survivors, self.policy, self.max_skips)

    def sample(self, stage: int, round_index: int, survivors: np.ndarray) -> np.ndarray:
        """Return the same candidate for each of its epochs."""
        del stage
        architecture = self.candidate(round_index, survivors).architecture
        return np.repeat(architecture[None], self.epochs, axis=0)

    def decide(
        self,
        stage: int,
        alpha: Alpha,
        survivors: np.ndarray,
        lines: Sequence[Mapping[str, Any]],
    ) -> Decision:
        """Leave the candidate with the best accuracy after its last epoch; the first of equals."""
        del alpha
        best, accuracy = 1, None
        if self.epochs:
            last = [line["child_accuracy"] for line in lines if line["sample"] == self.epochs]
            best = 1 + int(np.argmax(last))
            accuracy = last[best - 1]
        architecture = self.candidate(best, survivors).architecture
        line = choice_line(
            stage=stage, candidate=best, architecture=architecture, child_accuracy=accuracy
        )
        remaining = np.eye(NUM_OPERATIONS, dtype=bool)[architecture]
        return Decision(remaining, line)
