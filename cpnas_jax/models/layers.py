"""Convolutions, pooling and normalisation on NHWC arrays, each in two formulations.

`native` is the library's own primitive, what TPU and GPU run best. `shifted` is a sum over shifted
slices with custom gradients (`models.shifted`), for CPUs, compiled apart from what surrounds it
(`models.outline`). `auto` chooses by the default backend when a function is traced. Both are tested
against each other in value and gradient.

Padding is explicit and symmetric, dilation * (k // 2), as in PyTorch; "SAME" differs at stride 2.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cpnas_jax.models import shifted
from cpnas_jax.models.outline import outline

FORMULATIONS = ("auto", "native", "shifted")
BATCH_NORM_EPSILON = 1e-3
"""Added to the variance (DCP-NAS' code has it in final training; in search it is our choice)."""

_DEPTHWISE_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


@dataclasses.dataclass(frozen=True)
class StatisticsAxis:
    """Devices that normalise their parts of a batch, of equal sizes, by the moments of all parts.

    Every device of a group must come to the same normalisations in the same order.

    Attributes:
        name: of the mapped axis that their function runs in.
        groups: positions on the axis that belong together; None: all.
    """

    name: str
    groups: tuple[tuple[int, ...], ...] | None = None


def resolve_formulation(formulation: str) -> str:
    """Return `native` or `shifted`; `auto` is `shifted` on a CPU and `native` elsewhere.

    Raises:
        ValueError: not one of `FORMULATIONS`.
    """
    if formulation not in FORMULATIONS:
        raise ValueError(f"formulation is {formulation!r}; offered are {FORMULATIONS}")
    if formulation != "auto":
        return formulation
    return "shifted" if jax.default_backend() == "cpu" else "native"


_shifted_depthwise = outline(shifted.depthwise, 3)
_shifted_max_pool = outline(shifted.max_pool, 1)
_shifted_pool_sum = outline(shifted.pool_sum, 1)


def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int = 1,
    dilation: int = 1,
    pad_value: jax.Array | float = 0.0,
    formulation: str = "auto",
) -> jax.Array:
    """Convolve every channel with its own filter.

    Args:
        x: f[N, H, W, C].
        kernel: f[k, k, C], k odd.
        stride: 1 or 2.
        dilation: distance between the kernel's taps.
        pad_value: scalar around the image, dilation * (k // 2) wide; gets no gradient.
        formulation: see the module.

    Returns:
        f[N, ceil(H / stride), ceil(W / stride), C].
    """
    k = kernel.shape[0]
    pad = dilation * (k // 2)
    pad_value = lax.stop_gradient(jnp.asarray(pad_value, x.dtype))
    if resolve_formulation(formulation) == "shifted":
        return _shifted_depthwise(x, kernel, pad_value, stride, dilation)
    return lax.conv_general_dilated(
        shifted.pad_image(x, pad, pad_value),
        kernel[:, :, None, :],
        window_strides=(stride, stride),
        padding="VALID",
        rhs_dilation=(dilation, dilation),
        dimension_numbers=_DEPTHWISE_DIMENSIONS,
        feature_group_count=x.shape[-1],
    )


def pointwise_conv(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, formulation: str = "auto"
) -> jax.Array:
    """Mix channels at every pixel: f[N, H, W, C] by f[C, D] gives f[N, ., ., D].

    On a CPU it is one matrix product over all pixels (two and a half times faster than the
    convolution primitive). Sums are accumulated in float32.
    """
    if resolve_formulation(formulation) == "shifted":
        x = x[:, ::stride, ::stride, :]
        product = jnp.dot(
            x.reshape(-1, x.shape[-1]), kernel, preferred_element_type=jnp.float32
        ).astype(x.dtype)
        return product.reshape(*x.shape[:-1], kernel.shape[-1])
    return lax.conv_general_dilated(
        x,
        kernel[None, None],
        window_strides=(stride, stride),
        padding="VALID",
        dimension_numbers=_DEPTHWISE_DIMENSIONS,
        preferred_element_type=jnp.float32,
    ).astype(x.dtype)


def conv_3x3(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, formulation: str = "auto"
) -> jax.Array:
    """Dense 3x3 convolution, zero padding 1: f[N, H, W, C] by f[3, 3, C, D] gives f[N, ., ., D].

    On a CPU the nine shifted images are laid side by side for one matrix product; made for the
    stem, whose few input channels leave the primitive's gradient slow.
    """
    if resolve_formulation(formulation) == "shifted":
        out = (math.ceil(x.shape[1] / stride), math.ceil(x.shape[2] / stride))
        windows = shifted.taps(shifted.pad_image(x, 1, jnp.zeros((), x.dtype)), 3, stride, 1, out)
        patches = jnp.concatenate(windows, axis=-1)
        return pointwise_conv(
            patches, kernel.reshape(-1, kernel.shape[-1]), formulation=formulation
        )
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        dimension_numbers=_DEPTHWISE_DIMENSIONS,
    )


