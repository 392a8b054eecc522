"""Steps on real values, f32[N, H, W, C], that do not depend on what signs are held in.

`shifted` steps are sums over shifted slices, what CPUs run best; the others are the library's own
primitives, for accelerators.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cpnas_jax.deploy.steps import Step

Tensors = Mapping[str, np.ndarray]
RealStep = Callable[..., jax.Array]

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def per_channel(tensor: np.ndarray) -> jax.Array:
    """Return f32[C] as f32[1, 1, 1, C]."""
    return jnp.asarray(tensor, jnp.float32)[None, None, None]


def normalise(step: Step, tensors: Tensors, images: jax.Array) -> jax.Array:
    """Scale uint8 pixels to [0, 1], then centre and scale each channel."""
    del step
    scaled = images.astype(jnp.float32) / 255
    return (scaled - per_channel(tensors["mean"])) / per_channel(tensors["std"])


def affine(step: Step, tensors: Tensors, x: jax.Array) -> jax.Array:
    """Scale, normalise and shift by channel, as far as there are tensors for it.

    In the order of training: numbers that are equal but for rounding have other signs further on.
    """
    del step
    if "scale" in tensors:
        x = x * per_channel(tensors["scale"])
    if "factor" in tensors:
        centred = x - per_channel(tensors["mean"])
        x = centred * per_channel(tensors["factor"]) + per_channel(tensors["bias"])
    if "threshold" in tensors:
        x = x - per_channel(tensors["threshold"])
    return x


def relu(step: Step, tensors: Tensors, x: jax.Array) -> jax.Array:
    """Set what is negative to 0."""
    del step, tensors
    return jax.nn.relu(x)


def prelu(step: Step, tensors: Tensors, x: jax.Array) -> jax.Array:
    """Scale what is negative, shifted before and lifted after where there are shifts."""
    del step
    slope = per_channel(tensors["slope"])
    if "shift" not in tensors:
        return jnp.where(x >= 0, x, slope * x)
    shifted = x - per_channel(tensors["shift"])
    return jnp.where(shifted >= 0, shifted, slope * shifted) + per_channel(tensors["lift"])


def add(step: Step, tensors: Tensors, *terms: jax.Array) -> jax.Array:
    """Sum values, from the first on."""
    del step, tensors
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def concat(step: Step, tensors: Tensors, *parts: jax.Array) -> jax.Array:
    """Lay channels side by side."""
    del step, tensors
    return jnp.concatenate(parts, axis=-1)


def mean(step: Step, tensors: Tensors, x: jax.Array) -> jax.Array:
    """Average over the pixels: f32[N, C]."""
    del step, tensors
    return jnp.mean(x, axis=(1, 2))


def dense(step: Step, tensors: Tensors, x: jax.Array) -> jax.Array:
    """Multiply f32[N, C] by a matrix and add a bias."""
    del step
    return jnp.dot(x, jnp.asarray(tensors["kernel"])) + jnp.asarray(tensors["bias"])[None]


def pixels(step: Step, x: jax.Array) -> jax.Array:
    """Return the pixels that a 1x1 convolution reads: every `stride`-th, from `shift` on.

    At an odd size the shifted ones lack a last row or column; `fill` adds it.
    """
    shift, stride = step.settings["shift"], step.settings["stride"]
    return x[:, shift::stride, shift::stride]


def fill(step: Step, sums: jax.Array, value: jax.Array | float) -> jax.Array:
    """Give f[N, h, w, D] the rows and columns of the step's shape, with what they sum up to."""
    missing = [step.shape[axis] - sums.shape[axis + 1] for axis in (0, 1)]
    if not any(missing):
        return sums
    padding = [(0, 0), (0, missing[0]), (0, missing[1])]
    if not isinstance(value, jax.Array):
        return jnp.pad(sums, [*padding, (0, 0)], constant_values=value)
    rest = jnp.broadcast_to(value, (*sums.shape[:1], *step.shape[:2], sums.shape[-1]))
    return rest.at[:, : sums.shape[1], : sums.shape[2]].set(sums)


def pointwise(step: Step, tensors: Tensors, x: jax.Array) -> jax.Array:
    """Convolve with a real 1x1 kernel."""
    x = pixels(step, x)
    sums = jnp.dot(x.reshape(-1, x.shape[-1]), jnp.asarray(tensors["kernel"]))
    return fill(step, sums.reshape(*x.shape[:-1], -1), 0.0)


