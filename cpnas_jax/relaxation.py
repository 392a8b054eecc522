"""How the architecture parameters alpha enter a loss, so that it has a gradient for them.

`mixture_of`  DARTS, PC-DARTS: the weighted sum of all operations, in both steps.
`sampled_by`  a single path, drawn anew in every step. A straight-through gate on each edge has the
              value 1 and the gradient of a softmax: alpha learns at the cost of one path (the idea
              of GDAS, Dong & Yang 2019).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cpnas_jax.models import mixture, supernet
from cpnas_jax.models.mixture import MixtureSettings
from cpnas_jax.models.operations import Binary
from cpnas_jax.models.space import CELL_TYPES, NUM_OPERATIONS, Alpha
from cpnas_jax.models.supernet import Params, SupernetSettings


@dataclasses.dataclass(frozen=True)
class Relaxation:
    """The functions of a strategy.

    Attributes:
        init: (key, image shape) -> parameters of a model.
        draw: (key, alpha, survivors) -> what a step draws, the same for both of its batches and
            for both models.
        architecture: what was drawn -> int32[2, 14] if only a path of it is trained, else None.
        logits: (params, images, alpha, survivors, drawn, binary) -> f32[N, num_classes], with a
            gradient for alpha.
        trained: the same without one, for the weights.
        score: (params, images, alpha, survivors, binary) -> f32[N, num_classes] of what alpha
            says by itself.
    """

    init: Callable[[jax.Array, tuple[int, int, int]], Params]
    draw: Callable[[jax.Array, Alpha, jax.Array], Any]
    architecture: Callable[[Any], jax.Array | None]
    logits: Callable[..., jax.Array]
    trained: Callable[..., jax.Array]
    score: Callable[..., jax.Array]


def mixture_of(settings: MixtureSettings) -> Relaxation:
    """Return the relaxation of DARTS, or with partial channels of PC-DARTS."""

    def score(
        params: Params, images: jax.Array, alpha: Alpha, survivors: jax.Array, binary: Binary
    ) -> jax.Array:
        return mixture.apply(
            params, images, alpha, settings=settings, binary=binary, survivors=survivors
        )

    def logits(
        params: Params,
        images: jax.Array,
        alpha: Alpha,
        survivors: jax.Array,
        drawn: None,
        binary: Binary,
    ) -> jax.Array:
        del drawn
        return score(params, images, alpha, survivors, binary)

    return Relaxation(
        init=lambda key, image_shape: mixture.init(key, settings, image_shape),
        draw=lambda key, alpha, survivors: None,
        architecture=lambda drawn: None,
        logits=logits,
        trained=logits,
        score=score,
    )


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """An architecture, int32[2, 14], and the noise f32[2, 14, 8] that it was drawn with."""

    architecture: jax.Array
    noise: jax.Array


def sampled_by(settings: SupernetSettings, temperature: float) -> Relaxation:
    """Return the relaxation of single paths.

    Args:
        settings: of the supernet.
        temperature: of the softmax whose gradient a gate has.
    """

    def draw(key: jax.Array, alpha: Alpha, survivors: jax.Array) -> _Drawn:
        noise = jax.random.gumbel(key, survivors.shape)
        return _Drawn(largest(_stacked(alpha) + noise, survivors), noise)

    def logits(
        params: Params,
        images: jax.Array,
        alpha: Alpha,
        survivors: jax.Array,
        drawn: _Drawn,
        binary: Binary,
    ) -> jax.Array:
        gates = straight_through(
            _stacked(alpha) + drawn.noise, survivors, drawn.architecture, temperature
        )
        return supernet.apply(
            params, images, drawn.architecture, settings=settings, binary=binary, gates=gates
        )

    def trained(
        params: Params,
        images: jax.Array,
        alpha: Alpha,
        survivors: jax.Array,
        drawn: _Drawn,
        binary: Binary,
    ) -> jax.Array:
        del alpha, survivors
        return supernet.apply(params, images, drawn.architecture, settings=settings, binary=binary)

    def score(
        params: Params, images: jax.Array, alpha: Alpha, survivors: jax.Array, binary: Binary
    ) -> jax.Array:
        architecture = largest(_stacked(alpha), survivors)
        return supernet.apply(params, images, architecture, settings=settings, binary=binary)

    return Relaxation(
        init=lambda key, image_shape: supernet.init(key, settings, image_shape),
        draw=draw,
        architecture=lambda drawn: drawn.architecture,
        logits=logits,
        trained=trained,
        score=score,
    )


def _stacked(alpha: Alpha) -> jax.Array:
    return jnp.stack([alpha[cell] for cell in CELL_TYPES])


def largest(values: jax.Array, survivors: jax.Array) -> jax.Array:
    """Return the surviving operation with the largest value on every edge, int32[2, 14].

    With Gumbel noise in the values it is a draw from the softmax over the survivors.

    Args:
        values: f32[2, 14, 8].
        survivors: bool[2, 14, 8]; at least one on every edge.
    """
    return jnp.argmax(jnp.where(survivors, values, -jnp.inf), axis=-1).astype(jnp.int32)


def straight_through(
    values: jax.Array, survivors: jax.Array, architecture: jax.Array, temperature: float
) -> jax.Array:
    """Return gates f32[2, 14] of the value 1, with the gradient of the chosen one's softmax.

    Args:
        values: f32[2, 14, 8], alpha and noise.
        survivors: bool[2, 14, 8]; the softmax is over them.
        architecture: int32[2, 14], the chosen operations.
        temperature: the values are divided by it.
    """
    soft = jax.nn.softmax(jnp.where(survivors, values / temperature, -jnp.inf), axis=-1)
    chosen = jax.nn.one_hot(architecture, NUM_OPERATIONS, dtype=soft.dtype)
    probability = jnp.sum(soft * chosen, axis=-1)
    return 1 + (probability - jax.lax.stop_gradient(probability))
