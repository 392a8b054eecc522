"""Networks of published genotypes, and what they cost by arithmetic on the genotype alone."""

import dataclasses

import numpy as np

from cpnas_jax.architecture.named import named_genotype
from cpnas_jax.models.network import NetworkSettings


def edges_of(cell):
    return tuple((edge.source, edge.target, edge.operation) for edge in cell)


def settings_of(name, **fields):
    genotype = named_genotype(name)
    defaults = {"cells": 3, "channels": 4, "num_classes": 10}
    return NetworkSettings(
        edges_of(genotype.normal), edges_of(genotype.reduce), **{**defaults, **fields}
    )


@dataclasses.dataclass(frozen=True)
class Cost:
    """Counts of an image: parameters, then MACs."""

    bits: int = 0
    floats: int = 0
    binary_macs: int = 0
    depthwise_macs: int = 0
    float_macs: int = 0

    def __add__(self, other):
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(a + b for a, b in pairs))


def pointwise(inputs, outputs, pixels, child):
    weights = inputs * outputs
    if child:
        return Cost(bits=weights, binary_macs=weights * pixels)
    return Cost(floats=weights, float_macs=weights * pixels)


def norm(channels):
    return Cost(floats=2 * channels)


def unit(k, channels, pixels, child):
    weights = k * k * channels
    last = pointwise(channels, channels, pixels, child) + norm(channels)
    if child:
        return Cost(bits=weights, depthwise_macs=weights * pixels) + norm(channels) + last
    return Cost(floats=weights, float_macs=weights * pixels) + last


def operation_cost(name, channels, stride, size, settings):
    """Of an image of size x size and so many channels, which leave at size / stride."""
    child, pixels = settings.binary, (-(-size // stride)) ** 2
    if "pool" in name:
        return norm(channels) if settings.operations.normalize_pools else Cost()
    if name == "skip_connect" and stride == 2:
        return pointwise(channels, channels, pixels, child) + norm(channels)
    if name in ("none", "skip_connect"):
        return Cost()
    once = unit(int(name[-1]), channels, pixels, child)
    return once + once if name.startswith("sep") else once


def network_cost(settings, size):
    """Of square images of three channels, for any genotype, without levers."""
    c, child = settings.channels, settings.binary
    child_entry = child and settings.operations.binary_preprocess

    def stem_conv(inputs, outputs, size):
        weights = 9 * inputs * outputs
        return Cost(floats=weights, float_macs=weights * size**2) + norm(outputs)

    if settings.stem == "cifar":
        cost, before, last, sizes = stem_conv(3, 3 * c, size), 3 * c, 3 * c, (size, size)
    else:
        half, quarter, eighth = (int(np.ceil(size / 2**i)) for i in (1, 2, 3))
        cost = stem_conv(3, c // 2, half) + stem_conv(c // 2, c, quarter)
        cost += stem_conv(c, c, eighth)
        before, last, sizes = c, c, (quarter, eighth)
    for position in range(settings.cells):
        reduction = position in (settings.cells // 3, 2 * settings.cells // 3)
        c, size = c * (1 + reduction), sizes[1]
        # A larger first input is halved by its preprocessing, a 1x1 as well.
        for inputs in (before, last):
            cost += pointwise(inputs, c, size**2, child_entry) + norm(c)
        small = -(-size // 2) if reduction else size
        for source, _, name in settings.reduce if reduction else settings.normal:
            stride = 2 if reduction and source < 2 else 1
            cost += operation_cost(name, c, stride, size if source < 2 else small, settings)
        before, last, sizes = last, 4 * c, (size, small)
    weights = last * settings.num_classes
    return cost + Cost(floats=weights + settings.num_classes, float_macs=weights)
