"""Building blocks of the operations: activation, binary or float convolution, normalisation.

A block is called with `binary`: True for the child, False for the parent, or a traced boolean where
one compiled program is to serve both (the search's supernet; without levers and running averages).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cpnas_jax.models import layers
from cpnas_jax.models.binarize import Binarizer, binarize_activations, binarize_weights

Binary = bool | jax.Array
"""Whether a module acts as the child: static, or a traced boolean scalar."""

NORMALIZATIONS = ("batch", "train", "running")
"""`batch`: the batch's own moments, not affine (search). `train`, `running`: affine with running
averages, which `train` updates and `running` applies (final networks)."""

BATCH_NORM_MOMENTUM = 0.9
"""Of the running averages (PyTorch's default 0.1 says the same; DARTS)."""


@dataclasses.dataclass(frozen=True)
class Levers:
    """Additions that help 1-bit networks; of the child alone, hashable. None is the paper's.

    Attributes:
        residual: x + unit(x) over every separable unit at stride 1 (DCP-NAS' code).
        prelu: PReLU after the BN of a unit and of the preprocessing (DCP-NAS' code).
        first_norm: BN before the first sign of a unit and of the preprocessing (DCP-NAS' code).
        real_depthwise: depthwise convolutions see real activations, no signs (DCP-NAS' code).
        learnable_sign: sign(x - b) with a threshold a channel (RSign, ReActNet).
        learnable_prelu: PReLU(x - g) + z with shifts a channel, in place of PReLU (RPReLU,
            ReActNet).
    """

    residual: bool = False
    prelu: bool = False
    first_norm: bool = False
    real_depthwise: bool = False
    learnable_sign: bool = False
    learnable_prelu: bool = False

    def __bool__(self) -> bool:
        return any(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class OperationSettings:
    """What all operations of a network share; hashable.

    Attributes:
        binarizer: how the child is binarized.
        formulation: one of `layers.FORMULATIONS`.
        separable_repeats: how often `sep_conv` applies its unit: 2 as in DARTS, or 1 as figure 4.8
            draws it.
        binary_preprocess: whether the child's 1x1 preprocessing is 1-bit too.
        binary_weights: False leaves the child's weights real: the first part of two-step training.
        normalization: one of `NORMALIZATIONS`.
        normalize_pools: BN after pooling, as in the search; DARTS' final networks have none.
        levers: additions to the child.
        statistics: the devices over which batch statistics are taken; None: each device's own.

    Raises:
        ValueError: a field is out of range.
    """

    binarizer: Binarizer = dataclasses.field(default_factory=Binarizer)
    formulation: str = "auto"
    separable_repeats: int = 2
    binary_preprocess: bool = True
    binary_weights: bool = True
    normalization: str = "batch"
    normalize_pools: bool = True
    levers: Levers = dataclasses.field(default_factory=Levers)
    statistics: layers.StatisticsAxis | None = None

    def __post_init__(self) -> None:
        layers.resolve_formulation(self.formulation)
        if self.separable_repeats not in (1, 2):
            raise ValueError(f"separable_repeats is {self.separable_repeats!r}; offered are 1, 2")
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(
                f"normalization is {self.normalization!r}; offered are {NORMALIZATIONS}"
            )


def require_plain(settings: OperationSettings, binary: Binary) -> None:
    """Refuse a traced `binary` with what only one of child and parent has parameters for.

    Raises:
        ValueError: levers, running averages or real weights are asked for.
    """
    plain = not settings.levers and settings.binary_weights and settings.normalization == "batch"
    if not isinstance(binary, bool) and not plain:
        raise ValueError(
            "levers, running averages and real weights need a static choice of child or parent"
        )


class Norm(nn.Module):
    """Batch normalisation over N, H, W, as `settings.normalization` says; eps 1e-3."""

    settings: OperationSettings

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[N, H, W, C] to the same."""
        # Parameters are made on one device, outside of any axis.
        over = None if self.is_initializing() else self.settings.statistics
        if self.settings.normalization == "batch":
            return layers.normalize(x, over)
        return nn.BatchNorm(
            use_running_average=self.settings.normalization == "running",
            momentum=BATCH_NORM_MOMENTUM,
            epsilon=layers.BATCH_NORM_EPSILON,
            axis_name=over.name if over else None,
            axis_index_groups=over.groups if over else None,
            name="affine",
        )(x)


class Sign(nn.Module):
    """The child's activation: sign, with a learnable threshold where that lever is on."""

    settings: OperationSettings

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[N, H, W, C] to -1 and +1."""
        if self.settings.levers.learnable_sign:
            x = x - self.param("threshold", nn.initializers.zeros, (x.shape[-1],))[None, None, None]
        return binarize_activations(x, self.settings.binarizer)


class Activation(nn.Module):
    """What a unit begins with: sign in the child, ReLU in the parent.

    Attributes:
        settings: shared settings.
        real: the child passes real values on (the lever `real_depthwise`).
    """

    settings: OperationSettings
    real: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, binary: Binary) -> jax.Array:
        """f[N, H, W, C] to the same shape."""
        require_plain(self.settings, binary)
        if not isinstance(binary, bool):
            return _selected_activation(x, binary, self.settings.binarizer)
        if not binary:
            return jax.nn.relu(x)
        if self.settings.levers.first_norm:
            x = Norm(self.settings, name="norm")(x)
        return x if self.real else Sign(self.settings, name="sign")(x)


# The jitted helpers below are traced once for each shape, not once for each place of use.
@functools.partial(jax.jit, static_argnums=2)
def _selected_activation(x: jax.Array, binary: jax.Array, binarizer: Binarizer) -> jax.Array:
    # Both are elementwise and fuse into one pass; a `cond` would cost a copy.
    return jnp.where(binary, binarize_activations(x, binarizer), jax.nn.relu(x))


class Between(nn.Module):
    """What stands between depthwise and 1x1: BN and sign in the child, nothing in the parent."""

    settings: OperationSettings

    @nn.compact
    def __call__(self, x: jax.Array, binary: Binary) -> jax.Array:
        """f[N, H, W, C] to the same shape."""
        require_plain(self.settings, binary)
        if not isinstance(binary, bool):
            return _selected_between(x, binary, self.settings.binarizer, self.settings.statistics)
        if not binary:
            return x
        return Sign(self.settings, name="sign")(Norm(self.settings, name="norm")(x))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _selected_between(
    x: jax.Array, binary: jax.Array, binarizer: Binarizer, over: layers.StatisticsAxis | None
) -> jax.Array:
    def child(x: jax.Array) -> jax.Array:
        return binarize_activations(layers.normalize(x, over), binarizer)

    # Only the one asked for is computed.
    return lax.cond(binary, child, lambda x: x, x)


class Ending(nn.Module):
    """What a unit ends with: BN, and in the child the PReLU of a lever."""

    settings: OperationSettings

    @nn.compact
    def __call__(self, x: jax.Array, binary: Binary) -> jax.Array:
        """f[N, H, W, C] to the same shape."""
        x = Norm(self.settings, name="norm")(x)
        levers = self.settings.levers
        if binary is not True or not (levers.prelu or levers.learnable_prelu):
            return x

        def parameter(name: str, value: float) -> jax.Array:
            initial = nn.initializers.constant(value)
            return self.param(name, initial, (x.shape[-1],))[None, None, None]

        slope = parameter("slope", 0.25)
        if not levers.learnable_prelu:
            return jnp.where(x >= 0, x, slope * x)
        shifted = x - parameter("shift", 0.0)
        return jnp.where(shifted >= 0, shifted, slope * shifted) + parameter("lift", 0.0)


def effective_kernel(
    kernel: jax.Array, binary: Binary, settings: OperationSettings
) -> tuple[jax.Array, jax.Array]:
    """Return the kernel a convolution sees and the factor of its output, f[1] or f[channels]."""
    if not isinstance(binary, bool):
        return _selected_kernel(kernel, binary, settings.binarizer)
    if binary and settings.binary_weights:
        return binarize_weights(kernel, settings.binarizer)
    return kernel, jnp.ones((1,), kernel.dtype)


@functools.partial(jax.jit, static_argnums=2)
def _selected_kernel(
    kernel: jax.Array, binary: jax.Array, binarizer: Binarizer
) -> tuple[jax.Array, jax.Array]:
    signs, scale = binarize_weights(kernel, binarizer)
    return jnp.where(binary, signs, kernel), jnp.where(binary, scale, jnp.ones_like(scale))


def pad_value(binary: Binary, binarizer: Binarizer) -> jax.Array | float:
    """Return what surrounds an activated image: the child's own value, 0 in the parent."""
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
        effective, scale = effective_kernel(kernel, binary, self.settings)
        # Real activations are surrounded by zeros whatever surrounds signs.
        real = self.settings.levers.real_depthwise
        y = layers.depthwise_conv(
            x,
            effective,
            stride=self.stride,
            dilation=self.dilation,
            pad_value=0.0 if real else pad_value(binary, binarizer),
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
        effective, scale = effective_kernel(kernel, binary, self.settings)
        y = layers.pointwise_conv(
            x, effective, stride=self.stride, formulation=self.settings.formulation
        )
        return _scaled(y, scale)
