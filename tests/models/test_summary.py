"""What a network costs, against arithmetic, the parameters themselves and the traced program."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core
from published import Cost, network_cost, operation_cost, settings_of

from cpnas_jax.architecture.named import NAMES
from cpnas_jax.models.blocks import Levers, OperationSettings
from cpnas_jax.models.losses import is_binary_kernel
from cpnas_jax.models.network import Network, NetworkSettings
from cpnas_jax.models.space import OPERATIONS
from cpnas_jax.models.summary import summarise, table

CIFAR, IMAGENET, ODD = (32, 32, 3), (224, 224, 3), (15, 15, 3)
DARTS_FORM = OperationSettings(normalize_pools=False)

# Each operation on an edge that leaves an input: stride 1 in normal cells, 2 in reduction cells.
INPUT_EDGES = tuple((source, target) for target in range(2, 6) for source in (0, 1))
EDGE_OF = dict(zip(OPERATIONS, INPUT_EDGES, strict=True))
EVERY_OPERATION = tuple((*EDGE_OF[name], name) for name in OPERATIONS)
EVERY = NetworkSettings(EVERY_OPERATION, EVERY_OPERATION, 3, 16, 10)
LEVERS = OperationSettings(levers=Levers(**dict.fromkeys(vars(Levers()), True)))

NETWORKS = {
    "child": EVERY,
    "parent": dataclasses.replace(EVERY, binary=False),
    "scanned": settings_of("BNAS_XNOR_1", cells=10, num_classes=7),
    "imagenet": dataclasses.replace(EVERY, stem="imagenet", cells=4, channels=4),
    "levers": dataclasses.replace(EVERY, operations=LEVERS),
    "other entry and pools": dataclasses.replace(
        EVERY, operations=OperationSettings(binary_preprocess=False, normalize_pools=False)
    ),
}


@functools.cache
def summary_of(settings, image_shape=CIFAR):
    return summarise(settings, image_shape)


def cost_of(layers):
    layers = tuple(layers)
    fields = ("binary_parameters", "float_parameters")
    fields += ("binary_macs", "binary_depthwise_macs", "float_macs")
    return Cost(*(sum(getattr(layer, field) for layer in layers) for field in fields))


# Bits, floats, MACs between signs, depthwise MACs between signs, float MACs.
CHILD_COSTS = {
    ("none", 1): (0, 0, 0, 0, 0),
    ("none", 2): (0, 0, 0, 0, 0),
    ("max_pool_3x3", 1): (0, 32, 0, 0, 0),
    ("max_pool_3x3", 2): (0, 64, 0, 0, 0),
    ("avg_pool_3x3", 1): (0, 32, 0, 0, 0),
    ("avg_pool_3x3", 2): (0, 64, 0, 0, 0),
    ("skip_connect", 1): (0, 0, 0, 0, 0),
    ("skip_connect", 2): (1_024, 64, 262_144, 0, 0),
    ("sep_conv_3x3", 1): (800, 128, 524_288, 294_912, 0),
    ("sep_conv_3x3", 2): (2_624, 256, 524_288, 147_456, 0),
    ("sep_conv_5x5", 1): (1_312, 128, 524_288, 819_200, 0),
    ("sep_conv_5x5", 2): (3_648, 256, 524_288, 409_600, 0),
    ("dil_conv_3x3", 1): (400, 64, 262_144, 147_456, 0),
    ("dil_conv_3x3", 2): (1_312, 128, 262_144, 73_728, 0),
    ("dil_conv_5x5", 1): (656, 64, 262_144, 409_600, 0),
    ("dil_conv_5x5", 2): (1_824, 128, 262_144, 204_800, 0),
}
PARENT_COSTS = {
    ("none", 1): (0, 0, 0, 0, 0),
    ("none", 2): (0, 0, 0, 0, 0),
    ("max_pool_3x3", 1): (0, 32, 0, 0, 0),
    ("max_pool_3x3", 2): (0, 64, 0, 0, 0),
    ("avg_pool_3x3", 1): (0, 32, 0, 0, 0),
    ("avg_pool_3x3", 2): (0, 64, 0, 0, 0),
    ("skip_connect", 1): (0, 0, 0, 0, 0),
    ("skip_connect", 2): (0, 1_088, 0, 0, 262_144),
    ("sep_conv_3x3", 1): (0, 864, 0, 0, 819_200),
    ("sep_conv_3x3", 2): (0, 2_752, 0, 0, 671_744),
    ("sep_conv_5x5", 1): (0, 1_376, 0, 0, 1_343_488),
    ("sep_conv_5x5", 2): (0, 3_776, 0, 0, 933_888),
    ("dil_conv_3x3", 1): (0, 432, 0, 0, 409_600),
    ("dil_conv_3x3", 2): (0, 1_376, 0, 0, 335_872),
    ("dil_conv_5x5", 1): (0, 688, 0, 0, 671_744),
    ("dil_conv_5x5", 2): (0, 1_888, 0, 0, 466_944),
}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("kind", ["child", "parent"])
def test_what_an_operation_costs(kind, name, stride):
    """16 channels of 32x32 at stride 1, 32 channels to 16x16 at stride 2."""
    settings = NETWORKS[kind]
    cell, size, channels = ("cells0", 32, 16) if stride == 1 else ("cells1", 32, 32)
    source, target = EDGE_OF[name]
    layers = summary_of(settings).layers
    found = cost_of(x for x in layers if x.name.startswith(f"{cell}/edge{source}_{target}/"))
    pinned = (CHILD_COSTS if kind == "child" else PARENT_COSTS)[name, stride]
    assert dataclasses.astuple(found) == pinned
    assert found == operation_cost(name, channels, stride, size, settings)


# Of child networks, in all and 1-bit; of float networks in all. Those of DARTS_V1, DARTS_V2,
# PC_DARTS_CIFAR and the ones of DDPNAS are known from elsewhere.
CHILDREN = {
    "BNAS_XNOR_1": ((1_301_338, 1_266_804), (9_528_410, 9_432_500)),
    "DDPNAS_XNOR_1": ((1_437_778, 1_396_116), (10_419_410, 10_303_700)),
    "DDPNAS_MCN_2": ((1_483_534, 1_441_872), (10_796_110, 10_680_400)),
    "DARTS_V1": ((1_527_886, 1_485_864), (11_277_710, 11_161_000)),
    "DARTS_V2": ((1_613_242, 1_568_484), (11_892_410, 11_768_100)),
    "PC_DARTS_CIFAR": ((1_972_342, 1_918_584), (14_304_310, 14_155_000)),
    "PC_DARTS_IMAGE": ((1_975_186, 1_922_220), (14_433_810, 14_286_700)),
}
FLOATS = {
    "BNAS_XNOR_1": 2_492_902,
    "DDPNAS_XNOR_1": 2_637_190,
    "DDPNAS_MCN_2": 2_766_574,
    "DARTS_V1": 3_169_414,
    "DARTS_V2": 3_349_342,
    "PC_DARTS_CIFAR": 3_634_678,
    "PC_DARTS_IMAGE": 3_721_510,
}


def test_every_named_genotype_has_its_numbers_here():
    assert set(CHILDREN) == set(FLOATS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_one_bit_networks_have_their_number_of_parameters(name):
    """10 cells; C 36, and C 100 as in the paper's table."""
    for channels, pinned in zip((36, 100), CHILDREN[name], strict=True):
        cost = network_cost(settings_of(name, cells=10, channels=channels), 32)
        assert (cost.bits + cost.floats, cost.bits) == pinned
    small = settings_of(name)
    assert cost_of(summary_of(small).layers) == network_cost(small, 32)


