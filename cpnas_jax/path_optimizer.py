"""Weight updates of a sampled path: what was not sampled is left wholly untouched.

In this supernet an unsampled operation gets a gradient of zeros, not none; momentum and weight
decay would still move it. So every parameter of an edge has an optimizer state of its own, and both
are kept as they were where the operation was not sampled.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from cpnas_jax.models.edges import EDGE_GROUPS, Params
from cpnas_jax.models.space import CELL_TYPES, CHILD, OPERATIONS, PARENT


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


def update_rules(settings: OptimizerSettings) -> dict[str, optax.GradientTransformation]:
    """Return the rules by model, without clip and rate; the child's only if it has its own."""
    sgd = optax.chain(
        optax.add_decayed_weights(settings.weight_decay), optax.trace(settings.momentum)
    )
    rules = {PARENT: sgd}
    if settings.child_optimizer == "adam":
        rules[CHILD] = optax.scale_by_adam()
    return rules


class PathOptimizer:
    """Clip, then SGD or Adam for shared parameters and for the sampled operations, cosine rate.

    One instance serves child and parent. Where they use different rules the state holds both and
    a runtime flag chooses, so that one program trains either.
    """

    def __init__(self, settings: OptimizerSettings) -> None:
        self._settings = settings
        self._clip = optax.clip_by_global_norm(settings.gradient_clip)
        self._rules = update_rules(settings)
        self._schedule = optax.cosine_decay_schedule(1.0, settings.total_steps)

    def init(self, params: Params) -> dict[str, Any]:
        """Return rule -> state of the shared parameters and of each group of edges."""
        shared, groups = _split(params)
        return {
            name: {
                "shared": rule.init(shared),
                "edges": [jax.vmap(jax.vmap(rule.init))(group.values) for group in groups],
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
        share: Callable[[Params], Params] | None = None,
    ) -> tuple[Params, dict[str, Any]]:
        """Return new parameters and state; unsampled operations are bitwise the old ones.

        Args:
            gradients: like params, averaged over the devices.
            state: of `init`.
            params: of `supernet.init`.
            architecture: int32[2, 14], what was sampled.
            binary: bool[], child or parent.
            step: int32[], steps taken before in the whole search.
            share: what becomes of the clipped gradients that every path uses, where several paths
                are trained at the same time.
        """
        # Optax's Adam raises a float to an integer count, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            gradients, _ = self._clip.update(gradients, optax.EmptyState())
            if share is not None:
                common, groups = _split(gradients)
                values = [group.values for group in groups]
                gradients = _join(share(common), values, gradients)
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
        shared, groups = _split(params)
        shared_gradients, gradient_groups = _split(gradients)
        updates, shared_state = rule.update(shared_gradients, old["shared"], shared)
        new_shared = jax.tree.map(lambda p, u: p - rate * u, shared, updates)
        new_values, new_states = [], []
        for group, gradient, before in zip(groups, gradient_groups, old["edges"], strict=True):
            # The rules are elementwise: mapped over every parameter, each has a state of its own,
            # step count included. Adam's bias correction counts the updates a weight really got.
            updates, after = jax.vmap(jax.vmap(rule.update))(gradient.values, before, group.values)
            sampled = group.sampled(architecture)
            new_values.append(jnp.where(sampled, group.values - rate * updates, group.values))
            new_states.append(
                jax.tree.map(lambda new, old, s=sampled: jnp.where(s, new, old), after, before)
            )
        new_state = {"shared": shared_state, "edges": new_states}
        return _join(new_shared, new_values, params), {**state, name: new_state}


def merge_paths(
    params: Params,
    state: dict[str, Any],
    architecture: jax.Array,
    *,
    axis_name: str,
    is_leader: jax.Array,
) -> tuple[Params, dict[str, Any]]:
    """Put together what devices have made of the operations that each of them sampled.

    To be called inside a pmapped function. No two architectures share an operation of an edge, so
    every parameter has one owner at most; where it has none, all devices hold the same.

    Args:
        params: of `supernet.init`; the same on all devices but for sampled operations.
        state: of `PathOptimizer.init`, likewise.
        architecture: int32[2, 14], what this device's group sampled.
        axis_name: of the devices.
        is_leader: bool[], one device of each group.

    Returns:
        Parameters and state, bitwise those of each owner, the same on all devices.
    """

    def merged(group: _Group) -> Callable[[jax.Array], jax.Array]:
        owned = group.sampled(architecture) & is_leader
        has_owner = lax.psum(owned.astype(jnp.int32), axis_name) > 0

        def of_leaf(leaf: jax.Array) -> jax.Array:
            # Bits are added, not numbers: 0 + -0.0 is not -0.0.
            bits = lax.bitcast_convert_type(leaf, jnp.uint32)
            told = lax.psum(jnp.where(owned, bits, jnp.uint32(0)), axis_name)
            return lax.bitcast_convert_type(jnp.where(has_owner, told, bits), leaf.dtype)

        return of_leaf

    shared, groups = _split(params)
    mergers = [merged(group) for group in groups]
    values = [merge(group.values) for merge, group in zip(mergers, groups, strict=True)]
    states = {
        name: {
            **rule,
            "edges": [
                jax.tree.map(merge, edge)
                for merge, edge in zip(mergers, rule["edges"], strict=True)
            ],
        }
        for name, rule in state.items()
    }
    return _join(shared, values, params), states


@dataclasses.dataclass(frozen=True)
class _Group:
    """The parameters of a cell's edges of one stride, as one matrix.

    Attributes:
        kind: cell type.
        name: key in `EDGE_GROUPS`.
        values: f32[edges, parameters of all operations of an edge].
        operation: int32[parameters], the operation each column belongs to.
    """

    kind: str
    name: str
    values: jax.Array
    operation: np.ndarray

    def sampled(self, architecture: jax.Array) -> jax.Array:
        """bool[edges, parameters]: whether a parameter's operation is the sampled one."""
        edges = np.asarray(EDGE_GROUPS[self.kind][self.name].edges)
        chosen = architecture[CELL_TYPES.index(self.kind)][edges]
        return chosen[:, None] == self.operation[None]


def _split(tree: Params) -> tuple[Params, list[_Group]]:
    """Separate what every path uses from the edges' operations."""
    shared = {key: value for key, value in tree.items() if key != "cells"}
    shared["cells"] = tuple(
        {key: value for key, value in cell.items() if key != "edges"} for cell in tree["cells"]
    )
    groups = []
    for cell in tree["cells"]:
        # Only a reduction cell has edges of stride 2.
        kind = "reduce" if "stride2" in cell["edges"] else "normal"
        for name, operations in sorted(cell["edges"].items()):
            columns, owners = [], []
            for operation in OPERATIONS:
                for leaf in jax.tree.leaves(operations[operation]):
                    columns.append(leaf.reshape(leaf.shape[0], -1))
                    owners.append(np.full(columns[-1].shape[1], OPERATIONS.index(operation)))
            values = jnp.concatenate(columns, axis=1)
            groups.append(_Group(kind, name, values, np.concatenate(owners).astype(np.int32)))
    return shared, groups


def _join(shared: Params, values: list[jax.Array], like: Params) -> Params:
    """Undo `_split`, with new values for the groups."""
    remaining = iter(values)
    cells = []
    for cell, original in zip(shared["cells"], like["cells"], strict=True):
        edges: dict[str, Params] = {}
        for name, operations in sorted(original["edges"].items()):
            matrix, start = next(remaining), 0
            edges[name] = {}
            for operation in OPERATIONS:
                leaves, structure = jax.tree.flatten(operations[operation])
                taken = []
                for leaf in leaves:
                    width = leaf[0].size
                    taken.append(matrix[:, start : start + width].reshape(leaf.shape))
                    start += width
                edges[name][operation] = jax.tree.unflatten(structure, taken)
        cells.append({**cell, "edges": edges})
    return {**shared, "cells": tuple(cells)}
