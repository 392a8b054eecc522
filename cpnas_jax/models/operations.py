"""The eight candidate operations of an edge, and the fixed parts of a cell, as flax modules.

Every module is used through its pure `init` and `apply`, and is called with the input and with
`binary`: True for the child (1-bit weights and activations), False for the parent (float), or a
traced boolean where one compiled program is to serve both.

The order inside a convolution differs (method: figure 4.8 for the child, DARTS for the parent):
child   sign -> binary depthwise -> BN -> sign -> binary 1x1 -> BN
parent  ReLU -> depthwise -> 1x1 -> BN
"""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cpnas_jax.models import layers
from cpnas_jax.models.binarize import Binarizer, binarize_activations, binarize_weights
from cpnas_jax.models.space import OPERATIONS

Binary = bool | jax.Array
"""Whether a module acts as the child: static, or a traced boolean scalar."""


@dataclasses.dataclass(frozen=True)
class OperationSettings:
    """What all operations of a network share; hashable.

    Attributes:
        binarizer: how the child is binarized.
        formulation: `auto`, `native` or `shifted`, see `models.layers`.
        separable_repeats: how often `sep_conv` applies its unit: 2 as in DARTS, or 1 as figure 4.8
            draws it.
        binary_preprocess: whether the child's 1x1 preprocessing is 1-bit too.

    Raises:
        ValueError: a field is out of range.
    """

    binarizer: Binarizer = dataclasses.field(default_factory=Binarizer)
    formulation: str = "auto"
    separable_repeats: int = 2
    binary_preprocess: bool = True

    def __post_init__(self) -> None:
        layers.resolve_formulation(self.formulation)
        if self.separable_repeats not in (1, 2):
            raise ValueError(f"separable_repeats is {self.separable_repeats!r}; offered are 1, 2")


def _activate(x: jax.Array, binary: Binary, binarizer: Binarizer) -> jax.Array:
    if isinstance(binary, bool):
        return binarize_activations(x, binarizer) if binary else jax.nn.relu(x)
    return _selected_activation(x, binary, binarizer)


# The jitted helpers below are traced once for each shape, not once for each place of use.
@functools.partial(jax.jit, static_argnums=2)
def _selected_activation(x: jax.Array, binary: jax.Array, binarizer: Binarizer) -> jax.Array:
    # Both are elementwise and fuse into one pass; a `cond` would cost a copy.
    return jnp.where(binary, binarize_activations(x, binarizer), jax.nn.relu(x))


def _effective_kernel(
    kernel: jax.Array, binary: Binary, binarizer: Binarizer
) -> tuple[jax.Array, jax.Array]:
    """The kernel a convolution sees and the factor of its output, shape [1] or [channels]."""
    if not isinstance(binary, bool):
        return _selected_kernel(kernel, binary, binarizer)
    if binary:
        return binarize_weights(kernel, binarizer)
    return kernel, jnp.ones((1,), kernel.dtype)


@functools.partial(jax.jit, static_argnums=2)
def _selected_kernel(
    kernel: jax.Array, binary: jax.Array, binarizer: Binarizer
) -> tuple[jax.Array, jax.Array]:
    signs, scale = binarize_weights(kernel, binarizer)
    return jnp.where(binary, signs, kernel), jnp.where(binary, scale, jnp.ones_like(scale))


def _between_convolutions(x: jax.Array, binary: Binary, binarizer: Binarizer) -> jax.Array:
    """BN and sign in the child, nothing in the parent; only the one asked for is computed."""
    if not isinstance(binary, bool):
        return _selected_between(x, binary, binarizer)
    return binarize_activations(layers.normalize(x), binarizer) if binary else x


@functools.partial(jax.jit, static_argnums=2)
def _selected_between(x: jax.Array, binary: jax.Array, binarizer: Binarizer) -> jax.Array:
    def child(x: jax.Array) -> jax.Array:
        return binarize_activations(layers.normalize(x), binarizer)

    return lax.cond(binary, child, lambda x: x, x)