def taps(x: jax.Array, step: Step, value: float, size: int, dilation: int) -> list[jax.Array]:
    """Return the shifted slices of an image that a k x k window sees, in reading order.

    Args:
        x: [N, H, W, ...].
        step: gives stride and output size.
        value: around the image, dilation * (k // 2) wide.
        size: k.
        dilation: distance of the taps.
    """
    pad, stride = dilation * (size // 2), step.settings.get("stride", 1)
    height, width, _ = step.shape
    rest = [(0, 0)] * (x.ndim - 3)
    padded = jnp.pad(x, [(0, 0), (pad, pad), (pad, pad), *rest], constant_values=value)
    return [
        padded[
            :,
            dilation * row : dilation * row + stride * (height - 1) + 1 : stride,
            dilation * column : dilation * column + stride * (width - 1) + 1 : stride,
        ]
        for row in range(size)
        for column in range(size)
    ]


def shifted_convolution(step: Step, tensors: Tensors, x: jax.Array) -> jax.Array:
    """Convolve 3x3: the nine shifted images side by side, times a matrix."""
    kernel = jnp.asarray(tensors["kernel"])
    patches = jnp.concatenate(taps(x, step, 0.0, 3, 1), axis=-1)
    sums = jnp.dot(patches.reshape(-1, patches.shape[-1]), kernel.reshape(-1, kernel.shape[-1]))
    return sums.reshape(-1, *step.shape)


def convolution(step: Step, tensors: Tensors, x: jax.Array) -> jax.Array:
    """Convolve 3x3 by the library's primitive."""
    stride = step.settings["stride"]
    return lax.conv_general_dilated(
        x,
        jnp.asarray(tensors["kernel"]),
        (stride, stride),
        ((1, 1), (1, 1)),
        dimension_numbers=_DIMENSIONS,
    )


def depthwise_sums(step: Step, kernel: jax.Array, x: jax.Array, value: float) -> jax.Array:
    """Convolve every channel by the library's primitive; `value` surrounds the image."""
    stride, dilation = step.settings["stride"], step.settings["dilation"]
    pad = dilation * (step.settings["kernel_size"] // 2)
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=value)
    return lax.conv_general_dilated(
        padded,
        kernel[:, :, None, :],
        (stride, stride),
        "VALID",
        rhs_dilation=(dilation, dilation),
        dimension_numbers=_DIMENSIONS,
        feature_group_count=x.shape[-1],
    )


def shifted_depthwise_sums(step: Step, kernel: jax.Array, x: jax.Array, value: float) -> jax.Array:
    """Convolve every channel by shifted slices; `value` surrounds the image."""
    size = step.settings["kernel_size"]
    weights = kernel.reshape(size * size, 1, 1, 1, -1)
    slices = taps(x, step, value, size, step.settings["dilation"])
    total = slices[0] * weights[0]
    for tap, weight in zip(slices[1:], weights[1:], strict=True):
        total = total + tap * weight
    return total


def shifted_max_pool(step: Step, tensors: Tensors, x: jax.Array) -> jax.Array:
    """Take the largest of 3x3 pixels, rows first."""
    del tensors
    stride = step.settings["stride"]
    height, width, _ = step.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    rows = [padded[:, i : i + stride * (height - 1) + 1 : stride] for i in range(3)]
    tall = jnp.maximum(jnp.maximum(rows[0], rows[1]), rows[2])
    columns = [tall[:, :, i : i + stride * (width - 1) + 1 : stride] for i in range(3)]
    return jnp.maximum(jnp.maximum(columns[0], columns[1]), columns[2])


def shifted_avg_pool(step: Step, tensors: Tensors, x: jax.Array) -> jax.Array:
    """Average over the pixels of 3x3 that are inside the image, rows first."""
    del tensors
    stride = step.settings["stride"]
    height, width, _ = step.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = [padded[:, i : i + stride * (height - 1) + 1 : stride] for i in range(3)]
    tall = rows[0] + rows[1] + rows[2]
    columns = [tall[:, :, i : i + stride * (width - 1) + 1 : stride] for i in range(3)]
    return (columns[0] + columns[1] + columns[2]) * _shares(x, stride)


def max_pool(step: Step, tensors: Tensors, x: jax.Array) -> jax.Array:
    """Take the largest of 3x3 pixels by the library's primitive."""
    del tensors
    return _window(x, step.settings["stride"], np.float32(-np.inf), lax.max)


def avg_pool(step: Step, tensors: Tensors, x: jax.Array) -> jax.Array:
    """Average over the pixels of 3x3 that are inside the image."""
    del tensors
    stride = step.settings["stride"]
    return _window(x, stride, np.float32(0), lax.add) * _shares(x, stride)


def _window(
    x: jax.Array, stride: int, start: np.float32, reduce: Callable[..., jax.Array]
) -> jax.Array:
    return lax.reduce_window(
        x,
        start,
        reduce,
        (1, 3, 3, 1),
        (1, stride, stride, 1),
        ((0, 0), (1, 1), (1, 1), (0, 0)),
    )


def _shares(x: jax.Array, stride: int) -> np.ndarray:
    """Return 1 / the pixels of each window inside the image, f32[1, H', W', 1]."""

    def counts(size: int) -> np.ndarray:
        centres = np.arange(0, size, stride)
        return 1 + (centres > 0) + (centres < size - 1)

    product = counts(x.shape[1])[None, :, None, None] * counts(x.shape[2])[None, None, :, None]
    return (1.0 / product).astype(np.float32)


COMMON: dict[str, RealStep] = {
    "normalise": normalise,
    "affine": affine,
    "relu": relu,
    "prelu": prelu,
    "add": add,
    "concat": concat,
    "mean": mean,
    "dense": dense,
    "pointwise": pointwise,
}
"""Steps that every engine takes the same way."""
