"""Which layer of a sampled path of the supernet is not finite."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from cpnas_jax.diagnosis import (
    MarkingPathOptimizer,
    Place,
    finite_on_host,
    first_bad_output,
    last_bad_leaf,
    network_places,
    sampled_operation,
    supernet_places,
)
from cpnas_jax.models.supernet import SupernetSettings, cell_shapes
from cpnas_jax.models.supernet_watch import watch_path
from cpnas_jax.models.watch import COLLECTION
from cpnas_jax.search_step import Call, ModelState, PathLoss, make_path_loss

Repeat = Callable[[Any, PathLoss], tuple[ModelState, dict[str, Any]]]
"""(optimizer, loss) -> what the bad step gives when it is run so, in host memory."""


def last_spoilt(
    settings: SupernetSettings, params: Any, turns: np.ndarray, first: int, number: int
) -> int:
    """Return the step of a call to blame, where each trains a path of its own.

    What an update left not finite shows in the next step that samples it, and none of the call
    need do so. To blame is the last step that did: its update, or what it met.

    Args:
        settings: of the supernet.
        params: after the call, in host memory.
        turns: int[n, 2, 14], what each step of the epoch trains.
        first: number of the call's first step.
        number: of the step that was found to be bad.

    Returns:
        The last step up to `number` that sampled something that is not finite; `number` if none.
    """
    kinds = tuple(shape.kind for shape in cell_shapes(settings))
    for earlier in range(number, first - 1, -1):
        places = supernet_places(params, sampled_operation(turns[earlier], kinds))
        if not all(np.isfinite(leaf).all() for _, leaf in places):
            return earlier
    return number


def bad_layer(
    settings: SupernetSettings,
    state: ModelState,
    architecture: np.ndarray,
    binary: bool,
    repeat: Repeat,
) -> str | None:
    """Say what of a bad step is the first that is not finite; see `diagnosis`.

    Args:
        settings: of the supernet.
        state: that the step is taken from, in host memory.
        architecture: int[2, 14], what was sampled.
        binary: child or parent.
        repeat: runs the step again.
    """
    plain = make_path_loss(settings)

    def watched_loss(
        params: Any, images: jax.Array, labels: jax.Array, call: Call
    ) -> tuple[jax.Array, Any]:
        loss, counts = plain(params, images, labels, call)
        _, notes = watch_path(params, images, architecture, settings=settings, binary=binary)
        return loss, {**counts, COLLECTION: notes}

    kinds = tuple(shape.kind for shape in cell_shapes(settings))
    operation = sampled_operation(architecture, kinds)

    def text(place: Place) -> str:
        return place.text(kinds, operation)

    place = last_bad_leaf(supernet_places(state.params, operation))
    if place:
        return f"an update left {text(place)} that is not"
    if not finite_on_host(state.optimizer):
        return "an update left a state of the optimizer that is not"
    state, metrics = repeat(MarkingPathOptimizer(), watched_loss)
    place = first_bad_output(network_places(metrics[COLLECTION], frozenset()))
    if place:
        return f"the first output that is not is that of {text(place)}"
    if not np.isfinite(metrics["loss"]):
        return "the outputs are, the cross-entropy is not"
    place = last_bad_leaf(supernet_places(state.params, operation))
    if place:
        return (
            "the loss is, and of the gradients that are not the nearest to the output is that of "
            f"{text(place)}"
        )
    return None
