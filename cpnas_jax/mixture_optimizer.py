"""Weight updates of a mixture, in which every parameter takes part in every step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from cpnas_jax.models.edges import Params
from cpnas_jax.path_optimizer import CHILD, PARENT, OptimizerSettings, update_rules


class MixtureOptimizer:
    """The clip, the rule and the cosine rate that `PathOptimizer` has for a model, on all of it."""

    def __init__(self, settings: OptimizerSettings, model: str) -> None:
        """Take the rule of one model.

        Args:
            settings: of both models.
            model: CHILD or PARENT.
        """
        rules = update_rules(settings)
        self._is_sgd = model not in rules or model == PARENT
        self._rule = rules[PARENT if self._is_sgd else CHILD]
        start = settings.child_learning_rate if model == CHILD else settings.learning_rate
        self._schedule = optax.cosine_decay_schedule(start, settings.total_steps)
        self._clip = optax.clip_by_global_norm(settings.gradient_clip)

    def init(self, params: Params) -> Any:
        """Return the rule's state."""
        return self._rule.init(params)

    def rate(self, step: jax.Array) -> jax.Array:
        """Return the learning rate after so many steps, f32[]."""
        # Optax counts with integers among floats, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            return jnp.asarray(self._schedule(step), jnp.float32)

    def update(
        self, gradients: Params, state: Any, params: Params, *, step: jax.Array, **_: Any
    ) -> tuple[Params, Any]:
        """Return new parameters and state.

        Args:
            gradients: like params, averaged over the devices.
            state: of `init`.
            params: of `mixture.init`.
            step: int32[], steps taken before in the whole search.
        """
        # As in `rate`.
        with jax.numpy_dtype_promotion("standard"):
            clipped, _ = self._clip.update(gradients, optax.EmptyState())
            updates, state = self._rule.update(clipped, state, params)
        return self._moved(params, updates, step), state

    def virtual(self, gradients: Params, state: Any, params: Params, *, step: jax.Array) -> Params:
        """Return the parameters after the virtual step of second-order DARTS, eq. 7.

        For SGD it has momentum and decay and no clip, as DARTS' code does. Eq. 7 differentiates a
        step that is linear in the gradient, which Adam's is not: with Adam it is the plain gradient
        step of eq. 7 as printed, at Adam's rate [ours].
        """
        if not self._is_sgd:
            return self._moved(params, gradients, step)
        updates, _ = self._rule.update(gradients, state, params)
        return self._moved(params, updates, step)

    def _moved(self, params: Params, updates: Params, step: jax.Array) -> Params:
        rate = self.rate(step)
        return jax.tree.map(lambda p, u: p - rate * u, params, updates)