def test_a_network_of_the_papers_size():
    """A later paper's table has 10.6 M for CP-NAS; about half of it is the preprocessing."""
    settings = settings_of("DDPNAS_XNOR_1", cells=10, channels=100)
    summary = summary_of(settings)
    parameters = summary.to_dict()["parameters"]
    assert (parameters["total"], parameters["binary"]) == CHILDREN["DDPNAS_XNOR_1"][1]
    entry = cost_of(layer for layer in summary.layers if "preprocess" in layer.name)
    assert entry.bits / parameters["binary"] == pytest.approx(0.5, abs=0.05)
    assert cost_of(summary.layers) == network_cost(settings, 32)


@pytest.mark.parametrize(
    ("name", "cells", "pinned"),
    [
        ("DDPNAS_XNOR_1", 10, CHILDREN["DDPNAS_XNOR_1"][0]),
        ("DDPNAS_MCN_2", 10, CHILDREN["DDPNAS_MCN_2"][0]),
        ("DDPNAS_XNOR_1", 20, (2_671_750, 2_601_936)),
    ],
)
def test_networks_of_the_lineages_tables(name, cells, pinned):
    """1.438, 1.484 and 2.672 M at C 36."""
    settings = settings_of(name, cells=cells, channels=36)
    parameters = summary_of(settings).to_dict()["parameters"]
    assert (parameters["total"], parameters["binary"]) == pinned


