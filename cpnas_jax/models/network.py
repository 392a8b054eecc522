"""The discrete network of a genotype: what is trained after the search.

Cells of the search's own operations, at 1/3 and 2/3 of the depth reduction cells; BN affine with
running averages; an auxiliary classifier at 2/3 of the depth; drop path on every edge that is not
an identity (all DARTS). Cells of one kind and shape that follow each other are one scan over
stacked parameters, which is what keeps compilation short.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cpnas_jax.models import layers
from cpnas_jax.models.blocks import Norm, OperationSettings, kernel_init
from cpnas_jax.models.draws import position_draws
from cpnas_jax.models.initial import draw_kernels
from cpnas_jax.models.operations import Preprocess, make_operation
from cpnas_jax.models.recompute import apply_recomputed
from cpnas_jax.models.space import CELL_TYPES, EDGES, NUM_INPUTS, NUM_NODES, OPERATIONS

STEMS = ("cifar", "imagenet")
"""`cifar`: a 3x3 convolution to 3 C channels. `imagenet`: three of stride 2, to C channels."""

CONVOLUTIONS = tuple(name for name in OPERATIONS if "conv" in name)
"""The operations that are worth recomputing."""

CellEdges = tuple[tuple[int, int, str], ...]
"""The (source, target, operation) of a cell's edges."""


