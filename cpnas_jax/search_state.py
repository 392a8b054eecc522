"""What a search knows beside its networks: where it is, alpha, survivors, the epoch under way."""

import dataclasses
from typing import Any

import numpy as np

from cpnas_jax.architecture.alpha import restart
from cpnas_jax.architecture.sampling import all_survivors
from cpnas_jax.search_networks import MODELS, EpochSums


@dataclasses.dataclass
class Position:
    """Where a search is: the next sampled epoch is sample `sample` of round `round_index`.

    Attributes:
        stage: K, operations left on each edge.
        round_index: t, from 1.
        sample: s, from 1.
        epoch: sampled epochs done in the whole search.
    """

    stage: int
    round_index: int = 1
    sample: int = 1
    epoch: int = 0


@dataclasses.dataclass
class Underway:
    """A sampled epoch that is not over; a search may be stopped in its middle.

    Attributes:
        sums: model -> what its training gave so far.
        accuracies: model -> its accuracy, once it is trained and scored.
        seconds: spent on it.
    """

    sums: dict[str, EpochSums] = dataclasses.field(default_factory=dict)
    accuracies: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Underway":
        """Undo `dataclasses.asdict`."""
        sums = {model: EpochSums(**values) for model, values in record["sums"].items()}
        return cls(sums, record["accuracies"], record["seconds"])

    def next_model(self) -> str:
        """Return the model that is trained, or to be scored."""
        return MODELS[len(self.accuracies)]

    def own_sums(self) -> EpochSums:
        """Return the sums of `next_model`."""
        return self.sums.setdefault(self.next_model(), EpochSums())


@dataclasses.dataclass
class Progress:
    """The discrete side of a search; with the networks' state all that decides its result."""

    position: Position
    survivors: np.ndarray
    alpha: Any
    alpha_state: Any
    underway: Underway = dataclasses.field(default_factory=Underway)

    @classmethod
    def start(cls, operations: tuple[str, ...]) -> "Progress":
        """Stand before the first stage."""
        return cls(Position(len(operations)), all_survivors(operations), *restart())

    def arrays(self) -> dict[str, Any]:
        """Return what a checkpoint stores beside the networks."""
        return {
            "survivors": self.survivors,
            "alpha": self.alpha,
            "alpha_state": self.alpha_state,
        }

    def number(self, steps_per_epoch: int) -> int:
        """Return the number of a checkpoint made now; it grows with every step."""
        trained = len(MODELS) * self.position.epoch + len(self.underway.accuracies)
        # One more than the steps: all steps done is not yet the next model begun.
        number = trained * (steps_per_epoch + 1)
        return number + (self.underway.own_sums().steps if self.underway.sums else 0)
