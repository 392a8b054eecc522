"""Convolutions, pooling and normalisation on NHWC arrays, each in two formulations.

`native` is the library's own primitive, what TPU and GPU run best. `shifted` is a sum over
shifted slices with custom gradients: on a CPU XLA has no fast depthwise convolution or pooling
(measured: up to forty times slower inside a network). `auto` chooses by the default backend when a
function is traced. Both are tested against each other in value and gradient.

Padding is explicit and symmetric, dilation * (k // 2), as in PyTorch; "SAME" differs at stride 2.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

FORMULATIONS = ("auto", "native", "shifted")
BATCH_NORM_EPSILON = 1e-3
"""Added to the variance (DCP-NAS' code has it in final training; in search it is our choice)."""

_DEPTHWISE_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


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
        _pad_image(x, pad, pad_value),
        kernel[:, :, None, :],
        window_strides=(stride, stride),
        padding="VALID",
        rhs_dilation=(dilation, dilation),
        dimension_numbers=_DEPTHWISE_DIMENSIONS,
        feature_group_count=x.shape[-1],
    )


def _pad_image(x: jax.Array, pad: int, value: jax.Array) -> jax.Array:
    return lax.pad(x, value, ((0, 0, 0), (pad, pad, 0), (pad, pad, 0), (0, 0, 0)))


def _taps(
    x: jax.Array, k: int, stride: int, dilation: int, out: tuple[int, int]
) -> list[jax.Array]:
    """The k * k strided windows of a padded image that a kernel's taps meet, row by row."""
    n, _, _, c = x.shape
    windows = []
    for row in range(0, k * dilation, dilation):
        for column in range(0, k * dilation, dilation):
            limits = (
                n,
                row + stride * (out[0] - 1) + 1,
                column + stride * (out[1] - 1) + 1,
                c,
            )
            windows.append(lax.slice(x, (0, row, column, 0), limits, (1, stride, stride, 1)))
    return windows


def _weighted_sum(windows: list[jax.Array], kernel: jax.Array) -> jax.Array:
    weights = lax.reshape(kernel, (len(windows), kernel.shape[-1]))
    shape = windows[0].shape
    # Plain lax operations: the jnp ones trace several times slower, and there are k * k of them.
    products = (
        lax.mul(window, lax.broadcast_in_dim(lax.index_in_dim(weights, i, 0, False), shape, (3,)))
        for i, window in enumerate(windows)
    )
    return functools.reduce(lax.add, products)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
