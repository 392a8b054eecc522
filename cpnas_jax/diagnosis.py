"""After a step that is not finite: which layer is it, in words that a person can look up.

An update may have left a weight that is not finite: then that is it. Else the step is run once more
from the state before it, on the same batch, with every layer watched; nothing of this is compiled
before. Three questions follow each other, and the first that has an answer gives the layer: which
output is not finite (the first in forward order), which term of the loss, and which gradient (the
nearest to the output, where backpropagation met it first).
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cpnas_jax.models.edges import EDGE_GROUPS
from cpnas_jax.models.space import CELL_TYPES, EDGES, OPERATIONS
from cpnas_jax.models.watch import BAD
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.steps import Step

# Regions in forward order; the auxiliary classifier is a branch, behind every cell it reads.
_REGIONS = ("stem", "cells", "auxiliary", "classifier")

# What may stand inside a region, in forward order wherever two of them stand in one module.
_WORDS = (
    *("activation", "conv0", "conv0_norm", "norm0", "conv1", "conv1_norm", "norm1"),
    *("conv2", "conv2_norm", "unit0", "unit1", "reduce", "conv", "even", "odd"),
    *("depthwise", "between", "pointwise", "norm", "sign", "ending", "affine", "classifier"),
    *("threshold", "kernel", "mean", "var", "scale", "bias", "shift", "slope", "lift"),
)

_LAST = (9, 0, 0)
"""A module's own output follows those of its parts."""


class NotFinite(UserError):
    """A step whose loss, gradient or result is not finite; nothing saved is lost."""

    # A step is of all devices, and so its end.
    in_all_processes = True

    def __init__(self, what: str, layer: str, hint: str, checkpoint: str = "") -> None:
        """Take in what happened, where it began, what to do, and what is saved."""
        self._what, self._layer, self._hint = what, layer, hint
        named = f"; {checkpoint}" if checkpoint else ""
        super().__init__(f"{what}; {layer}{named}. {hint}")

    def naming(self, checkpoint: str) -> "NotFinite":
        """Return the error that also names the last checkpoint."""
        return NotFinite(self._what, self._layer, self._hint, checkpoint)


@dataclasses.dataclass(frozen=True)
class Place:
    """A layer or a parameter.

    Attributes:
        region: one of `_REGIONS`.
        cell: number of the cell, 0 elsewhere.
        words: what follows, as modules and parameters are called.
    """

    region: str
    cell: int
    words: tuple[str, ...]

    def rank(self) -> tuple[Any, ...]:
        """Return what places are sorted by, in forward order.

        Raises:
            ValueError: a word is unknown.
        """
        return (_REGIONS.index(self.region), self.cell, *map(_rank, self.words))

    def text(self, kinds: tuple[str, ...], operation: Callable[[int, int, int], str]) -> str:
        """Return it in words.

        Args:
            kinds: of each cell.
            operation: (cell, source, target) -> what is on that edge.
        """
        parts = [{"auxiliary": "auxiliary classifier"}.get(self.region, self.region)]
        if self.region == "cells":
            parts = [f"cell {self.cell} ({kinds[self.cell]})"]
        rest = list[str]()
        for word in self.words:
            edge, entry = _edge(word), re.fullmatch(r"preprocess(\d)", word)
            if edge:
                source, target = edge
                name = operation(self.cell, source, target)
                parts.append(f"edge {source}->{target} {name}")
            elif entry:
                parts.append(f"preprocessing of input {entry[1]}")
            elif word != "affine":
                rest.append(re.sub(r"(\d)", r" \1", word).replace("_", " "))
        return ", ".join(parts + [" ".join(rest)] * bool(rest))


def _edge(word: str) -> tuple[int, int] | None:
    found = re.fullmatch(r"edge(\d)_(\d)", word)
    return (int(found[1]), int(found[2])) if found else None


def _rank(word: str) -> tuple[int, int, int]:
    edge = _edge(word)
    if edge:
        return 1, edge[1], edge[0]
    if word.startswith("preprocess"):
        return 0, int(word.removeprefix("preprocess")), 0
    return 2, _WORDS.index(word), 0


