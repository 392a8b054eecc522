"""A search as a film of its edges: what each stage compared, and what it dropped."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from cpnas_jax.architecture.events import (
    ChoiceEvent,
    EpochEvent,
    Event,
    PruningEvent,
    SampleEvent,
    StageEvent,
)
from cpnas_jax.architecture.indicator import indicator
from cpnas_jax.architecture.sampling import all_survivors
from cpnas_jax.models.space import NUM_OPERATIONS


@dataclasses.dataclass(frozen=True)
class Frame:
    """One moment of a search at which operations of every edge are compared.

    Attributes:
        name: `K = 8` at the end of that stage, `epoch 3` after that epoch.
        epoch: sampled epochs, or epochs, until then.
        values: f64[2, 14, 8], what they are compared by: the indicator of eq. 4.16, the effect of
            `cp_plus`, the softmax of alpha; NaN where there is none.
        present: bool[2, 14, 8], the operations left before.
        dropped: bool[2, 14, 8], those that went.
    """

    name: str
    epoch: int
    values: np.ndarray
    present: np.ndarray
    dropped: np.ndarray

    @property
    def left(self) -> np.ndarray:
        """Return bool[2, 14, 8], the operations left afterwards."""
        return self.present & ~self.dropped


def film(events: Iterable[Event], operations: Sequence[str]) -> tuple[Frame, ...]:
    """Give the frames of a search, finished or not, of any strategy.

    Args:
        events: of the log, in its order.
        operations: names that the search starts with.

    Returns:
        A frame for each decision and for each epoch of a gradient strategy, in their order; a
        stage of sampled paths that is under way is the last, without values.
    """
    present = all_survivors(operations)
    none = np.zeros_like(present)
    frames: list[Frame] = []
    epoch, under_way = 0, False
    for event in events:
        if isinstance(event, SampleEvent | EpochEvent):
            epoch += 1
        if isinstance(event, EpochEvent):
            values = np.where(present, indicator(event.alpha, present), np.nan)
            frames.append(Frame(f"epoch {event.epoch}", epoch, values, present, none))
        under_way = isinstance(event, SampleEvent) or (under_way and not _decides(event))
        if isinstance(event, StageEvent | PruningEvent | ChoiceEvent):
            frames.append(_decision(event, epoch, present))
            present = frames[-1].left
    if under_way:
        stage = int(present.sum(axis=-1).max())
        values = np.full(present.shape, np.nan)
        frames.append(Frame(f"K = {stage}, under way", epoch, values, present, none))
    return tuple(frames)


def _decides(event: Event) -> bool:
    return isinstance(event, StageEvent | PruningEvent | ChoiceEvent)


def _decision(
    event: StageEvent | PruningEvent | ChoiceEvent, epoch: int, present: np.ndarray
) -> Frame:
    name = f"K = {event.stage}"
    if isinstance(event, ChoiceEvent):
        chosen = np.eye(NUM_OPERATIONS, dtype=bool)[event.architecture]
        values = np.full(present.shape, np.nan)
        return Frame(f"candidate {event.candidate}", epoch, values, present, present & ~chosen)
    if isinstance(event, PruningEvent):
        return Frame(
            name, epoch, np.where(event.compared, event.effects, np.nan), present, event.dropped
        )
    gone = np.eye(NUM_OPERATIONS, dtype=bool)[event.dropped]
    return Frame(name, epoch, np.where(event.compared, event.indicator, np.nan), present, gone)


def thinned(frames: Sequence[Frame], most: int) -> tuple[Frame, ...]:
    """Give at most so many frames, at equal distances; all that drop something, first and last.

    Args:
        frames: of a film.
        most: at least 2; more are given only where more drop something.
    """
    kept = {n for n, frame in enumerate(frames) if frame.dropped.any()}
    if frames:
        kept |= {0, len(frames) - 1}
    room = most - len(kept)
    if room > 0:
        spread = np.linspace(0, len(frames) - 1, room + 2) if len(frames) > most else None
        kept |= set(range(len(frames))) if spread is None else set(spread.round().astype(int))
    return tuple(frames[n] for n in sorted(kept))


def dropped_in(frames: Sequence[Frame]) -> np.ndarray:
    """Return int[2, 14, 8], the number of the frame that dropped an operation, or -1."""
    shape = all_survivors().shape
    found = np.full(shape, -1)
    for number, frame in enumerate(frames):
        found[frame.dropped] = number
    return found