def _pad_value(binary: Binary, binarizer: Binarizer) -> jax.Array | float:
    if isinstance(binary, bool):
        return binarizer.pad_value if binary else 0.0
    return jnp.where(binary, jnp.float32(binarizer.pad_value), jnp.float32(0))


def _scaled(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * scale.reshape((1,) * (x.ndim - 1) + (-1,))


kernel_init = nn.initializers.he_normal()
"""Our choice: He et al. (2015) by fan-in, for the latent weights of the child as well."""

depthwise_init = nn.initializers.variance_scaling(
    2.0, "fan_in", "normal", in_axis=(0, 1), out_axis=2
)
"""The same for a depthwise kernel [k, k, C], whose fan-in is k * k."""


class Depthwise(nn.Module):
    """Depthwise convolution of an activated input, scaled in the child.

    f[N, H, W, C] to f[N, H', W', C].
    """

    kernel_size: int
    stride: int
    dilation: int
    settings: OperationSettings

    @nn.compact
    def __call__(self, x: jax.Array, binary: Binary) -> jax.Array:
        """Convolve x, which must already be activated (signs or ReLU)."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1])
        kernel = self.param("kernel", depthwise_init, shape)
        binarizer = self.settings.binarizer
        effective, scale = _effective_kernel(kernel, binary, binarizer)
        y = layers.depthwise_conv(
            x,
            effective,
            stride=self.stride,
            dilation=self.dilation,
            pad_value=_pad_value(binary, binarizer),
            formulation=self.settings.formulation,
        )
        return _scaled(y, scale)


class Pointwise(nn.Module):
    """1x1 convolution of an activated input, scaled in the child; `channels` outputs."""

    channels: int
    stride: int
    settings: OperationSettings

    @nn.compact
    def __call__(self, x: jax.Array, binary: Binary) -> jax.Array:
        """Convolve x, which must already be activated (signs or ReLU, or float in the parent)."""
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.channels))
        effective, scale = _effective_kernel(kernel, binary, self.settings.binarizer)
        y = layers.pointwise_conv(
            x, effective, stride=self.stride, formulation=self.settings.formulation
        )
        return _scaled(y, scale)


class SeparableUnit(nn.Module):
    """Depthwise k x k and 1x1 with the normalisations of child or parent (module docstring)."""

    kernel_size: int
    stride: int
    dilation: int
    settings: OperationSettings

    @nn.compact
    def __call__(self, x: jax.Array, binary: Binary) -> jax.Array:
        """f[N, H, W, C] to f[N, H', W', C]."""
        binarizer = self.settings.binarizer
        y = Depthwise(
            self.kernel_size, self.stride, self.dilation, self.settings, name="depthwise"
        )(_activate(x, binary, binarizer), binary)
        y = _between_convolutions(y, binary, binarizer)
        y = Pointwise(x.shape[-1], 1, self.settings, name="pointwise")(y, binary)
        return layers.normalize(y)


class SeparableConv(nn.Module):
    """`sep_conv_kxk`: the separable unit, repeated; the first repetition has the stride."""

    kernel_size: int
    stride: int
    settings: OperationSettings

    @nn.compact
    def __call__(self, x: jax.Array, binary: Binary) -> jax.Array:
        """f[N, H, W, C] to f[N, H', W', C]."""
        for repeat in range(self.settings.separable_repeats):
            stride = self.stride if repeat == 0 else 1
            x = SeparableUnit(self.kernel_size, stride, 1, self.settings, name=f"unit{repeat}")(
                x, binary
            )
        return x


class DilatedConv(nn.Module):
    """`dil_conv_kxk`: the separable unit once, with dilation 2."""

    kernel_size: int
    stride: int
    settings: OperationSettings

    @nn.compact
    def __call__(self, x: jax.Array, binary: Binary) -> jax.Array:
        """f[N, H, W, C] to f[N, H', W', C]."""
        return SeparableUnit(self.kernel_size, self.stride, 2, self.settings, name="unit0")(
            x, binary
        )


class Pool(nn.Module):
    """3x3 pooling and BN: the same in child and parent."""

    kind: str
    stride: int
    settings: OperationSettings

    @nn.compact
    def __call__(self, x: jax.Array, binary: Binary) -> jax.Array:
        """f[N, H, W, C] to f[N, H', W', C]."""
        del binary
        pool = layers.max_pool if self.kind == "max" else layers.avg_pool
        return layers.normalize(pool(x, stride=self.stride, formulation=self.settings.formulation))


class Identity(nn.Module):
    """`skip_connect` at stride 1."""

    @nn.compact
    def __call__(self, x: jax.Array, binary: Binary) -> jax.Array:
        """Return x."""
        del binary
        return x


class Zero(nn.Module):
    """`none`: zeros of the output's shape."""

    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, binary: Binary) -> jax.Array:
        """f[N, H, W, C] to zeros f[N, H', W', C]."""
        del binary
        return jnp.zeros_like(x[:, :: self.stride, :: self.stride])


