"""What a search knows beside its networks: where it is, alpha, survivors, the epoch under way."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass
class EpochSums:
    """What the steps of one model in a sampled epoch gave, as far as they are done.

    Attributes:
        steps: how many.
        loss: sum of the steps' mean losses.
    """

    steps: int = 0
    loss: float = 0.0

    @property
    def mean_loss(self) -> float:
        """Return the mean over the steps."""
        return self.loss / self.steps


@dataclasses.dataclass
class Position:
    """Where a search is: the next sampled epoch is sample `sample` of round `round_index`.

    Attributes:
        stage: K, operations left on each edge.
        round_index: t, from 1.
        sample: s, from 1.
        epoch: sampled epochs done in the whole search.
        scored: rounds of architectures that this stage has scored without training them.
        scored_before: those of the stages before.
    """

    stage: int
    round_index: int = 1
    sample: int = 1
    epoch: int = 0
    scored: int = 0
    scored_before: int = 0


@dataclasses.dataclass
class Underway:
    """A sampled epoch, or several at the same time, not over; a search may be stopped in it.

    Attributes:
        sums: model -> what its training gave so far.
        accuracies: model -> its accuracies with the architectures that are trained at the same
            time, once it is trained and scored.
        seconds: spent on it.
    """

    sums: dict[str, EpochSums] = dataclasses.field(default_factory=dict)
    accuracies: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Underway":
        """Undo `dataclasses.asdict`."""
        sums = {model: EpochSums(**values) for model, values in record["sums"].items()}
        return cls(sums, record["accuracies"], record["seconds"])

    def next_model(self, models: tuple[str, ...]) -> str:
        """Return the one of a search's models that is trained, or to be scored."""
        return models[len(self.accuracies)]

    def own_sums(self, model: str) -> EpochSums:
        """Return the sums of a model."""
        return self.sums.setdefault(model, EpochSums())


@dataclasses.dataclass
class Progress:
    """The discrete side of a search; with the networks' state all that decides its result."""

    position: Position
    survivors: np.ndarray
    alpha: Any
    alpha_state: Any
    underway: Underway = dataclasses.field(default_factory=Underway)

    def arrays(self) -> dict[str, Any]:
        """Return what a checkpoint stores beside the networks."""
        return {
            "survivors": self.survivors,
            "alpha": self.alpha,
            "alpha_state": self.alpha_state,
        }

    def number(self, steps_per_epoch: int, num_models: int) -> int:
        """Return the number of a checkpoint made now; it grows with every step.

        Args:
            steps_per_epoch: of each model.
            num_models: that are trained one after the other.
        """
        trained = num_models * self.position.epoch + len(self.underway.accuracies)
        # One more than the steps: all steps done is not yet the next model begun.
        number = trained * (steps_per_epoch + 1)
        under_way = list(self.underway.sums.values())[len(self.underway.accuracies) :]
        scored = self.position.scored_before + self.position.scored
        return number + scored + sum(sums.steps for sums in under_way)
