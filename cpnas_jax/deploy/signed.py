"""The engine of accelerators: signs as numbers -1 and +1, products by the library's primitives.

Its sums are of whole numbers below 2^24, exact in float32 whatever their order.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cpnas_jax.deploy import real
from cpnas_jax.deploy.real import Tensors
from cpnas_jax.deploy.steps import Step

Sums = Callable[[Step, jax.Array, jax.Array, float], jax.Array]


def _numbers(signs: jax.Array | np.ndarray) -> jax.Array:
    return jnp.where(jnp.asarray(signs), jnp.float32(1), jnp.float32(-1))


def sign(step: Step, tensors: Tensors, x: jax.Array) -> jax.Array:
    """Take signs, of a multiple and an offset by channel where there are any."""
    if tensors:
        x = real.affine(step, tensors, x)
    return _numbers(x >= 0)


def pointwise_sums(step: Step, kernel: np.ndarray, x: jax.Array) -> jax.Array:
    """Return the sums of a 1x1 convolution, whole numbers f32[N, h, w, D]."""
    x = real.pixels(step, x)
    sums = jnp.dot(x.reshape(-1, x.shape[-1]), _numbers(kernel))
    return sums.reshape(*x.shape[:-1], -1)


def binary_pointwise(step: Step, tensors: Tensors, x: jax.Array, *, pad_value: int) -> jax.Array:
    """Convolve signs with a 1-bit 1x1 kernel, then multiply and add by channel."""
    kernel = tensors["kernel"]
    of_padding = pad_value * (2 * kernel.sum(axis=0) - kernel.shape[0]).astype(np.float32)
    sums = pointwise_sums(step, kernel, x)
    sums = real.fill(step, sums, jnp.asarray(of_padding)[None, None, None])
    return real.affine(step, tensors, sums)


def _binary_depthwise(sums_of: Sums) -> Callable[..., jax.Array]:
    def binary_depthwise(
        step: Step, tensors: Tensors, x: jax.Array, *, pad_value: int
    ) -> jax.Array:
        """Convolve signs with a 1-bit depthwise kernel; give whether the sums reach thresholds."""
        sums = sums_of(step, _numbers(tensors["kernel"]), x, float(pad_value))
        reached = sums >= real.per_channel(tensors["threshold"])
        return _numbers(reached != jnp.asarray(tensors["flip"])[None, None, None])

    return binary_depthwise


def _signed_depthwise(sums_of: Sums) -> Callable[..., jax.Array]:
    def signed_depthwise(step: Step, tensors: Tensors, x: jax.Array) -> jax.Array:
        """Convolve real values with a kernel of -1 and +1."""
        return sums_of(step, _numbers(tensors["kernel"]), x, 0.0)

    return signed_depthwise


def _depthwise(sums_of: Sums) -> Callable[..., jax.Array]:
    def depthwise(step: Step, tensors: Tensors, x: jax.Array) -> jax.Array:
        """Convolve real values with a real depthwise kernel."""
        return sums_of(step, jnp.asarray(tensors["kernel"]), x, 0.0)

    return depthwise


def _steps(sums_of: Sums) -> dict[str, Callable[..., jax.Array]]:
    return {
        **real.COMMON,
        "depthwise": _depthwise(sums_of),
        "signed_depthwise": _signed_depthwise(sums_of),
        "sign": sign,
        "binary_depthwise": _binary_depthwise(sums_of),
        "binary_pointwise": binary_pointwise,
    }


STEPS = {
    **_steps(real.depthwise_sums),
    "convolution": real.convolution,
    "max_pool": real.max_pool,
    "avg_pool": real.avg_pool,
}

ON_CPU = {
    **_steps(real.shifted_depthwise_sums),
    "convolution": real.shifted_convolution,
    "max_pool": real.shifted_max_pool,
    "avg_pool": real.shifted_avg_pool,
}
"""The same in the formulation that CPUs run best, for comparison with `packed`."""