class FactorizedReduce(nn.Module):
    """Halve the resolution by two 1x1 convolutions on pixels one step apart, then BN (DARTS)."""

    channels: int
    settings: OperationSettings

    @nn.compact
    def __call__(self, x: jax.Array, binary: Binary) -> jax.Array:
        """f[N, H, W, C] to f[N, ceil(H / 2), ceil(W / 2), channels]."""
        x = _activate(x, binary, self.settings.binarizer)
        odd = (x.shape[1] % 2, x.shape[2] % 2)
        value = jnp.asarray(_pad_value(binary, self.settings.binarizer), x.dtype)
        # At an odd size the shifted half lacks its last row or column: pad it there.
        shifted = lax.pad(
            x[:, 1:, 1:], value, ((0, 0, 0), (0, odd[0], 0), (0, odd[1], 0), (0, 0, 0))
        )
        half = self.channels // 2
        y = jnp.concatenate(
            [
                Pointwise(half, 2, self.settings, name="even")(x, binary),
                Pointwise(self.channels - half, 2, self.settings, name="odd")(shifted, binary),
            ],
            axis=-1,
        )
        return layers.normalize(y)


class Preprocess(nn.Module):
    """The fixed entry of a cell: activation, 1x1 convolution, BN; a factorized reduce where the
    input has twice the cell's resolution.
    """

    channels: int
    reduce: bool
    settings: OperationSettings

    @nn.compact
    def __call__(self, x: jax.Array, binary: Binary) -> jax.Array:
        """f[N, H, W, C] to f[N, H', W', channels]."""
        if not self.settings.binary_preprocess:
            binary = False
        if self.reduce:
            return FactorizedReduce(self.channels, self.settings, name="reduce")(x, binary)
        x = _activate(x, binary, self.settings.binarizer)
        return layers.normalize(Pointwise(self.channels, 1, self.settings, name="conv")(x, binary))


def make_operation(name: str, channels: int, stride: int, settings: OperationSettings) -> nn.Module:
    """Return the module of a candidate operation.

    Args:
        name: one of `OPERATIONS`.
        channels: channels of the cell, in and out.
        stride: 1, or 2 on the edges of a reduction cell that leave its inputs.
        settings: shared settings.

    Raises:
        ValueError: unknown name.
    """
    match name:
        case "none":
            return Zero(stride)
        case "max_pool_3x3":
            return Pool("max", stride, settings)
        case "avg_pool_3x3":
            return Pool("avg", stride, settings)
        case "skip_connect":
            return Identity() if stride == 1 else FactorizedReduce(channels, settings)
        case "sep_conv_3x3":
            return SeparableConv(3, stride, settings)
        case "sep_conv_5x5":
            return SeparableConv(5, stride, settings)
        case "dil_conv_3x3":
            return DilatedConv(3, stride, settings)
        case "dil_conv_5x5":
            return DilatedConv(5, stride, settings)
    raise ValueError(f"operation is {name!r}; offered are {OPERATIONS}")


def apply_module(module: nn.Module, params: Any, x: jax.Array, binary: Binary) -> jax.Array:
    """Apply one of these modules to its parameters: the pure form of `module(x, binary)`."""
    return cast(jax.Array, module.apply({"params": params}, x, binary))
