"""The float (parent) operations, cells and networks in plain PyTorch, for comparison.

Written from DARTS' description with torch.nn alone; nothing of the package is used. Modules carry
the names of the package's parameters, so that `torch_weights.py` can copy weights by name. All is
float64: what a comparison then sees is the error of the package alone.
"""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional

EPSILON, MOMENTUM = 1e-3, 0.1


def norm(channels, final):
    """BatchNorm2d of a final network: affine, running averages; in the search it has neither."""
    return nn.BatchNorm2d(channels, EPSILON, MOMENTUM, affine=final, track_running_stats=final)


class Unit(nn.Module):
    """ReLU, depthwise k x k, 1x1, BN."""

    def __init__(self, channels, k, stride, dilation, final):
        super().__init__()
        self.depthwise = nn.Conv2d(
            channels,
            channels,
            k,
            stride,
            padding=dilation * (k - 1) // 2,
            dilation=dilation,
            groups=channels,
            bias=False,
        )
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = norm(channels, final)

    def forward(self, x):
        return self.norm(self.pointwise(self.depthwise(functional.relu(x))))


class Convolution(nn.Sequential):
    """`sep_conv` is two units, the first with the stride; `dil_conv` is one with dilation 2."""

    def __init__(self, kind, channels, k, stride, final):
        super().__init__()
        if kind == "dil":
            self.add_module("unit0", Unit(channels, k, stride, 2, final))
        else:
            self.add_module("unit0", Unit(channels, k, stride, 1, final))
            self.add_module("unit1", Unit(channels, k, 1, 1, final))


class Pool(nn.Module):
    """3x3 pooling and BN; the average is over the pixels inside the image."""

    def __init__(self, kind, channels, stride, final):
        super().__init__()
        self.pool = (
            nn.MaxPool2d(3, stride, padding=1)
            if kind == "max"
            else nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
        )
        self.norm = norm(channels, final)

    def forward(self, x):
        return self.norm(self.pool(x))


class Zero(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        return 0 * x[:, :, :: self.stride, :: self.stride]


class FactorizedReduce(nn.Module):
    """ReLU, two 1x1 convolutions of stride 2 on images one pixel apart, BN.

    DARTS refuses odd sizes; zeros behind the last row and column are never seen at even ones.
    """

    def __init__(self, channels_in, channels, final):
        super().__init__()
        self.even = nn.Conv2d(channels_in, channels // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(channels_in, channels - channels // 2, 1, stride=2, bias=False)
        self.norm = norm(channels, final)

    def forward(self, x):
        x = functional.relu(x)
        shifted = functional.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        return self.norm(torch.cat([self.even(x), self.odd(shifted)], dim=1))


class ReluConv(nn.Module):
    """ReLU, 1x1 convolution, BN."""

    def __init__(self, channels_in, channels, final):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.norm = norm(channels, final)

    def forward(self, x):
        return self.norm(self.conv(functional.relu(x)))


def preprocess(channels_in, channels, reduce, final):
    """The entry of a cell, by a factorized reduce where its input is larger."""
    if reduce:
        return nn.Sequential(OrderedDict(reduce=FactorizedReduce(channels_in, channels, final)))
    return ReluConv(channels_in, channels, final)


def operation(name, channels, stride, final):
    """The module of one of the eight operations."""
    if name == "none":
        return Zero(stride)
    if name == "skip_connect":
        if stride == 1:
            return nn.Identity()
        return FactorizedReduce(channels, channels, final)
    kind = name[:3]
    if name.endswith("pool_3x3"):
        return Pool(kind, channels, stride, final)
    return Convolution(kind, channels, int(name[-1]), stride, final)


class Cell(nn.Module):
    """Nodes 2 to 5 are sums of their edges; the output is their concatenation.

    `edges` are (source, target, operation); `channels_in` those of the two inputs.
    """

    def __init__(self, edges, kind, channels_in, channels, reduce_first, final):
        super().__init__()
        self.preprocess0 = preprocess(channels_in[0], channels, reduce_first, final)
        self.preprocess1 = preprocess(channels_in[1], channels, False, final)
        self.edges = edges
        for source, target, name in edges:
            stride = 2 if kind == "reduce" and source in (0, 1) else 1
            module = operation(name, channels, stride, final)
            self.add_module(f"edge{source}_{target}", module)

    def forward(self, first, second):
        nodes = [self.preprocess0(first), self.preprocess1(second)]
        for node in (2, 3, 4, 5):
            incoming = [
                getattr(self, f"edge{source}_{target}")(nodes[source])
                for source, target, _ in self.edges
                if target == node
            ]
            nodes.append(torch.stack(incoming).sum(0))
        return torch.cat(nodes[2:], dim=1)


class Auxiliary(nn.Module):
    """DARTS' auxiliary head: average pool to 2x2 (5x5 at `pool_stride`), 1x1, 2x2, linear."""

    def __init__(self, channels_in, classes, pool_stride):
        super().__init__()
        self.pool = nn.AvgPool2d(5, pool_stride, padding=0, count_include_pad=False)
        self.conv0 = nn.Conv2d(channels_in, 128, 1, bias=False)
        self.norm0 = norm(128, True)
        self.conv1 = nn.Conv2d(128, 768, 2, bias=False)
        self.norm1 = norm(768, True)
        self.classifier = nn.Linear(768, classes)

    def forward(self, x):
        x = self.pool(functional.relu(x))
        x = functional.relu(self.norm0(self.conv0(x)))
        x = functional.relu(self.norm1(self.conv1(x)))
        return self.classifier(x.flatten(1))


class CifarStem(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv0 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.conv0_norm = norm(channels, True)

    def forward(self, x):
        y = self.conv0_norm(self.conv0(x))
        return y, y


class ImagenetStem(nn.Module):
    """Three convolutions of stride 2, ReLU between them."""

    def __init__(self, channels):
        super().__init__()
        widths = (3, channels // 2, channels, channels)
        for i in range(3):
            conv = nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1, bias=False)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"conv{i}_norm", norm(widths[i + 1], True))

    def forward(self, x):
        y = self.conv0_norm(self.conv0(x))
        first = self.conv1_norm(self.conv1(functional.relu(y)))
        return first, self.conv2_norm(self.conv2(functional.relu(first)))


class Network(nn.Module):
    """Stem, cells with reductions at 1/3 and 2/3, auxiliary head behind the latter, classifier."""

    def __init__(self, normal, reduce, cells, channels, classes):
        super().__init__()
        self.stem = CifarStem(3 * channels)
        self.cells = []
        inputs, reduce_first = (3 * channels, 3 * channels), False
        for i in range(cells):
            kind = "reduce" if i in (cells // 3, 2 * cells // 3) else "normal"
            channels *= 2 if kind == "reduce" else 1
            edges = reduce if kind == "reduce" else normal
            cell = Cell(edges, kind, inputs, channels, reduce_first, True)
            self.add_module(f"cells{i}", cell)
            self.cells.append(cell)
            inputs, reduce_first = (inputs[1], 4 * channels), kind == "reduce"
            if i == 2 * cells // 3:
                self.auxiliary = Auxiliary(4 * channels, classes, pool_stride=3)
        self.classifier = nn.Linear(4 * channels, classes)

    def forward(self, x):
        """Logits, auxiliary logits (None in eval mode) and the last feature map."""
        first, second = self.stem(x)
        auxiliary = None
        for i, cell in enumerate(self.cells):
            first, second = second, cell(first, second)
            if self.training and i == 2 * len(self.cells) // 3:
                auxiliary = self.auxiliary(second)
        return self.classifier(second.mean(dim=(2, 3))), auxiliary, second
