"""Which layer of a network in final training is not finite."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cpnas_jax.diagnosis import (
    Place,
    finite_on_host,
    first_bad_output,
    last_bad_leaf,
    marking_optimizer,
    network_places,
)
from cpnas_jax.models.network import NetworkSettings, cell_places, stretches
from cpnas_jax.models.watch import COLLECTION, watched
from cpnas_jax.train_step import (
    LOSS_TERMS,
    BatchStep,
    StepSettings,
    TrainState,
    make_batch_step,
)

Repeat = Callable[[StepSettings, BatchStep], tuple[TrainState, dict[str, Any]]]
"""(settings, step) -> what the bad step gives when it is run so, in host memory."""


@dataclasses.dataclass(frozen=True)
class _Part:
    """The child, or a float parent beside it, after a step."""

    owner: str
    settings: NetworkSettings
    params: Any
    batch_stats: Any

    def places(self, tree: Any) -> list[tuple[Place, np.ndarray]]:
        scanned = {f"cells{s.first}" for s in stretches(self.settings) if s.length > 1}
        return network_places(tree, frozenset(scanned))

    def text(self, place: Place) -> str:
        kinds = tuple(each.kind for each in cell_places(self.settings))

        def operation(cell: int, source: int, target: int) -> str:
            edges = getattr(self.settings, kinds[cell])
            return next(name for s, t, name in edges if (s, t) == (source, target))

        return self.owner + place.text(kinds, operation)


def bad_layer(
    settings: StepSettings,
    state: TrainState,
    repeat: Repeat,
) -> str | None:
    """Say what of a bad step is the first that is not finite; see `diagnosis`.

    Args:
        settings: of the step.
        state: that the step is taken from, in host memory.
        repeat: runs the step again.
    """
    found = _left_by_update(settings.network, state)
    if found:
        return found
    # Nothing that is recomputed is watched.
    network = dataclasses.replace(settings.network, recompute=False)
    plain = dataclasses.replace(settings, network=network, average_decay=0.0)
    marking = marking_optimizer()
    with watched():
        step = make_batch_step(plain, marking, marking, watch=True)
        state, metrics = repeat(plain, step)
    for part in _parts(network, state):
        place = first_bad_output(part.places(part.batch_stats[COLLECTION]))
        if place:
            return f"the first output that is not is that of {part.text(place)}"
    for term in LOSS_TERMS:
        if not np.isfinite(metrics[term]):
            return f"the outputs are, the loss term {term!r} is not"
    for part in _parts(network, state):
        place = last_bad_leaf(part.places(part.params))
        if place:
            return (
                "the loss is, and of the gradients that are not the nearest to the output is that "
                f"of {part.text(place)}"
            )
    return None


def _parts(network: NetworkSettings, state: TrainState) -> Iterator[_Part]:
    yield _Part("", network, state.params, state.batch_stats)
    if state.parent is not None:
        parent = dataclasses.replace(network, binary=False)
        yield _Part(
            "the float parent: ", parent, state.parent["params"], state.parent["batch_stats"]
        )


def _left_by_update(network: NetworkSettings, state: TrainState) -> str | None:
    """Say what of a state is not finite."""
    for part in _parts(network, state):
        for tree in (part.params, part.batch_stats):
            place = last_bad_leaf(part.places(tree))
            if place:
                return f"an update left {part.text(place)} that is not"
    for name in ("optimizer", "average", "means", "parent"):
        if not finite_on_host(getattr(state, name)):
            return f"an update left {name!r} of the training state that is not"
    return None
