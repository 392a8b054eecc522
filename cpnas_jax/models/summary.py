"""What a discrete network costs: parameters, memory and operations of every layer.

Conventions, the field's (Bi-Real Net, larq):
- a MAC is one operation; FLOPs are the float MACs, BOPs the MACs between signs;
- OPs = FLOPs + BOPs / 64;
- additions, pooling, normalisation and activations are not counted;
- the auxiliary classifier is not counted: it is gone after training (DARTS).
Binary depthwise MACs are listed apart, since no inference engine has a 1-bit kernel for them;
`ops_with_float_depthwise` counts them as float. Where they see real activations (the lever
`real_depthwise`) they are no work on bits, and count as float.

Memory packed: a bit for each binary weight, 4 bytes for every other parameter. The running averages
of a BN and the scales of a binary kernel fold into the two numbers a channel that BN has anyway.
Compression is against the float parent of the same cells, which has fewer BN parameters.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cpnas_jax.models.blocks import Depthwise, Pointwise
from cpnas_jax.models.network import Convolution, Network, NetworkSettings, stretches

BITS = 32
"""Bits of a float parameter."""

BOPS_PER_OP = 64
"""1-bit MACs that count as one operation: what a 64-bit word holds."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """What one layer costs, for one image.

    Attributes:
        name: path in the network; a layer of scanned cells stands for `repeats` cells.
        kind: class of the layer.
        output_shape: (H, W, C) or (C,).
        repeats: how often it occurs in the network; the counts below are of all together.
        binary_parameters: weights of one bit.
        float_parameters: weights of 32 bits.
        binary_macs: between signs, depthwise ones left out.
        binary_depthwise_macs: depthwise ones between signs.
        float_macs: the rest.
    """

    name: str
    kind: str
    output_shape: tuple[int, ...]
    repeats: int
    binary_parameters: int
    float_parameters: int
    binary_macs: int = 0
    binary_depthwise_macs: int = 0
    float_macs: int = 0

    def memory_bytes(self) -> float:
        """Return the packed size."""
        return (self.binary_parameters + BITS * self.float_parameters) / 8

    def ops(self) -> float:
        """Return FLOPs + BOPs / 64."""
        return self.float_macs + (self.binary_macs + self.binary_depthwise_macs) / BOPS_PER_OP


@dataclasses.dataclass(frozen=True)
class Summary:
    """The layers of a network, in the order in which they run, and their totals.

    Attributes:
        layers: those with parameters.
        parent_parameters: of the float network of the same cells, or of itself if it is float.
    """

    layers: tuple[Layer, ...]
    parent_parameters: int

    def total(self, field: str) -> int:
        """Return the sum of a count over the layers."""
        return sum(getattr(layer, field) for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the totals and the layers, as `summary.json` holds them."""
        binary, real = self.total("binary_parameters"), self.total("float_parameters")
        macs = {
            "binary": self.total("binary_macs"),
            "binary_depthwise": self.total("binary_depthwise_macs"),
            "float": self.total("float_macs"),
        }
        packed = sum(layer.memory_bytes() for layer in self.layers)
        parent = BITS * self.parent_parameters / 8
        return {
            "parameters": {"total": binary + real, "binary": binary, "float": real},
            # `float`: these very parameters in 32 bits each; the parent's are others.
            "memory_bytes": {"packed": packed, "float": BITS * (binary + real) / 8},
            "parent": {"parameters": self.parent_parameters, "memory_bytes": parent},
            "compression": parent / packed,
            "macs": macs,
            "ops": sum(layer.ops() for layer in self.layers),
            "ops_with_float_depthwise": (
                macs["float"] + macs["binary"] / BOPS_PER_OP + macs["binary_depthwise"]
            ),
            "layers": [
                {
                    **dataclasses.asdict(layer),
                    "memory_bytes": layer.memory_bytes(),
                    "ops": layer.ops(),
                }
                for layer in self.layers
            ],
        }


def summarise(settings: NetworkSettings, image_shape: tuple[int, int, int]) -> Summary:
    """Return what a network costs for one image of (height, width, channels).

    Nothing is computed: the network is traced for its shapes.
    """
    found = _layers(settings, image_shape)
    parent = found
    if settings.binary:
        parent = _layers(dataclasses.replace(settings, binary=False), image_shape)
    return Summary(found, sum(layer.float_parameters for layer in parent))


