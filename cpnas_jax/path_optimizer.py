"""Weight updates of a sampled path: what was not sampled is left wholly untouched.

In this supernet an unsampled operation gets a gradient of zeros, not none. Momentum and weight
decay would still move it. So each operation of each edge has an optimizer state of its own, and
both its parameters and its state are kept where it was not sampled.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from cpnas_jax.models.space import CELL_TYPES, OPERATIONS
from cpnas_jax.models.supernet import EDGE_GROUPS, Params

CHILD, PARENT = "child", "parent"


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """Settings of both models' optimizers (config section `search`).

    Attributes:
        learning_rate: of the parent at the start; cosine to 0 over `total_steps`.
        child_learning_rate: the same of the child.
        child_optimizer: `sgd` as the parent, or `adam` (without weight decay: decay pulls latent
            weights towards zero, where signs flip).
        momentum: of SGD.
        weight_decay: of SGD, added to the gradient before the momentum as in PyTorch.
        gradient_clip: bound on the global norm.
        total_steps: of the whole search.
    """

    learning_rate: float
    child_learning_rate: float
    child_optimizer: str
    momentum: float
    weight_decay: float
    gradient_clip: float
    total_steps: int


class PathOptimizer:
    """Clip, then SGD or Adam for shared parameters and for the sampled operations, cosine rate.

    One instance serves child and parent. Where they use different rules the state holds both and
    a runtime flag chooses, so that one program trains either.
    """

    def __init__(self, settings: OptimizerSettings) -> None:
        self._settings = settings
        self._clip = optax.clip_by_global_norm(settings.gradient_clip)
        sgd = optax.chain(
            optax.add_decayed_weights(settings.weight_decay), optax.trace(settings.momentum)
        )
        self._rules = {PARENT: sgd}
        if settings.child_optimizer == "adam":
            self._rules[CHILD] = optax.scale_by_adam()
        self._schedule = optax.cosine_decay_schedule(1.0, settings.total_steps)

    def init(self, params: Params) -> dict[str, Any]:
        """Return rule -> state for the shared parameters and for every operation of every edge."""
        shared, operations = _split(params)
        return {
            name: {
                "shared": rule.init(shared),
                "operations": {path: jax.vmap(rule.init)(p) for path, p in operations.items()},
            }
            for name, rule in self._rules.items()
        }

    def update(
        self,
        gradients: Params,
        state: dict[str, Any],
        params: Params,
        *,
        architecture: jax.Array,
        binary: jax.Array,
        step: jax.Array,
    ) -> tuple[Params, dict[str, Any]]:
        """Return new parameters and state; unsampled operations are bitwise the old ones.

        Args:
            gradients: like params, averaged over the devices.
            state: of `init`.
            params: of `supernet.init`.
            architecture: int32[2, 14], what was sampled.
            binary: bool[], child or parent.
            step: int32[], steps taken before in the whole search.
        """
        # Optax's Adam raises a float to an integer count, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            gradients, _ = self._clip.update(gradients, optax.EmptyState())
            rate = self._schedule(step) * jnp.where(
                binary, self._settings.child_learning_rate, self._settings.learning_rate
            )
            if CHILD not in self._rules:
                return self._apply(PARENT, gradients, state, params, architecture, rate)
            return lax.cond(
                binary,
                lambda *operands: self._apply(CHILD, *operands),
                lambda *operands: self._apply(PARENT, *operands),
                gradients,
                state,
                params,
                architecture,
                rate,
            )

    def _apply(
        self,
        name: str,
        gradients: Params,
        state: dict[str, Any],
        params: Params,
        architecture: jax.Array,
        rate: jax.Array,
    ) -> tuple[Params, dict[str, Any]]:
        rule, old = self._rules[name], state[name]
        shared, operations = _split(params)
        shared_gradients, operation_gradients = _split(gradients)

        def descend(parameter: jax.Array, update: jax.Array) -> jax.Array:
            return parameter - (rate * update).astype(parameter.dtype)

        updates, shared_state = rule.update(shared_gradients, old["shared"], shared)
        new_shared = jax.tree.map(descend, shared, updates)
        new_operations, new_states = {}, {}
        for place in _places(params):
            path = str(place)
            parameters, operation_state = operations[path], old["operations"][path]
            updates, stepped = jax.vmap(rule.update)(
                operation_gradients[path], operation_state, parameters
            )
            sampled = place.sampled(architecture)
            new_operations[path] = _keep_unsampled(
                sampled, jax.tree.map(descend, parameters, updates), parameters
            )
            new_states[path] = _keep_unsampled(sampled, stepped, operation_state)
        new_state = {"shared": shared_state, "operations": new_states}
        return _join(new_shared, new_operations, params), {**state, name: new_state}


@dataclasses.dataclass(frozen=True, order=True)
class _Place:
    """Where the stacked parameters of an operation are."""

    cell: int
    kind: str
    group: str
    operation: str

    def __str__(self) -> str:
        return f"{self.cell}/{self.kind}/{self.group}/{self.operation}"

    def sampled(self, architecture: jax.Array) -> jax.Array:
        """bool[edges of the group]: whether this operation is the sampled one."""
        edges = jnp.asarray(EDGE_GROUPS[self.kind][self.group].edges)
        chosen = architecture[CELL_TYPES.index(self.kind)][edges]
        return chosen == OPERATIONS.index(self.operation)


def _places(params: Params) -> list[_Place]:
    """Every operation that has parameters; only a reduction cell has edges of stride 2."""
    return [
        _Place(position, "reduce" if "stride2" in cell["edges"] else "normal", group, name)
        for position, cell in enumerate(params["cells"])
        for group, by_name in cell["edges"].items()
        for name, parameters in by_name.items()
        if parameters
    ]


def _split(tree: Params) -> tuple[Params, dict[str, Params]]:
    """Separate what every path uses from the operations, keyed by their place."""
    shared = {key: value for key, value in tree.items() if key != "cells"}
    shared["cells"] = tuple(
        {key: value for key, value in cell.items() if key != "edges"} for cell in tree["cells"]
    )
    operations = {
        str(place): tree["cells"][place.cell]["edges"][place.group][place.operation]
        for place in _places(tree)
    }
    return shared, operations


def _join(shared: Params, operations: dict[str, Params], like: Params) -> Params:
    """Undo `_split`; operations without parameters are taken from `like`."""
    cells = [
        {**cell, "edges": {group: dict(names) for group, names in original["edges"].items()}}
        for cell, original in zip(shared["cells"], like["cells"], strict=True)
    ]
    for place in _places(like):
        cells[place.cell]["edges"][place.group][place.operation] = operations[str(place)]
    return {**shared, "cells": tuple(cells)}


def _keep_unsampled(sampled: jax.Array, new: Any, old: Any) -> Any:
    def keep(new_leaf: jax.Array, old_leaf: jax.Array) -> jax.Array:
        mask = sampled.reshape((-1,) + (1,) * (new_leaf.ndim - 1))
        return jnp.where(mask, new_leaf, old_leaf)

    return jax.tree.map(keep, new, old)
