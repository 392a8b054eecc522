"""What a step of a shipped network can be, with the tensors that it needs.

Values between steps are either real, f32[N, H, W, C], or signs, one bit each. How a step
is computed is told by an engine (`packed`, `signed`).

| op | takes | gives | tensors |
|---|---|---|---|
| normalise | uint8 images | real | mean, std of pixels in [0, 1] |
| convolution | real | real | kernel f32[3, 3, C, D], zero padding 1 |
| pointwise | real | real | kernel f32[C, D] |
| depthwise | real | real | kernel f32[k, k, C], zero padding |
| affine | real | real | mean, factor, bias f32[C] |
| relu | real | real | |
| prelu | real | real | slope f32[C]; with shifts also shift, lift f32[C] |
| max_pool, avg_pool | real | real | 3x3, padding 1; means over the pixels inside |
| add, concat | real, several | real | |
| sign | real | signs | or scale, mean, factor, bias, threshold f32[C]; sign(0) = +1 |
| binary_depthwise | signs | signs | kernel bits[k, k, C], threshold int8[C], flip bits[C] |
| signed_depthwise | real | real | kernel bits[k, k, C], zero padding |
| binary_pointwise | signs | real | kernel bits[C, D], scale, mean, factor, bias f32[D] |
| mean | real | real, f32[N, C] | |
| dense | f32[N, C] | f32[N, D] | kernel f32[C, D], bias f32[D] |

`binary_depthwise` sums +-1 products to an integer D and gives (D >= threshold) != flip: the
normalisation and the sign that follow it. `binary_pointwise` normalises the integer P. To normalise
is (x * scale - mean) * factor + bias, less the threshold of a sign, as far as a step has them: in
the order of training, whose roundings may decide signs further on. Around an image signs are 0 (no
product) or +1, the network's `pad_value`.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Spec:
    """A tensor of a step.

    Attributes:
        kind: `bits`, `float32` or `int8`.
        shape: with a bit for each entry, where it has bits.
    """

    kind: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Return the number of entries."""
        size = 1
        for length in self.shape:
            size *= length
        return size


@dataclasses.dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        op: see the module.
        name: of its value.
        part: what its tensors are stored with: `stem`, `cells.<i>` or `classifier`.
        inputs: names of the values that it takes.
        shape: (height, width, channels) of its value; of vectors (1, 1, channels).
        tensors: field -> what it is.
        settings: numbers such as stride, dilation, kernel_size.
    """

    op: str
    name: str
    part: str
    inputs: tuple[str, ...]
    shape: tuple[int, int, int]
    tensors: Mapping[str, Spec] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, int] = dataclasses.field(default_factory=dict)