def network_places(tree: Any, scanned: frozenset[str]) -> list[tuple[Place, np.ndarray]]:
    """Return the leaves of a discrete network's variables, those of scanned cells one by one.

    Args:
        tree: `params`, `batch_stats` or what was watched.
        scanned: names of the stretches of several cells, which are stacked.
    """
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name, *words = (entry.key for entry in path)
        first = re.fullmatch(r"cells(\d+)", name)
        if not first:
            found.append((Place(name, 0, tuple(words)), leaf))
            continue
        # The leading axis of a stretch's leaves is its cells.
        rows = leaf if name in scanned else [leaf]
        for offset, row in enumerate(rows):
            found.append((Place("cells", int(first[1]) + offset, tuple(words)), row))
    return found


def supernet_places(
    params: Any, operation: Callable[[int, int, int], str]
) -> list[tuple[Place, np.ndarray]]:
    """Return the leaves of a supernet's parameters, those of stacked edges one by one.

    Args:
        params: of `supernet.init`.
        operation: (cell, source, target) -> what is sampled on that edge; the leaves of its other
            operations, which do not change, are left out.
    """
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        # A tuple's entry has an index in place of a key.
        steps: list[Any] = [getattr(entry, "key", getattr(entry, "idx", None)) for entry in path]
        region, *keys = steps
        if region != "cells":
            found.append((Place(region, 0, tuple(keys)), leaf))
        elif keys[1] != "edges":
            found.append((Place(region, keys[0], tuple(keys[1:])), leaf))
        else:
            cell, _, group, name, *words = keys
            kind = "reduce" if "stride2" in params["cells"][cell]["edges"] else "normal"
            for row, edge in enumerate(EDGE_GROUPS[kind][group].edges):
                source, target = EDGES[edge]
                if operation(cell, source, target) != name:
                    continue
                found.append((Place(region, cell, (f"edge{source}_{target}", *words)), leaf[row]))
    return found


def first_bad_output(watched: list[tuple[Place, np.ndarray]]) -> Place | None:
    """Return the first layer in forward order whose output is not finite."""
    bad = [place for place, count in watched if count]
    outputs = [dataclasses.replace(place, words=place.words[:-1]) for place in bad]
    assert all(place.words[-1] == BAD for place in bad)
    return min(outputs, key=lambda place: (*place.rank(), _LAST), default=None)


def last_bad_leaf(leaves: list[tuple[Place, np.ndarray]]) -> Place | None:
    """Return the parameter nearest the output of which not every element is finite."""
    bad = [place for place, leaf in leaves if not np.isfinite(leaf).all()]
    return max(bad, key=Place.rank, default=None)


def finite_on_host(tree: Any) -> bool:
    """Tell whether every number of arrays in host memory is finite."""
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def once(
    step: Step, first: jax.Array, count: jax.Array, state: Any, zeros: Any, bad: Any = None
) -> tuple[Any, dict[str, Any]]:
    """Run the first step alone, in place of `steps.steps_until_bad`, and keep what it makes."""
    del count, zeros, bad
    new, metrics, _ = step(first, state)
    return new, {**metrics, "bad_step": jnp.full((), -1, jnp.int32)}


def _marked(gradients: Any) -> Any:
    """Return 0 for each number that is finite and NaN for the others."""
    return jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), 0, jnp.nan), gradients)


def marking_optimizer() -> optax.GradientTransformation:
    """Return an optimizer that makes NaN of the parameters whose gradient is not finite."""

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return _marked(gradients), state

    return optax.GradientTransformation(lambda params: (), update)


class MarkingPathOptimizer:
    """The same in place of a `PathOptimizer`."""

    def update(self, gradients: Any, state: Any, params: Any, **_: Any) -> tuple[Any, Any]:
        """Return the parameters with the marks, and the state as it was."""
        return jax.tree.map(jnp.add, params, _marked(gradients)), state


def sampled_operation(
    architecture: np.ndarray, kinds: tuple[str, ...]
) -> Callable[[int, int, int], str]:
    """Return (cell, source, target) -> the sampled operation."""

    def operation(cell: int, source: int, target: int) -> str:
        row = architecture[CELL_TYPES.index(kinds[cell])]
        return OPERATIONS[int(row[EDGES.index((source, target))])]

    return operation


def explained(find: Callable[[], str | None]) -> str:
    """Return what is found, or why nothing is.

    What fails here, such as a program that needs too much memory, must not hide what it was for.
    """
    try:
        found = find()
    except Exception as error:
        lines = str(error).splitlines() or [""]
        return f"the layer could not be found ({type(error).__name__}: {lines[0]})"
    return found or "no layer shows it when the step is repeated alone"