@pytest.mark.parametrize("name", NAMES)
def test_float_networks_have_the_published_number_of_parameters(name):
    """DARTS: 3.3 M; published counters give 3.349, 3.635 and 3.169 M for three of them."""
    settings = settings_of(name, cells=20, channels=36, binary=False, operations=DARTS_FORM)
    assert network_cost(settings, 32).floats == FLOATS[name]
    if name in ("DARTS_V1", "DARTS_V2", "PC_DARTS_CIFAR"):
        assert summary_of(settings).to_dict()["parameters"]["total"] == FLOATS[name]


@pytest.mark.parametrize(
    ("name", "total", "published"),
    [("DARTS_V2", 4_718_752, 4.7), ("PC_DARTS_IMAGE", 5_342_464, 5.3)],
)
def test_float_networks_for_imagenet_have_the_published_number_of_parameters(
    name, total, published
):
    settings = settings_of(
        name,
        **{"cells": 14, "channels": 48, "num_classes": 1000, "stem": "imagenet"},
        binary=False,
        operations=DARTS_FORM,
    )
    found = cost_of(summary_of(settings, IMAGENET).layers)
    assert found == network_cost(settings, 224)
    assert found.floats == total
    assert round(total / 1e6, 1) == published


def traced_macs(jaxpr):
    """Multiplications of all convolutions and products of a traced program."""
    total = 0
    for equation in jaxpr.eqns:
        shapes = [getattr(variable.aval, "shape", ()) for variable in equation.invars]
        out = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "conv_general_dilated":
            # The kernel is HWIO, and I the inputs of a group.
            total += out * math.prod(shapes[1][:3])
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += out * math.prod(shapes[0][axis] for axis in contracted)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(map(traced_macs, core.jaxprs_in_params(equation.params)))
    return total


def shapes_of(settings):
    """Of all variables, whatever the size of the image."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, *ODD), jnp.float32)
    module = Network(settings)
    return jax.eval_shape(lambda *inputs: module.init(*inputs, train=False), key, images)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_count_is_that_of_the_traced_program(name):
    """Each parameter is in one layer, the auxiliary classifier's in none: it ends with training."""
    native = dataclasses.replace(NETWORKS[name].operations, formulation="native")
    settings = dataclasses.replace(NETWORKS[name], operations=native)
    variables = shapes_of(settings)
    bits, floats = {}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        layer = "/".join(entry.key for entry in path[:-1])
        binary = settings.binary and is_binary_kernel(path, settings.operations.binary_preprocess)
        counts = bits if binary else floats
        counts[layer] = counts.get(layer, 0) + leaf.size
    layers = summary_of(NETWORKS[name], ODD).layers
    names = [layer.name for layer in layers]
    assert len(set(names)) == len(names)
    assert {x.name: x.binary_parameters for x in layers if x.binary_parameters} == bits
    expected = {layer: n for layer, n in floats.items() if not layer.startswith("auxiliary")}
    assert len(expected) < len(floats)
    assert {x.name: x.float_parameters for x in layers if x.float_parameters} == expected

    program = jax.make_jaxpr(
        lambda variables, images: Network(settings).apply(variables, images, train=False).logits
    )(variables, jax.ShapeDtypeStruct((1, *ODD), jnp.float32))
    found = cost_of(layers)
    macs = found.binary_macs + found.depthwise_macs + found.float_macs
    assert macs == traced_macs(program.jaxpr)
    if name != "levers":
        assert found == network_cost(settings, ODD[0])