@dataclasses.dataclass(frozen=True)
class NetworkSettings:
    """Shape of a discrete network; hashable.

    Attributes:
        normal: edges of the normal cell.
        reduce: edges of the reduction cell.
        cells: number of cells, L.
        channels: C of the first cell; doubled by every reduction cell.
        num_classes: outputs of the classifier.
        stem: one of `STEMS`.
        auxiliary: whether there is an auxiliary classifier after cell 2L // 3.
        binary: child (True) or parent (False).
        recompute: convolutions are computed again in the backward pass of training, in place of
            keeping what they leave behind: about half the memory.
        operations: what the operations share; its `normalization` is set by `Network`.

    Raises:
        ValueError: no such stem or edge, fewer than one cell, or a node that nothing enters.
    """

    normal: CellEdges
    reduce: CellEdges
    cells: int
    channels: int
    num_classes: int
    stem: str = "cifar"
    auxiliary: bool = True
    binary: bool = True
    recompute: bool = False
    operations: OperationSettings = dataclasses.field(default_factory=OperationSettings)

    def __post_init__(self) -> None:
        if self.stem not in STEMS:
            raise ValueError(f"stem is {self.stem!r}; offered are {STEMS}")
        if self.cells < 1:
            raise ValueError(f"cells is {self.cells!r}; it must be at least 1")
        for kind in CELL_TYPES:
            _check_edges(kind, getattr(self, kind))

    def reductions(self) -> tuple[int, ...]:
        """Return the positions of the reduction cells, L // 3 and 2L // 3 (DARTS)."""
        return tuple(sorted({self.cells // 3, 2 * self.cells // 3}))

    def auxiliary_cell(self) -> int:
        """Return the position of the cell whose output the auxiliary classifier reads."""
        return 2 * self.cells // 3


def _check_edges(kind: str, edges: CellEdges) -> None:
    for source, target, name in edges:
        if (source, target) not in EDGES or name not in OPERATIONS:
            raise ValueError(f"{kind} cell has no edge {source}->{target} with {name!r}")
    if len({edge[:2] for edge in edges}) != len(edges):
        raise ValueError(f"{kind} cell has an edge twice")
    for node in range(NUM_INPUTS, NUM_NODES):
        if not any(target == node and name != "none" for _, target, name in edges):
            raise ValueError(f"node {node} of the {kind} cell has no input")


class CellPlace(NamedTuple):
    """What a cell is in its network."""

    kind: str
    channels: int
    reduce_first_input: bool


class Stretch(NamedTuple):
    """Cells that follow each other and are equal in everything, inputs included."""

    place: CellPlace
    first: int
    length: int


def cell_places(settings: NetworkSettings) -> tuple[CellPlace, ...]:
    """Return what every cell is, first to last."""
    places = []
    # The ImageNet stem's second output has half the resolution of its first.
    channels, after_reduction = settings.channels, settings.stem == "imagenet"
    for position in range(settings.cells):
        reduction = position in settings.reductions()
        channels *= 2 if reduction else 1
        places.append(CellPlace(CELL_TYPES[int(reduction)], channels, after_reduction))
        after_reduction = reduction
    return tuple(places)


def stretches(settings: NetworkSettings) -> tuple[Stretch, ...]:
    """Group the cells for scans; the cell the auxiliary classifier reads ends its stretch."""
    grouped: list[Stretch] = []
    channels_in: list[tuple[int, int]] = []
    places = cell_places(settings)
    stem = stem_channels(settings)
    outputs = [stem, stem, *(4 * place.channels for place in places)]
    for position, place in enumerate(places):
        inputs = (outputs[position], outputs[position + 1])
        last = grouped[-1] if grouped else None
        if (
            last is not None
            and (last.place, channels_in[-1]) == (place, inputs)
            and position - 1 != settings.auxiliary_cell()
        ):
            grouped[-1] = last._replace(length=last.length + 1)
        else:
            grouped.append(Stretch(place, position, 1))
            channels_in.append(inputs)
    return tuple(grouped)


def stem_channels(settings: NetworkSettings) -> int:
    """Return the channels of the stem's outputs (DARTS: 3 C on CIFAR, C on ImageNet)."""
    return settings.channels * (3 if settings.stem == "cifar" else 1)


class Outputs(NamedTuple):
    """What a network computes.

    Attributes:
        logits: f[N, num_classes].
        auxiliary: f[N, num_classes] in training with an auxiliary classifier, otherwise None.
        features: f[N, H, W, 4 C'], the last cell's output: f_s of eq. 4.18.
    """

    logits: jax.Array
    auxiliary: jax.Array | None
    features: jax.Array


class DropPath(NamedTuple):
    """What drop path needs to know of a batch.

    Attributes:
        rate: f[], the probability that an edge is left out for an image.
        positions: int32[N], the images' positions in the global batch, by which they draw.
    """

    rate: jax.Array
    positions: jax.Array


class Convolution(nn.Module):
    """A float 3x3 convolution, padding 1, without bias."""

    channels: int
    stride: int
    formulation: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[N, H, W, C] to f[N, ceil(H / stride), ceil(W / stride), channels]."""
        kernel = self.param("kernel", kernel_init, (3, 3, x.shape[-1], self.channels))
        return layers.conv_3x3(x, kernel, stride=self.stride, formulation=self.formulation)


class Stem(nn.Module):
    """The float entry of a network; gives the two inputs of the first cell."""

    kind: str
    channels: int
    settings: OperationSettings

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """f[N, H, W, C] to two outputs; on ImageNet at 1/4 and at 1/8 of the resolution."""

        def convolved(x: jax.Array, channels: int, stride: int, name: str) -> jax.Array:
            y = Convolution(channels, stride, self.settings.formulation, name=name)(x)
            return Norm(self.settings, name=f"{name}_norm")(y)

        if self.kind == "cifar":
            y = convolved(x, self.channels, 1, "conv0")
            return y, y
        y = convolved(x, self.channels // 2, 2, "conv0")
        first = convolved(jax.nn.relu(y), self.channels, 2, "conv1")
        return first, convolved(jax.nn.relu(first), self.channels, 2, "conv2")


class Cell(nn.Module):
    """A cell of a genotype, in the form of a step of a scan.

    Attributes:
        edges: of this kind of cell.
        place: kind, channels, and whether the first input is larger.
        binary: child or parent.
        settings: shared by the operations.
        recompute: as in `NetworkSettings`.
    """

    edges: CellEdges
    place: CellPlace
    binary: bool
    settings: OperationSettings
    recompute: bool = False

    @nn.compact
    def __call__(
        self, last_two: tuple[jax.Array, jax.Array], drop_path: DropPath | None
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        """Return the outputs of the last cell and of this one, f[N, H', W', 4 * channels].

        Args:
            last_two: outputs of the cell before the last, and of the last.
            drop_path: leaves edges out; None leaves none out.
        """
        place, settings = self.place, self.settings
        if drop_path is not None:
            # One draw for all edges: each takes XLA about as long to compile as a layer.
            draws = position_draws(self.make_rng("drop_path"), drop_path.positions, len(self.edges))
        nodes = [
            Preprocess(
                place.channels, i == 0 and place.reduce_first_input, settings, name=f"preprocess{i}"
            )(x, self.binary)
            for i, x in enumerate(last_two)
        ]
        for target in range(NUM_INPUTS, NUM_NODES):
            total = None
            for edge, (source, node, name) in enumerate(self.edges):
                if node != target or name == "none":
                    continue
                stride = 2 if place.kind == "reduce" and source < NUM_INPUTS else 1
                y = self._edge(name, stride, f"edge{source}_{target}", nodes[source])
                if drop_path is not None and (name, stride) != ("skip_connect", 1):
                    y = _dropped(y, drop_path.rate, draws[:, edge])
                total = y if total is None else total + y
            assert total is not None
            nodes.append(total)
        return (last_two[1], jnp.concatenate(nodes[NUM_INPUTS:], axis=-1)), None

    def _edge(self, operation: str, stride: int, name: str, x: jax.Array) -> jax.Array:
        arguments = (operation, self.place.channels, stride, self.settings)
        worthwhile = operation in CONVOLUTIONS and self.settings.normalization == "train"
        if worthwhile and self.recompute and not self.is_initializing():
            return apply_recomputed(self, name, make_operation(*arguments), x, self.binary)
        module: Any = make_operation(*arguments, name)
        return module(x, self.binary)


def _dropped(x: jax.Array, rate: jax.Array, draws: jax.Array) -> jax.Array:
    """Set images whose draw is in the upper `rate` of [0, 1) to zero, scale the others up."""
    keep = 1 - rate
    return jnp.where((draws < keep)[:, None, None, None], x / keep, 0)


class Auxiliary(nn.Module):
    """The auxiliary classifier of DARTS, float: pool to 2x2, 1x1 to 128, 2x2 to 768, linear.

    The two windows an axis are 5/8 of the image: DARTS' 5x5 at stride 3 on 8x8 (CIFAR) and at
    stride 2 on 7x7 (ImageNet).
    """

    num_classes: int
    settings: OperationSettings

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[N, H, W, C] to f[N, num_classes]."""
        x = _pool_to_two(_pool_to_two(jax.nn.relu(x), 1), 2)
        x = nn.Conv(128, (1, 1), use_bias=False, name="conv0")(x)
        x = jax.nn.relu(Norm(self.settings, name="norm0")(x))
        x = nn.Conv(768, (2, 2), padding="VALID", use_bias=False, name="conv1")(x)
        x = jax.nn.relu(Norm(self.settings, name="norm1")(x))
        return nn.Dense(self.num_classes, name="classifier")(x.reshape(x.shape[0], -1))


def _pool_to_two(x: jax.Array, axis: int) -> jax.Array:
    size = x.shape[axis]
    window = math.ceil(5 * size / 8)
    halves = (
        lax.slice_in_dim(x, 0, window, axis=axis),
        lax.slice_in_dim(x, size - window, size, axis=axis),
    )
    return jnp.concatenate([jnp.mean(h, axis=axis, keepdims=True) for h in halves], axis=axis)


class Network(nn.Module):
    """The network of a genotype. Variables: `params` and `batch_stats`.

    Attributes:
        settings: shape of the network.
    """

    settings: NetworkSettings

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool, drop_path: DropPath | None = None
    ) -> Outputs:
        """Apply the network.

        Args:
            images: f[N, H, W, C], normalised.
            train: batch statistics (and their running averages updated) and the auxiliary
                classifier, or running averages.
            drop_path: leaves edges out; needs the random stream `drop_path`.

        Returns:
            Logits, auxiliary logits, last feature map.
        """
        net = self.settings
        operations = dataclasses.replace(
            net.operations, normalization="train" if train else "running"
        )
        last_two = Stem(net.stem, stem_channels(net), operations, name="stem")(images)
        auxiliary = None
        for stretch in stretches(net):
            cell: Any = Cell
            if stretch.length > 1:
                cell = nn.scan(
                    Cell,
                    variable_axes={"params": 0, "batch_stats": 0},
                    split_rngs={"params": True, "drop_path": True},
                    in_axes=nn.broadcast,
                    length=stretch.length,
                )
            edges = getattr(net, stretch.place.kind)
            name = f"cells{stretch.first}"
            last_two, _ = cell(
                edges, stretch.place, net.binary, operations, net.recompute, name=name
            )(last_two, drop_path)
            if net.auxiliary and stretch.first + stretch.length - 1 == net.auxiliary_cell():
                head = Auxiliary(net.num_classes, operations, name="auxiliary")
                # Made at initialisation whatever `train` is; unused outside training.
                if train or self.is_initializing():
                    auxiliary = head(last_two[1])
        features = last_two[1]
        pooled = jnp.mean(features, axis=(1, 2))
        logits = nn.Dense(net.num_classes, name="classifier")(pooled)
        return Outputs(logits, auxiliary, features)


def init(key: jax.Array, settings: NetworkSettings, image_shape: tuple[int, int, int]) -> Any:
    """Return the variables of a network, {"params", "batch_stats"}, float32."""
    dummy = jnp.zeros((1, *image_shape))
    variables = Network(settings).init({"params": key}, dummy, train=False)
    scanned = {f"cells{s.first}" for s in stretches(settings) if s.length > 1}
    kernels = draw_kernels(
        key,
        jax.eval_shape(lambda: variables["params"]),
        lambda keys: keys[0] in scanned,
    )

    # What is no kernel keeps its module's value; the modules' own draws are dead code.
    def chosen(path: tuple[Any, ...], own: jax.Array, kernel: jax.Array) -> jax.Array:
        return kernel if path[-1].key == "kernel" else own

    params = jax.tree_util.tree_map_with_path(chosen, variables["params"], kernels)
    return {**variables, "params": params}
