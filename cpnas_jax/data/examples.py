"""Examples as they live on a device."""

import chex
import flax


@flax.struct.dataclass
class Examples:
    """A part of a data set, or a batch of it.

    Attributes:
        images: uint8[n, H, W, C].
        labels: int32[n].
        mean: f32[C], of the training part, white is 1.
        std: f32[C].
    """

    images: chex.Array
    labels: chex.Array
    mean: chex.Array
    std: chex.Array