def test_layers_say_where_they_are_and_what_leaves_them():
    """Ten cells, reductions at 3 and 6; the last two are equal, and one layer stands for both."""
    layers = {layer.name: layer for layer in summary_of(NETWORKS["scanned"], ODD).layers}
    first, *_, last = layers
    assert (first, last) == ("stem/conv0", "classifier")
    assert layers["stem/conv0"].output_shape == (15, 15, 12)
    assert layers["classifier"].output_shape == (7,)
    assert layers["cells3/edge1_2/unit0/depthwise"].output_shape == (8, 8, 8)
    assert layers["cells4/preprocess0/reduce/even"].output_shape == (8, 8, 4)
    assert layers["cells3/preprocess1/conv"].kind == "Pointwise"
    assert layers["cells8/preprocess1/conv"].output_shape == (4, 4, 16)
    assert layers["cells8/preprocess1/conv"].binary_parameters == 2 * (4 * 16) * 16
    lengths = {name.split("/")[0]: layer.repeats for name, layer in layers.items()}
    assert lengths == {"stem": 1, "classifier": 1, "cells8": 2} | {f"cells{i}": 1 for i in range(8)}


def test_totals_memory_and_compression():
    summary, parent = (summary_of(NETWORKS[kind]).to_dict() for kind in ("child", "parent"))
    binary, real = summary["parameters"]["binary"], summary["parameters"]["float"]
    assert summary["parameters"]["total"] == binary + real
    assert summary["memory_bytes"] == {
        "packed": binary / 8 + 4 * real,
        "float": 4 * (binary + real),
    }
    # The parent has a BN less in every separable unit.
    assert summary["parent"] == {
        "parameters": parent["parameters"]["total"],
        "memory_bytes": parent["memory_bytes"]["float"],
    }
    assert parent["parameters"]["total"] < summary["parameters"]["total"]
    assert summary["compression"] == (
        parent["memory_bytes"]["float"] / summary["memory_bytes"]["packed"]
    )
    macs = summary["macs"]
    assert summary["ops"] == macs["float"] + (macs["binary"] + macs["binary_depthwise"]) / 64
    assert summary["ops_with_float_depthwise"] == (
        macs["float"] + macs["binary"] / 64 + macs["binary_depthwise"]
    )
    for key in ("memory_bytes", "ops"):
        total = summary["memory_bytes"]["packed"] if key == "memory_bytes" else summary["ops"]
        assert sum(layer[key] for layer in summary["layers"]) == total
    assert json.loads(json.dumps(summary))["parameters"] == summary["parameters"]


def test_a_float_network_is_its_own_parent():
    summary = summary_of(NETWORKS["parent"]).to_dict()
    assert summary["parameters"]["binary"] == 0
    assert summary["macs"]["binary"] == summary["macs"]["binary_depthwise"] == 0
    assert summary["ops"] == summary["macs"]["float"]
    assert summary["memory_bytes"]["packed"] == summary["memory_bytes"]["float"]
    assert summary["compression"] == 1


def test_depthwise_convolutions_of_real_activations_are_float_work():
    """Their weights are still bits."""
    plain, levers = (
        cost_of(summary_of(NETWORKS[kind], ODD).layers) for kind in ("child", "levers")
    )
    assert levers.bits == plain.bits
    assert levers.binary_macs == plain.binary_macs
    assert levers.depthwise_macs == 0
    assert levers.float_macs == plain.float_macs + plain.depthwise_macs


@pytest.mark.parametrize("name", ["child", "scanned", "levers"])
def test_the_table_has_a_line_a_layer_and_no_question_marks(name):
    summary = summary_of(NETWORKS[name], ODD)
    text = table(summary)
    assert "?" not in text
    lines = text.splitlines()
    names = [line.split()[0] for line in lines[2 : 2 + len(summary.layers)]]
    assert names == [layer.name for layer in summary.layers]
    whole = summary.to_dict()
    totals = next(line for line in lines if line.startswith("in all"))
    for value in (
        *(whole["parameters"][kind] for kind in ("binary", "float")),
        *whole["macs"].values(),
    ):
        assert f"{value:,}" in totals.split()
    # Columns of numbers end below one another.
    assert {len(line) for line in lines[: 4 + len(summary.layers)]} == {len(lines[1])}
    assert f"{whole['parameters']['total']:,} parameters in" in lines[-2]
    assert f"{whole['parent']['parameters']:,} take" in lines[-2]
    assert f"{whole['compression']:.1f} times" in lines[-2]
    assert f"{whole['ops']:,.0f}" in lines[-1]
