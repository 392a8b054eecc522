"""Architecture parameters alpha: a pytree with its own optax optimizer, apart from the weights.

A strategy supplies a gradient and an optimizer; `apply_gradient` is the same for all of them. For
CP-NAS the gradient is that of 1/2 * (alpha - z)^2 on the 28 sampled entries and the optimizer is
SGD at rate 1/t in round t, so that after round t

    alpha_t = alpha_(t-1) - 1/t * (alpha_(t-1) - z_t)

is exactly the mean of z over the rounds, the quantity that eq. 4.16 takes the softmax of. That is
Algorithm 9 written as an alternating update; the paper itself writes a mean, the form as an update
is our choice.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cpnas_jax.models.space import CELL_TYPES, NUM_EDGES, NUM_OPERATIONS, Alpha


def init_alpha() -> Alpha:
    """Make alpha at the start of a stage: zeros, replaced in round 1, where the rate is 1."""
    return {cell: jnp.zeros((NUM_EDGES, NUM_OPERATIONS), jnp.float32) for cell in CELL_TYPES}


@functools.cache
def alpha_optimizer() -> optax.GradientTransformationExtraArgs:
    """Make the optimizer of CP-NAS: `optax.sgd` at rate 1/t, t given to `update` as `round_index`.

    The rate is an input and not a schedule, because optax counts updates and a round has K of
    them. It is cached, so that jitted functions see one and the same static argument.
    """
    sgd = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        round_index: jax.Array,
        **extra_args: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        rate = 1.0 / round_index.astype(jnp.float32)
        hyperparams = {**state.hyperparams, "learning_rate": rate}
        return sgd.update(
            updates,
            state._replace(hyperparams=hyperparams),
            params,
        )

    return optax.GradientTransformationExtraArgs(sgd.init, update)


def restart(
    optimizer: optax.GradientTransformation | None = None,
) -> tuple[Alpha, optax.OptState]:
    """Give fresh alpha and optimizer state, as every stage begins with.

    Args:
        optimizer: that of the strategy; `alpha_optimizer()` when not given.
    """
    alpha = init_alpha()
    return alpha, (optimizer or alpha_optimizer()).init(alpha)


def cp_gradient(alpha: Alpha, architecture: jax.Array, z: jax.Array) -> Alpha:
    """Give the gradient of 1/2 * (alpha - z)^2 on the sampled entries, 0 elsewhere.

    Args:
        alpha: the two f32[14, 8].
        architecture: int32[2, 14], the sampled operation of each edge.
        z: f32[], the score of eq. 4.15, the same for all 28 sampled operations.
    """
    return {
        cell: jax.nn.one_hot(sampled, NUM_OPERATIONS, dtype=jnp.float32) * (alpha[cell] - z)
        for cell, sampled in zip(CELL_TYPES, architecture, strict=True)
    }


def apply_gradient(
    optimizer: optax.GradientTransformation,
    alpha: Alpha,
    opt_state: optax.OptState,
    gradient: Alpha,
    round_index: jax.Array,
) -> tuple[Alpha, optax.OptState]:
    """Update alpha with the gradient of any strategy.

    Args:
        optimizer: `alpha_optimizer()`, or another one such as `optax.adam(...)`, which does not
            look at the round.
        alpha: the two f32[14, 8].
        opt_state: state of `optimizer`.
        gradient: like alpha.
        round_index: int32[], t counted from 1.
    """
    updates, opt_state = optax.with_extra_args_support(optimizer).update(
        gradient, opt_state, alpha, round_index=round_index
    )
    return optax.apply_updates(alpha, updates), opt_state


@jax.jit
def _update(
    alpha: Alpha,
    opt_state: optax.OptState,
    architecture: jax.Array,
    z: jax.Array,
    round_index: jax.Array,
) -> tuple[Alpha, optax.OptState]:
    gradient = cp_gradient(alpha, architecture, z)
    return apply_gradient(alpha_optimizer(), alpha, opt_state, gradient, round_index)


def update_alpha(
    alpha: Alpha,
    opt_state: optax.OptState,
    architecture: np.ndarray,
    z: float,
    round_index: int,
) -> tuple[Alpha, optax.OptState]:
    """Take z of one sampled epoch into alpha; compiled once for a whole search.

    Args:
        alpha: the two f32[14, 8].
        opt_state: state of `alpha_optimizer()`.
        architecture: int[2, 14], the sampled operation of each edge.
        z: the score of eq. 4.15.
        round_index: t, counted from 1.

    Raises:
        ValueError: if the round is below 1 or z is not finite.
    """
    if round_index < 1 or not np.isfinite(z):
        raise ValueError(f"round {round_index} must be at least 1 and z {z} finite")
    # Fixed dtypes: a Python scalar is weakly typed and would compile a second program.
    return _update(
        alpha,
        opt_state,
        np.asarray(architecture, np.int32),
        np.float32(z),
        np.int32(round_index),
    )