def max_pool(x: jax.Array, *, stride: int = 1, formulation: str = "auto") -> jax.Array:
    """3x3 max pooling, padding 1; of equal values the first in reading order gets the gradient."""
    if resolve_formulation(formulation) == "shifted":
        return _shifted_max_pool(x, stride)
    return lax.reduce_window(
        x,
        np.asarray(-np.inf, x.dtype),
        lax.max,
        (1, 3, 3, 1),
        (1, stride, stride, 1),
        ((0, 0), (1, 1), (1, 1), (0, 0)),
    )


def max_pool_2x2(x: jax.Array) -> jax.Array:
    """2x2 max pooling at stride 2: f[N, H, W, C] to f[N, ceil(H / 2), ceil(W / 2), C].

    Windows at the end of an odd side have what there is. Of equal values the first in reading order
    gets the gradient. Slices on every backend: the windows do not overlap.
    """
    odd = (x.shape[1] % 2, x.shape[2] % 2)
    lowest = jnp.asarray(-jnp.inf, x.dtype)
    x = lax.pad(x, lowest, ((0, 0, 0), (0, odd[0], 0), (0, odd[1], 0), (0, 0, 0)))

    def larger(first: jax.Array, second: jax.Array) -> jax.Array:
        return jnp.where(second > first, second, first)

    rows = larger(x[:, :, ::2], x[:, :, 1::2])
    return larger(rows[:, ::2], rows[:, 1::2])


def avg_pool(x: jax.Array, *, stride: int = 1, formulation: str = "auto") -> jax.Array:
    """3x3 average pooling, padding 1, each mean over the pixels inside the image only (DARTS)."""
    shares = jnp.asarray(_pool_shares(x.shape[1], x.shape[2], stride), x.dtype)
    if resolve_formulation(formulation) == "shifted":
        total = _shifted_pool_sum(x, stride)
    else:
        total = lax.reduce_window(
            x,
            np.asarray(0, x.dtype),
            lax.add,
            (1, 3, 3, 1),
            (1, stride, stride, 1),
            ((0, 0), (1, 1), (1, 1), (0, 0)),
        )
    return total * shares


def _pool_shares(height: int, width: int, stride: int) -> np.ndarray:
    """1 / number of pixels of each 3x3 window inside the image, shape [1, H', W', 1]."""

    def counts(size: int) -> np.ndarray:
        centres = np.arange(0, size, stride)
        return 1 + (centres > 0) + (centres < size - 1)

    return 1.0 / (counts(height)[None, :, None, None] * counts(width)[None, None, :, None])


@functools.partial(jax.jit, static_argnums=(1, 2))
def normalize(
    x: jax.Array, over: StatisticsAxis | None = None, epsilon: float = BATCH_NORM_EPSILON
) -> jax.Array:
    """Batch normalisation by the batch's own moments over N, H, W, without affine parameters.

    The variance is E[x^2] - E[x]^2 in one pass over the data, clamped at 0 against rounding.

    Args:
        x: f[N, H, W, C], a device's part of the batch.
        over: the devices that hold the batch; None: this one alone.
        epsilon: added to the variance.
    """
    mean = jnp.mean(x, axis=(0, 1, 2), keepdims=True)
    square = jnp.mean(x * x, axis=(0, 1, 2), keepdims=True)
    if over is not None:
        # The gradient's own sum over the devices is the transpose that pmap gives this one.
        mean, square = lax.pmean((mean, square), over.name, axis_index_groups=over.groups)
    variance = jnp.maximum(square - mean * mean, 0)
    return (x - mean) * lax.rsqrt(variance + epsilon)