def _layers(settings: NetworkSettings, image_shape: tuple[int, int, int]) -> tuple[Layer, ...]:
    # Costs do not depend on the formulation, and the native one is traced quickest.
    operations = dataclasses.replace(settings.operations, formulation="native")
    settings = dataclasses.replace(settings, auxiliary=False, operations=operations)
    lengths = {f"cells{s.first}": s.length for s in stretches(settings)}
    found: list[Layer] = []

    def record(run: Any, arguments: Any, keywords: Any, context: Any) -> Any:
        output = run(*arguments, **keywords)
        module = context.module
        own = {
            name: leaf
            for name, leaf in module.variables.get("params", {}).items()
            if not isinstance(leaf, dict)
        }
        if context.method_name == "__call__" and own:
            found.append(_layer(module, own, output, settings, lengths))
        return output

    def trace(key: jax.Array) -> Any:
        with nn.intercept_methods(record):
            return Network(settings).init(key, jnp.zeros((1, *image_shape)), train=False)

    jax.eval_shape(trace, jax.eval_shape(lambda: jax.random.key(0)))
    # A scan is traced more than once.
    return tuple({layer.name: layer for layer in found}.values())


def _layer(
    module: nn.Module,
    own: dict[str, jax.Array],
    output: jax.Array,
    settings: NetworkSettings,
    lengths: dict[str, int],
) -> Layer:
    repeats = lengths.get(module.path[0], 1)
    size = sum(leaf.size for leaf in own.values()) * repeats
    macs = _macs(module, own, output) * repeats
    # Only kernels of cells are ever binary, and the preprocessing's only when asked.
    binary = (
        settings.binary
        and isinstance(module, Depthwise | Pointwise)
        and (settings.operations.binary_preprocess or "preprocess" not in module.path[1])
    )
    layer = Layer(
        name="/".join(module.path),
        kind=type(module).__name__,
        output_shape=tuple(output.shape[1:]),
        repeats=repeats,
        binary_parameters=size if binary else 0,
        float_parameters=0 if binary else size,
    )
    depthwise = isinstance(module, Depthwise)
    if not binary or (depthwise and settings.operations.levers.real_depthwise):
        return dataclasses.replace(layer, float_macs=macs)
    if depthwise:
        return dataclasses.replace(layer, binary_depthwise_macs=macs)
    return dataclasses.replace(layer, binary_macs=macs)


def _macs(module: nn.Module, own: dict[str, jax.Array], output: jax.Array) -> int:
    """Multiplications with a kernel's weights: each weight once at every output pixel."""
    if not isinstance(module, Depthwise | Pointwise | Convolution | nn.Conv | nn.Dense):
        return 0
    return own["kernel"].size * math.prod(output.shape[1:-1])


def table(summary: Summary) -> str:
    """Return the layers and the totals as a table of text."""
    heads = (
        *("layer", "output", "x", "1-bit", "32-bit", "memory"),
        *("1-bit MACs", "1-bit depthwise MACs", "float MACs", "OPs"),
    )
    rows = [
        (
            layer.name,
            "x".join(map(str, layer.output_shape)),
            str(layer.repeats),
            f"{layer.binary_parameters:,}",
            f"{layer.float_parameters:,}",
            _size(layer.memory_bytes()),
            f"{layer.binary_macs:,}",
            f"{layer.binary_depthwise_macs:,}",
            f"{layer.float_macs:,}",
            f"{layer.ops():,.0f}",
        )
        for layer in summary.layers
    ]
    whole = summary.to_dict()
    totals = (
        "in all",
        "",
        "",
        f"{whole['parameters']['binary']:,}",
        f"{whole['parameters']['float']:,}",
        _size(whole["memory_bytes"]["packed"]),
        *(f"{whole['macs'][kind]:,}" for kind in ("binary", "binary_depthwise", "float")),
        f"{whole['ops']:,.0f}",
    )
    widths = [max(map(len, column)) for column in zip(heads, *rows, totals, strict=True)]

    def line(cells: tuple[str, ...]) -> str:
        first, second, *rest = cells
        return "  ".join(
            [first.ljust(widths[0]), second.ljust(widths[1])]
            + [cell.rjust(width) for cell, width in zip(rest, widths[2:], strict=True)]
        ).rstrip()

    rule = "-" * len(line(heads))
    return "\n".join(
        [line(heads), rule, *map(line, rows), rule, line(totals), totals_text(summary)]
    )


def totals_text(summary: Summary) -> str:
    """Return parameters, memory, compression and operations in two lines of text."""
    whole = summary.to_dict()
    size, parent = _size(whole["memory_bytes"]["packed"]), whole["parent"]
    return "\n".join(
        [
            f"{whole['parameters']['total']:,} parameters in {size}; the float parent's "
            f"{parent['parameters']:,} take {_size(parent['memory_bytes'])}, "
            f"{whole['compression']:.1f} times as much.",
            f"OPs = FLOPs + BOPs / {BOPS_PER_OP}: {whole['ops']:,.0f}; "
            f"{whole['ops_with_float_depthwise']:,.0f} if depthwise convolutions run in float.",
        ]
    )


def _size(size: float) -> str:
    """Return bytes as text in the largest fitting unit."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024 or unit == "MiB":
            break
        size /= 1024
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
