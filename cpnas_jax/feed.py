"""What final training asks of its data, and what is known of them before they are read."""

import abc
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from cpnas_jax.models.network import NetworkSettings
from cpnas_jax.runtime.parallel import pmap_donated, replicate
from cpnas_jax.runtime.shards import Shards
from cpnas_jax.steps import Run, steps_until_bad
from cpnas_jax.train_step import BatchStep, StepSettings, TrainCall

Compiled = Callable[..., Any]
"""(name, make, *arguments) -> the compiled program of what `make()` returns, made once a name."""

_ZERO = np.zeros((), np.int32)
CALL = TrainCall(
    epoch=_ZERO,
    first_step=_ZERO,
    num_steps=_ZERO,
    stop=_ZERO,
    passes=_ZERO,
    key=np.zeros(2, np.uint32),
)
"""What a call looks like, to compile for it."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a data set before any of it is on a device.

    Attributes:
        name: of the data set.
        image_shape: (height, width, channels) as the network sees it.
        num_train: training examples.
        num_test: examples of the split that is evaluated.
        class_names: in the order of the labels.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_train: int
    num_test: int
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Return the number of classes, present in the splits or not."""
        return len(self.class_names)


class Feed(abc.ABC):
    """What `Trainer` asks of its data."""

    facts: Facts

    @abc.abstractmethod
    def device_bytes(self) -> int:
        """Return what the data takes on each device."""

    @abc.abstractmethod
    def place(self) -> None:
        """Put on the devices what lives there."""

    @abc.abstractmethod
    def training_call(self, settings: StepSettings, step: BatchStep, run: Run) -> Any:
        """Return the function of one device that trains, in which `run` runs the steps."""

    @abc.abstractmethod
    def like(self, batch_size: int) -> tuple[Any, ...]:
        """Return what a training program takes behind the state, to compile for it."""

    def program(
        self,
        compiled: Compiled,
        name: Any,
        settings: StepSettings,
        step: BatchStep,
        state: Any,
        run: Run = steps_until_bad,
    ) -> Any:
        """Return the compiled training program, of which `run` runs the steps."""
        return compiled(
            name,
            lambda: pmap_donated(self.training_call(settings, step, run)),
            state,
            *self.like(settings.batch_size),
        )

    @abc.abstractmethod
    def train(self, program: Any, state: Any, call: TrainCall) -> tuple[Any, dict[str, Any]]:
        """Run the steps of a call; return the new state and the metrics' sums on the host."""

    @abc.abstractmethod
    def counting_program(
        self, compiled: Compiled, settings: NetworkSettings, batch_size: int, variables: Any
    ) -> Any:
        """Return the compiled program that counts a network's answers."""

    @abc.abstractmethod
    def count(self, program: Any, batch_size: int, variables: Any) -> dict[str, np.ndarray]:
        """Return the counts of `evaluate.evaluation` over the whole test split."""

    @abc.abstractmethod
    def test_images(self, rows: np.ndarray) -> np.ndarray:
        """Return some examples of the test split as the network sees them before normalisation.

        Args:
            rows: int[n], positions in the split, n at least 1; every process must ask for the same.

        Returns:
            uint8[n, height, width, channels].
        """

    @abc.abstractmethod
    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and deviation of the channels that images are normalised by, f32[c]."""

    @abc.abstractmethod
    def test_batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Return images uint8[n, H, W, C] and labels int32[n] of the test split, on the host.

        Of one process. The last batch may have fewer; examples that cannot be decoded are left out.
        """

    @abc.abstractmethod
    def undecodable(self) -> dict[str, list[int]]:
        """Return split -> examples that were skipped; every process must call it.

        Raises:
            UserError: they are too many.
        """

    @abc.abstractmethod
    def met_before(self, undecodable: dict[str, list[int]]) -> None:
        """Count examples, as `undecodable` gives them, that were skipped before a resumption.

        Raises:
            UserError: they are too many.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """End what reads ahead."""


def passes_of(shards: Shards) -> jax.Array:
    """Return the shards of a device, see `Shards.combine`, as an input of its programs."""
    return replicate(np.asarray(shards.passes, np.int32))
