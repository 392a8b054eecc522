"""The eight candidate operations of an edge, and the fixed parts of a cell, as flax modules.

Every module is used through its pure `init` and `apply`, and is called with the input and with
`binary`: True for the child (1-bit weights and activations), False for the parent (float), or a
traced boolean where one compiled program is to serve both.

The order inside a convolution differs (method: figure 4.8 for the child, DARTS for the parent):
child   sign -> binary depthwise -> BN -> sign -> binary 1x1 -> BN
parent  ReLU -> depthwise -> 1x1 -> BN
The child's levers (`blocks.Levers`) add to that order.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cpnas_jax.models import layers
from cpnas_jax.models.blocks import (
    Activation,
    Between,
    Binary,
    Depthwise,
    Ending,
    Norm,
    OperationSettings,
    Pointwise,
    pad_value,
)
from cpnas_jax.models.space import OPERATIONS


class SeparableUnit(nn.Module):
    """Depthwise k x k and 1x1 with the normalisations of child or parent (module docstring)."""

    kernel_size: int
    stride: int
    dilation: int
    settings: OperationSettings

    @nn.compact
    def __call__(self, x: jax.Array, binary: Binary) -> jax.Array:
        """f[N, H, W, C] to f[N, H', W', C]."""
        settings, levers = self.settings, self.settings.levers
        y = Activation(settings, levers.real_depthwise, name="activation")(x, binary)
        y = Depthwise(self.kernel_size, self.stride, self.dilation, settings, name="depthwise")(
            y, binary
        )
        y = Between(settings, name="between")(y, binary)
        y = Pointwise(x.shape[-1], 1, settings, name="pointwise")(y, binary)
        y = Ending(settings, name="ending")(y, binary)
        return x + y if binary is True and levers.residual and self.stride == 1 else y


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
        y = pool(x, stride=self.stride, formulation=self.settings.formulation)
        return Norm(self.settings, name="norm")(y) if self.settings.normalize_pools else y


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
        x = Activation(self.settings, name="activation")(x, binary)
        odd = (x.shape[1] % 2, x.shape[2] % 2)
        value = jnp.asarray(pad_value(binary, self.settings.binarizer), x.dtype)
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
        return Ending(self.settings, name="ending")(y, binary)


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
        x = Activation(self.settings, name="activation")(x, binary)
        y = Pointwise(self.channels, 1, self.settings, name="conv")(x, binary)
        return Ending(self.settings, name="ending")(y, binary)


def make_operation(
    operation: str,
    channels: int,
    stride: int,
    settings: OperationSettings,
    name: str | None = None,
) -> nn.Module:
    """Return the module of a candidate operation.

    Args:
        operation: one of `OPERATIONS`.
        channels: channels of the cell, in and out.
        stride: 1, or 2 on the edges of a reduction cell that leave its inputs.
        settings: shared settings.
        name: of the module inside another one.

    Raises:
        ValueError: unknown operation.
    """
    match operation:
        case "none":
            return Zero(stride, name=name)
        case "max_pool_3x3":
            return Pool("max", stride, settings, name=name)
        case "avg_pool_3x3":
            return Pool("avg", stride, settings, name=name)
        case "skip_connect":
            if stride == 1:
                return Identity(name=name)
            return FactorizedReduce(channels, settings, name=name)
        case "sep_conv_3x3":
            return SeparableConv(3, stride, settings, name=name)
        case "sep_conv_5x5":
            return SeparableConv(5, stride, settings, name=name)
        case "dil_conv_3x3":
            return DilatedConv(3, stride, settings, name=name)
        case "dil_conv_5x5":
            return DilatedConv(5, stride, settings, name=name)
    raise ValueError(f"operation is {operation!r}; offered are {OPERATIONS}")


def apply_module(module: nn.Module, params: Any, x: jax.Array, binary: Binary) -> jax.Array:
    """Apply one of these modules to its parameters: the pure form of `module(x, binary)`."""
    return cast(jax.Array, module.apply({"params": params}, x, binary))
