"""One-bit weights and activations: sign with straight-through estimators, and weight scales.

Each estimator is a `custom_vjp`: the forward pass is always `sign` with sign(0) = +1, the backward
pass multiplies the cotangent by a surrogate derivative d(x). `jax.jvp` is therefore not available
through them; reverse mode is.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

WEIGHT_SCALES = ("none", "layer", "channel")
PAD_VALUES = (0.0, 1.0)
SWISH_BETA = 5.0
"""Sharpness of the sign-swish surrogate, the value BNN+ uses."""


def _sign_value(x: jax.Array) -> jax.Array:
    """Sign with sign(0) = +1; `jnp.sign` would give 0, a third value that one bit cannot hold."""
    one = jnp.ones((), x.dtype)
    return jnp.where(x >= 0, one, -one)


def _make_estimator(
    derivative: Callable[[jax.Array], jax.Array], doc: str
) -> Callable[[jax.Array], jax.Array]:
    """Build sign(x) whose backward pass multiplies by `derivative(x)`."""

    @jax.custom_vjp
    def estimator(x: jax.Array) -> jax.Array:
        return _sign_value(x)

    def forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _sign_value(x), x

    def backward(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
        return (cotangent * derivative(x),)

    estimator.defvjp(forward, backward)
    estimator.__doc__ = doc
    return estimator


def _identity_derivative(x: jax.Array) -> jax.Array:
    return jnp.ones_like(x)


def _clip_derivative(x: jax.Array) -> jax.Array:
    return (jnp.abs(x) <= 1).astype(x.dtype)


def _bireal_derivative(x: jax.Array) -> jax.Array:
    return jnp.maximum(2 - 2 * jnp.abs(x), 0)


def _swish_derivative(x: jax.Array) -> jax.Array:
    y = SWISH_BETA * x
    # 1 / (1 + cosh y) = 2 s(y) s(-y) with the logistic s: the same number, without overflow.
    bell = 2 * jax.nn.sigmoid(y) * jax.nn.sigmoid(-y)
    return SWISH_BETA * (2 - y * jnp.tanh(y / 2)) * bell


sign_identity = _make_estimator(
    _identity_derivative,
    "Sign of x; d(x) = 1 everywhere (straight-through, Bengio et al. 2013).",
)
sign_clip = _make_estimator(
    _clip_derivative,
    "Sign of x; d(x) = 1 where |x| <= 1, else 0 (Hubara et al. 2016).",
)
sign_bireal = _make_estimator(
    _bireal_derivative,
    "Sign of x; d(x) = 2 - 2|x| where |x| <= 1, else 0 (Bi-Real Net, Liu et al. 2018).",
)
sign_swish = _make_estimator(
    _swish_derivative,
    "Sign of x; d(x) = b (2 - bx tanh(bx/2)) / (1 + cosh(bx)), b = 5 (BNN+, Darabi et al. 2018).",
)

ESTIMATORS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "identity": sign_identity,
    "clip": sign_clip,
    "bireal": sign_bireal,
    "swish": sign_swish,
}


@dataclasses.dataclass(frozen=True)
class Binarizer:
    """How a network is made one-bit; hashable, so it can be a static argument.

    Attributes:
        activation_estimator: surrogate derivative of the activations' sign, a key of `ESTIMATORS`.
        weight_estimator: the same for the weights.
        weight_scale: `none`, `layer` (one mean |H|) or `channel` (mean |H| of each output
            channel's filter, XNOR-Net).
        pad_value: what surrounds the signs of an activation: 0 (as in float networks), or +1, a
            value that one bit can hold, so that a packed network needs no correction.

    Raises:
        ValueError: a field is none of its offered values.
    """

    activation_estimator: str = "bireal"
    weight_estimator: str = "clip"
    weight_scale: str = "channel"
    pad_value: float = 0.0

    def __post_init__(self) -> None:
        offered = {
            "activation_estimator": tuple(ESTIMATORS),
            "weight_estimator": tuple(ESTIMATORS),
            "weight_scale": WEIGHT_SCALES,
            "pad_value": PAD_VALUES,
        }
        for field, values in offered.items():
            value = getattr(self, field)
            if value not in values:
                raise ValueError(f"binarizer.{field} is {value!r}; offered are {values}")


def _require_float(x: jax.Array, what: str) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{what} must be floating point to be binarized, not {x.dtype}")


def binarize_activations(x: jax.Array, binarizer: Binarizer) -> jax.Array:
    """Return sign(x) in {-1, +1}, same shape and dtype, with the configured surrogate gradient.

    Raises:
        TypeError: x is not floating point.
    """
    _require_float(x, "activations")
    return ESTIMATORS[binarizer.activation_estimator](x)


def binarize_weights(kernel: jax.Array, binarizer: Binarizer) -> tuple[jax.Array, jax.Array]:
    """Split latent weights H into signs and a scale: H_hat = scale * signs (XNOR-Net).

    Signs and scale are kept apart so that a convolution runs on -1 and +1 alone, where it is exact
    integer arithmetic, and the scale multiplies its output.

    The scale is not differentiated: gradients reach H through the sign alone. This is our choice,
    that of Bi-Real Net's code; XNOR-Net's formula has a second term.

    Args:
        kernel: latent weights H, output channels on the last axis.
        binarizer: estimator and kind of scale.

    Returns:
        signs in {-1, +1}, shape and dtype of the kernel; scale of shape [output channels]
        (`channel`) or [1] (`layer`, `none`).

    Raises:
        TypeError: kernel is not floating point.
    """
    _require_float(kernel, "weights")
    signs = ESTIMATORS[binarizer.weight_estimator](kernel)
    return signs, jax.lax.stop_gradient(weight_scale(kernel, binarizer))


def weight_scale(kernel: jax.Array, binarizer: Binarizer) -> jax.Array:
    """Return a of H_hat = a sign(H): f[output channels] (`channel`) or f[1]; differentiable."""
    if binarizer.weight_scale == "channel":
        return jnp.mean(jnp.abs(kernel), axis=tuple(range(kernel.ndim - 1)))
    if binarizer.weight_scale == "layer":
        return jnp.mean(jnp.abs(kernel)).reshape(1)
    return jnp.ones((1,), kernel.dtype)
