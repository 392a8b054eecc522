"""What decides the steps of a shipped network, and the flat list of them that follows."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cpnas_jax.deploy.steps import Spec, Step

NUM_NODES = 6
"""Nodes of a cell: two inputs, four that are summed up and concatenated to its output."""

_NORM = ("mean", "factor", "bias")
"""Tensors of a normalisation by running averages."""


@dataclasses.dataclass(frozen=True)
class CellShape:
    """A cell of the network.

    Attributes:
        kind: `normal` or `reduce`.
        channels: of its nodes.
        halve_first: whether its first input has twice the resolution of the second.
    """

    kind: str
    channels: int
    halve_first: bool


Edges = tuple[tuple[int, int, str], ...]
"""(source, target, operation) of a cell's edges."""


@dataclasses.dataclass(frozen=True)
class Structure:
    """All that decides the steps of a network.

    Attributes:
        binary: a 1-bit child, or its float parent.
        image: (height, width, channels) of its images.
        num_classes: of its answer.
        stem: `cifar`, a convolution, or `imagenet`, three of stride 2.
        stem_channels: of the stem's outputs.
        cells: first to last.
        normal: edges of normal cells.
        reduce: edges of reduction cells.
        separable_repeats: units of a `sep_conv`.
        binary_preprocess: whether cells are entered through 1-bit convolutions.
        normalize_pools: whether a pooling is normalised.
        pad_value: what surrounds signs, 0 or 1.
        levers: the levers that are on, of a child.
    """

    binary: bool
    image: tuple[int, int, int]
    num_classes: int
    stem: str
    stem_channels: int
    cells: tuple[CellShape, ...]
    normal: Edges
    reduce: Edges
    separable_repeats: int
    binary_preprocess: bool
    normalize_pools: bool
    pad_value: int
    levers: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Structure":
        """Read what `to_dict` gave.

        Raises:
            ValueError, TypeError, KeyError: it is damaged.
        """

        def edges(own: Sequence[Sequence[Any]]) -> Edges:
            return tuple((int(source), int(target), str(name)) for source, target, name in own)

        height, width, channels = stored["image"]
        return cls(
            **{
                **stored,
                "image": (int(height), int(width), int(channels)),
                "cells": tuple(CellShape(**cell) for cell in stored["cells"]),
                "normal": edges(stored["normal"]),
                "reduce": edges(stored["reduce"]),
                "levers": tuple(stored["levers"]),
            }
        )


def steps(structure: Structure) -> tuple[Step, ...]:
    """Return the steps of a network; the first takes `images`, the last gives the logits.

    Raises:
        ValueError: an operation, a stem or an edge that does not exist.
    """
    builder = _Builder(structure)
    builder.network()
    return tuple(builder.steps)