@functools.partial(jax.jit, static_argnums=(3, 4))
def _shifted_depthwise(
    x: jax.Array, kernel: jax.Array, pad_value: jax.Array, stride: int, dilation: int
) -> jax.Array:
    # Jitted, like the gradient below, so that each shape is traced once in a whole network.
    k = kernel.shape[0]
    out = (math.ceil(x.shape[1] / stride), math.ceil(x.shape[2] / stride))
    padded = _pad_image(x, dilation * (k // 2), pad_value)
    return _weighted_sum(_taps(padded, k, stride, dilation, out), kernel)


def _shifted_depthwise_forward(
    x: jax.Array, kernel: jax.Array, pad_value: jax.Array, stride: int, dilation: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    residuals = (x, kernel, pad_value)
    return _shifted_depthwise(*residuals, stride, dilation), residuals


def _shifted_depthwise_backward(
    stride: int,
    dilation: int,
    residuals: tuple[jax.Array, jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, kernel, pad_value = residuals
    # Inlined, what makes x and the cotangent would be fused in, and computed anew for every tap.
    with set_xla_metadata(inlineable="false"):
        x_gradient, kernel_gradient = _depthwise_gradients(
            x, kernel, pad_value, cotangent, stride, dilation
        )
    return x_gradient, kernel_gradient, jnp.zeros_like(pad_value)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _depthwise_gradients(
    x: jax.Array,
    kernel: jax.Array,
    pad_value: jax.Array,
    cotangent: jax.Array,
    stride: int,
    dilation: int,
) -> tuple[jax.Array, jax.Array]:
    k, c = kernel.shape[0], kernel.shape[-1]
    pad = dilation * (k // 2)
    height, width = x.shape[1], x.shape[2]
    out = (cotangent.shape[1], cotangent.shape[2])

    # The kernel's gradient is one reduction over all taps at once: the images are read once instead
    # of k * k times. It keeps N, over which XLA:CPU spreads it on the cores; N is summed last.
    windows = _taps(_pad_image(x, pad, pad_value), k, stride, dilation, out)
    sums = lax.reduce(
        tuple(lax.mul(window, cotangent) for window in windows),
        (np.zeros((), x.dtype),) * len(windows),
        lambda a, b: tuple(map(lax.add, a, b)),
        (1, 2),
    )
    stacked = lax.concatenate([lax.expand_dims(part, (1,)) for part in sums], 1)
    kernel_gradient = lax.reshape(jnp.sum(stacked, axis=0), (k, k, c))

    # The image's gradient is the same shifted sum with the taps reversed, over the cotangent
    # spread out by the stride.
    spread_height = stride * (out[0] - 1) + 1
    spread_width = stride * (out[1] - 1) + 1
    spread = lax.pad(
        cotangent,
        np.zeros((), x.dtype),
        (
            (0, 0, 0),
            (pad, height + pad - spread_height, stride - 1),
            (pad, width + pad - spread_width, stride - 1),
            (0, 0, 0),
        ),
    )
    x_gradient = _weighted_sum(
        _taps(spread, k, 1, dilation, (height, width)), lax.rev(kernel, (0, 1))
    )
    return x_gradient, kernel_gradient


_shifted_depthwise.defvjp(_shifted_depthwise_forward, _shifted_depthwise_backward)


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
        windows = _taps(_pad_image(x, 1, jnp.zeros((), x.dtype)), 3, stride, 1, out)
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
        for axis in (2, 1):
            x = _max_along(x, axis, stride)
        return x
    return lax.reduce_window(
        x,
        np.asarray(-np.inf, x.dtype),
        lax.max,
        (1, 3, 3, 1),
        (1, stride, stride, 1),
        ((0, 0), (1, 1), (1, 1), (0, 0)),
    )


def _along(axis: int, low: int, high: int, interior: int = 0) -> list[tuple[int, int, int]]:
    """Padding of one axis of an NHWC array, as `lax.pad` takes it."""
    edges = [(0, 0, 0)] * 4
    edges[axis] = (low, high, interior)
    return edges


def _neighbours(x: jax.Array, axis: int, stride: int, outside: float) -> list[jax.Array]:
    """The three strided windows along one axis that 3-wide pooling with padding 1 compares."""
    out = math.ceil(x.shape[axis] / stride)
    padded = lax.pad(x, jnp.asarray(outside, x.dtype), _along(axis, 1, 1))
    return [
        lax.slice_in_dim(padded, offset, offset + stride * (out - 1) + 1, stride, axis)
        for offset in range(3)
    ]


def _spread(x: jax.Array, axis: int, stride: int, size: int) -> jax.Array:
    """Undo a stride along one axis: zeros between the elements, up to `size`."""
    missing = size - (stride * (x.shape[axis] - 1) + 1)
    return lax.pad(x, jnp.zeros((), x.dtype), _along(axis, 0, missing, stride - 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
@functools.partial(jax.jit, static_argnums=(1, 2))
def _max_along(x: jax.Array, axis: int, stride: int) -> jax.Array:
    """Maximum of three neighbours along one axis; columns, then rows give the 3x3 maximum."""
    left, centre, right = _neighbours(x, axis, stride, -jnp.inf)
    return jnp.maximum(jnp.maximum(left, centre), right)


def _max_along_forward(x: jax.Array, axis: int, stride: int) -> tuple[jax.Array, jax.Array]:
    return _max_along(x, axis, stride), x


@functools.partial(jax.jit, static_argnums=(0, 1))
def _max_along_backward(
    axis: int, stride: int, x: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array]:
    """Give each cotangent to the first of its equal maxima, not a share to each."""
    left, centre, right = _neighbours(x, axis, stride, -jnp.inf)
    from_left = (left >= centre) & (left >= right)
    from_centre = ~from_left & (centre >= right)
    winners = (from_left, from_centre, ~from_left & ~from_centre)
    size = x.shape[axis]
    total = jnp.zeros_like(x)
    for offset, wins in zip((-1, 0, 1), winners, strict=True):
        share = _spread(jnp.where(wins, cotangent, 0), axis, stride, size)
        # The window's neighbour `offset` of centre i is pixel i + offset.
        shifted = lax.pad(share, jnp.zeros((), x.dtype), _along(axis, offset, -offset))
        total = total + shifted
    return (total,)


_max_along.defvjp(_max_along_forward, _max_along_backward)


def avg_pool(x: jax.Array, *, stride: int = 1, formulation: str = "auto") -> jax.Array:
    """3x3 average pooling, padding 1, each mean over the pixels inside the image only (DARTS)."""
    shares = jnp.asarray(_pool_shares(x.shape[1], x.shape[2], stride), x.dtype)
    if resolve_formulation(formulation) == "shifted":
        total = _pool_sum(x, stride)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _pool_sum(x: jax.Array, stride: int) -> jax.Array:
    for axis in (2, 1):
        x = functools.reduce(jnp.add, _neighbours(x, axis, stride, 0.0))
    return x


def _pool_sum_forward(x: jax.Array, stride: int) -> tuple[jax.Array, tuple[int, int]]:
    return _pool_sum(x, stride), (x.shape[1], x.shape[2])


def _pool_sum_backward(
    stride: int, size: tuple[int, int], cotangent: jax.Array
) -> tuple[jax.Array]:
    """A sum of neighbours is its own transpose once the stride is undone."""
    for axis, length in zip((1, 2), size, strict=True):
        cotangent = _spread(cotangent, axis, stride, length)
    return (_pool_sum(cotangent, 1),)


_pool_sum.defvjp(_pool_sum_forward, _pool_sum_backward)


@functools.partial(jax.jit, static_argnums=1)
def normalize(x: jax.Array, epsilon: float = BATCH_NORM_EPSILON) -> jax.Array:
    """Batch normalisation by the batch's own moments over N, H, W, without affine parameters.

    The variance is E[x^2] - E[x]^2 in one pass over the data, clamped at 0 against rounding.
    """
    mean = jnp.mean(x, axis=(0, 1, 2), keepdims=True)
    square = jnp.mean(x * x, axis=(0, 1, 2), keepdims=True)
    variance = jnp.maximum(square - mean * mean, 0)
    return (x - mean) * lax.rsqrt(variance + epsilon)
