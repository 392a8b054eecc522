"""Depthwise convolution and pooling on NHWC arrays as sums over shifted slices, for CPUs.

XLA has no fast primitives for them there (measured: up to forty times slower inside a network).
Gradients are written out. Padding is as in `layers`.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_BATCH_PART = 8
"""Images, at most, that one sum of a kernel's gradient adds up. XLA:CPU unrolls a loop as short as
this and then computes many channels at once; with 16 or all images it took 1.5 to 10 times as
long."""


def pad_image(x: jax.Array, pad: int, value: jax.Array) -> jax.Array:
    """Surround images by a value, f[]."""
    return lax.pad(x, value, ((0, 0, 0), (pad, pad, 0), (pad, pad, 0), (0, 0, 0)))


def taps(x: jax.Array, k: int, stride: int, dilation: int, out: tuple[int, int]) -> list[jax.Array]:
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
def depthwise(
    x: jax.Array,
    kernel: jax.Array,
    pad_value: jax.Array,
    stride: int,
    dilation: int,
) -> jax.Array:
    """Return `layers.depthwise_conv`, where the arguments are explained."""
    # Jitted, like the gradient below, so that each shape is traced once in a whole network.
    k = kernel.shape[0]
    out = (math.ceil(x.shape[1] / stride), math.ceil(x.shape[2] / stride))
    padded = pad_image(x, dilation * (k // 2), pad_value)
    return _weighted_sum(taps(padded, k, stride, dilation, out), kernel)


def _depthwise_forward(
    x: jax.Array,
    kernel: jax.Array,
    pad_value: jax.Array,
    stride: int,
    dilation: int,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    residuals = (x, kernel, pad_value)
    return depthwise(*residuals, stride, dilation), residuals


def _depthwise_backward(
    stride: int,
    dilation: int,
    residuals: tuple[jax.Array, jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, kernel, pad_value = residuals
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

    windows = taps(pad_image(x, pad, pad_value), k, stride, dilation, out)
    kernel_gradient = lax.reshape(_kernel_gradient(windows, cotangent), (k, k, c))

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
        taps(spread, k, 1, dilation, (height, width)), lax.rev(kernel, (0, 1))
    )
    return x_gradient, kernel_gradient


depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _kernel_gradient(windows: list[jax.Array], cotangent: jax.Array) -> jax.Array:
    """Return sum over N, H, W of window * cotangent, f[taps, C]."""
    n = cotangent.shape[0]
    part = max(size for size in range(1, _BATCH_PART + 1) if n % size == 0)
    if part == 1:
        # All taps at once: the images are read once instead of k * k times. It keeps N, over which
        # XLA:CPU spreads it on the cores; N is summed last.
        return jnp.sum(jnp.stack(_reduce_products(windows, cotangent, (1, 2)), 1), axis=0)

    def in_parts(image: jax.Array) -> jax.Array:
        return lax.reshape(image, (part, n // part, *image.shape[1:]))

    # A row of taps at a time, summed over parts of the batch first.
    row = math.isqrt(len(windows))
    spread = in_parts(cotangent)
    sums: list[jax.Array] = []
    for first in range(0, len(windows), row):
        some = [in_parts(window) for window in windows[first : first + row]]
        sums += _reduce_products(some, spread, (0,))
    return jnp.stack([jnp.sum(image, axis=(0, 1, 2)) for image in sums])


def _reduce_products(
    windows: list[jax.Array], cotangent: jax.Array, axes: tuple[int, ...]
) -> list[jax.Array]:
    """Sum window * cotangent over some axes, for all windows in one pass."""
    return lax.reduce(
        tuple(lax.mul(window, cotangent) for window in windows),
        (np.zeros((), cotangent.dtype),) * len(windows),
        lambda a, b: tuple(map(lax.add, a, b)),
        axes,
    )


def max_pool(x: jax.Array, stride: int) -> jax.Array:
    """Return `layers.max_pool`: the largest of three columns, then of three rows."""
    for axis in (2, 1):
        x = _max_along(x, axis, stride)
    return x


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def pool_sum(x: jax.Array, stride: int) -> jax.Array:
    """Return the sum of each 3x3 window with the zeros around the image."""
    for axis in (2, 1):
        x = functools.reduce(jnp.add, _neighbours(x, axis, stride, 0.0))
    return x


def _pool_sum_forward(x: jax.Array, stride: int) -> tuple[jax.Array, tuple[int, int]]:
    return pool_sum(x, stride), (x.shape[1], x.shape[2])


def _pool_sum_backward(
    stride: int, size: tuple[int, int], cotangent: jax.Array
) -> tuple[jax.Array]:
    """A sum of neighbours is its own transpose once the stride is undone."""
    for axis, length in zip((1, 2), size, strict=True):
        cotangent = _spread(cotangent, axis, stride, length)
    return (pool_sum(cotangent, 1),)


pool_sum.defvjp(_pool_sum_forward, _pool_sum_backward)