class _Builder:
    """Adds step after step."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.steps: list[Step] = []
        self.part = "stem"
        self._shapes: dict[str, tuple[int, int, int]] = {"images": structure.image}
        # Signs without tensors are the same for all that take them.
        self._plain_signs: dict[str, str] = {}

    def add(
        self,
        op: str,
        name: str,
        inputs: str | Sequence[str],
        *,
        channels: int = 0,
        tensors: Mapping[str, Spec] | None = None,
        **settings: int,
    ) -> str:
        """Add a step and return the name of its value."""
        names = (inputs,) if isinstance(inputs, str) else tuple(inputs)
        height, width, own = self._shapes[names[0]]
        if op in ("mean", "dense"):
            height = width = 1
        stride = settings.get("stride", 1)
        if op == "concat":
            own = sum(self._shapes[value][2] for value in names)
        shape = (-(-height // stride), -(-width // stride), channels or own)
        step = Step(op, name, self.part, names, shape, dict(tensors or {}), settings)
        self.steps.append(step)
        self._shapes[name] = shape
        return name

    def channels(self, value: str) -> int:
        """Return the channels of a value."""
        return self._shapes[value][2]

    def per_channel(self, value: str, *fields: str) -> dict[str, Spec]:
        """Return tensors of a number for each channel of a value."""
        return {field: Spec("float32", (self.channels(value),)) for field in fields}

    def affine(self, name: str, value: str) -> str:
        """Normalise by running averages."""
        tensors = self.per_channel(value, *_NORM)
        return self.add("affine", name, value, tensors=tensors)

    def has(self, lever: str) -> bool:
        """Tell whether a lever is on."""
        return lever in self.structure.levers

    def network(self) -> None:
        """Add all steps."""
        structure = self.structure
        image = self.per_channel("images", "mean", "std")
        value = self.add("normalise", "normalised", "images", tensors=image)
        last_two = self.stem(value)
        for number, cell in enumerate(structure.cells):
            self.part = f"cells.{number}"
            last_two = last_two[1], self.cell(cell, f"cells.{number}", last_two)
        self.part = "classifier"
        pooled = self.add("mean", "pooled", last_two[1])
        kernel = Spec("float32", (self.channels(pooled), structure.num_classes))
        tensors = {"kernel": kernel, "bias": Spec("float32", (structure.num_classes,))}
        self.add("dense", "logits", pooled, channels=structure.num_classes, tensors=tensors)

    def stem(self, value: str) -> tuple[str, str]:
        """Add the stem; return the inputs of the first cell."""
        channels = self.structure.stem_channels

        def convolved(name: str, value: str, channels: int, stride: int) -> str:
            kernel = Spec("float32", (3, 3, self.channels(value), channels))
            y = self.add(
                "convolution",
                f"stem.{name}",
                value,
                channels=channels,
                tensors={"kernel": kernel},
                stride=stride,
            )
            return self.affine(f"stem.{name}_norm", y)

        match self.structure.stem:
            case "cifar":
                value = convolved("conv0", value, channels, 1)
                return value, value
            case "imagenet":
                value = convolved("conv0", value, channels // 2, 2)
                value = self.add("relu", "stem.relu0", value)
                first = convolved("conv1", value, channels, 2)
                value = self.add("relu", "stem.relu1", first)
                return first, convolved("conv2", value, channels, 2)
        raise ValueError(f"stem is {self.structure.stem!r}; known are cifar, imagenet")

    def cell(self, cell: CellShape, name: str, inputs: tuple[str, str]) -> str:
        """Add a cell; return its output."""
        nodes = [
            self.preprocess(
                f"{name}.preprocess{i}", value, cell.channels, i == 0 and cell.halve_first
            )
            for i, value in enumerate(inputs)
        ]
        edges = self.structure.reduce if cell.kind == "reduce" else self.structure.normal
        for target in range(len(inputs), NUM_NODES):
            terms = []
            for source, node, operation in edges:
                if node != target or operation == "none":
                    continue
                if not 0 <= source < target:
                    raise ValueError(f"a {cell.kind} cell has no edge {source}->{target}")
                stride = 2 if cell.kind == "reduce" and source < len(inputs) else 1
                edge = f"{name}.edge{source}_{target}"
                terms.append(self.operation(operation, edge, nodes[source], stride))
            if not terms:
                raise ValueError(f"node {target} of the {cell.kind} cell has no input")
            total = self.add("add", f"{name}.node{target}", terms) if terms[1:] else terms[0]
            nodes.append(total)
        return self.add("concat", name, nodes[len(inputs) :])

    def operation(self, operation: str, name: str, value: str, stride: int) -> str:
        """Add an operation of an edge."""
        channels = self.channels(value)
        match operation:
            case "max_pool_3x3" | "avg_pool_3x3":
                y = self.add(operation.removesuffix("_3x3"), name, value, stride=stride)
                return self.affine(f"{name}.norm", y) if self.structure.normalize_pools else y
            case "skip_connect":
                if stride == 1:
                    return value
                return self.factorized(name, value, channels, binary=self.structure.binary)
            case "sep_conv_3x3" | "sep_conv_5x5":
                size = int(operation[-1])
                for unit in range(self.structure.separable_repeats):
                    own = stride if unit == 0 else 1
                    value = self.unit(f"{name}.unit{unit}", value, size, own, dilation=1)
                return value
            case "dil_conv_3x3" | "dil_conv_5x5":
                return self.unit(f"{name}.unit0", value, int(operation[-1]), stride, dilation=2)
        raise ValueError(f"operation {operation!r} does not exist")

    def sign(self, name: str, value: str, *, norm: bool) -> str:
        """Add a sign, after a normalisation or a threshold of its own where it has one."""
        if norm or self.has("learnable_sign"):
            fields = [
                *(["scale"] if name.endswith(".between") else []),
                *(_NORM if norm else []),
                *(["threshold"] if self.has("learnable_sign") else []),
            ]
            tensors = self.per_channel(value, *fields)
            return self.add("sign", name, value, tensors=tensors)
        if value not in self._plain_signs:
            self._plain_signs[value] = self.add("sign", name, value)
        return self._plain_signs[value]

    def unit(self, name: str, value: str, size: int, stride: int, dilation: int) -> str:
        """Add a separable unit of child or parent."""
        form = {"stride": stride, "dilation": dilation, "kernel_size": size}
        channels = self.channels(value)
        shape = (size, size, channels)
        if not self.structure.binary:
            y = self.add("relu", f"{name}.activation", value)
            kernel = {"kernel": Spec("float32", shape)}
            y = self.add("depthwise", f"{name}.depthwise", y, tensors=kernel, **form)
            return self.affine(f"{name}.ending", self.pointwise(f"{name}.pointwise", y, channels))
        kernel = {"kernel": Spec("bits", shape)}
        if self.has("real_depthwise"):
            y = self.affine(f"{name}.activation", value) if self.has("first_norm") else value
            y = self.add("signed_depthwise", f"{name}.depthwise", y, tensors=kernel, **form)
            y = self.sign(f"{name}.between", y, norm=True)
        else:
            y = self.sign(f"{name}.activation", value, norm=self.has("first_norm"))
            ending = {"threshold": Spec("int8", (channels,)), "flip": Spec("bits", (channels,))}
            y = self.add(
                "binary_depthwise", f"{name}.depthwise", y, tensors={**kernel, **ending}, **form
            )
        y = self.binary_pointwise(f"{name}.pointwise", y, channels)
        y = self.prelu(f"{name}.ending", y)
        if self.has("residual") and stride == 1:
            return self.add("add", name, (value, y))
        return y

    def pointwise(
        self, name: str, value: str, channels: int, stride: int = 1, shift: int = 0
    ) -> str:
        """Add a real 1x1 convolution."""
        kernel = {"kernel": Spec("float32", (self.channels(value), channels))}
        return self.add(
            "pointwise",
            name,
            value,
            channels=channels,
            tensors=kernel,
            stride=stride,
            shift=shift,
        )

    def binary_pointwise(
        self, name: str, value: str, channels: int, stride: int = 1, shift: int = 0
    ) -> str:
        """Add a 1-bit 1x1 convolution with its scale and normalisation."""
        tensors = {
            "kernel": Spec("bits", (self.channels(value), channels)),
            **{field: Spec("float32", (channels,)) for field in ("scale", *_NORM)},
        }
        return self.add(
            "binary_pointwise",
            name,
            value,
            channels=channels,
            tensors=tensors,
            stride=stride,
            shift=shift,
        )

    def prelu(self, name: str, value: str) -> str:
        """Add the PReLU of a lever, if one is on."""
        if self.has("learnable_prelu"):
            tensors = self.per_channel(value, "slope", "shift", "lift")
        elif self.has("prelu"):
            tensors = self.per_channel(value, "slope")
        else:
            return value
        return self.add("prelu", name, value, tensors=tensors)

    def factorized(self, name: str, value: str, channels: int, *, binary: bool) -> str:
        """Add a factorized reduce: two 1x1 convolutions at stride 2, a pixel apart."""
        half = channels // 2
        parts = (("even", half, 0), ("odd", channels - half, 1))
        if not binary:
            y = self.add("relu", f"{name}.activation", value)
            halves = [
                self.pointwise(f"{name}.{own}", y, width, stride=2, shift=shift)
                for own, width, shift in parts
            ]
            return self.affine(f"{name}.ending", self.add("concat", f"{name}.halves", halves))
        y = self.sign(f"{name}.activation", value, norm=self.has("first_norm"))
        halves = [
            self.binary_pointwise(f"{name}.{own}", y, width, 2, shift)
            for own, width, shift in parts
        ]
        return self.prelu(f"{name}.ending", self.add("concat", f"{name}.halves", halves))

    def preprocess(self, name: str, value: str, channels: int, halve: bool) -> str:
        """Add the entry of a cell."""
        binary = self.structure.binary and self.structure.binary_preprocess
        if halve:
            return self.factorized(f"{name}.reduce", value, channels, binary=binary)
        if not binary:
            y = self.add("relu", f"{name}.activation", value)
            return self.affine(f"{name}.ending", self.pointwise(f"{name}.conv", y, channels))
        y = self.sign(f"{name}.activation", value, norm=self.has("first_norm"))
        y = self.binary_pointwise(f"{name}.conv", y, channels)
        return self.prelu(f"{name}.ending", y)
