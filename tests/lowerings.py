"""Programs lowered for TPUs on a machine without one, and what is read from their text."""

import collections
import functools
import re

import jax
from jax import export

from cpnas_jax.models import layers

# What every platform knows: how an array is divided among devices.
KNOWN_CALLS = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}

ALL_REDUCE = re.compile(
    r'"stablehlo\.all_reduce"\([^)]*\) <\{(?P<attributes>.*?)\}> \(\{.*?\}\)(?: \{.*?\})? : '
    r"\((?P<operands>[^)]*)\)",
    re.DOTALL,
)
GROUPS = re.compile(r"replica_groups = dense<(.*?)> : tensor<1x(\d+)xi64>")
TENSOR = re.compile(r"tensor<((?:\d+x)*)([a-z]\w*)>")
CALLED = re.compile(r'custom_call @([\w.$]+)|call_target_name = "([^"]+)"')


def use_devices(patch, count):
    """Let everything see the first `count` devices alone."""
    devices = jax.devices()[:count]
    patch.setattr(jax, "pmap", functools.partial(jax.pmap, devices=devices))
    for name in ("device_count", "local_device_count"):
        patch.setattr(jax, name, lambda: count)
    for name in ("devices", "local_devices"):
        patch.setattr(jax, name, lambda **_: devices)


def formulation_on_tpus(patch):
    """Return what the package's choice by the backend comes to where that is a TPU.

    To be named to what is traced: traces are kept, and later ones of `auto` mean a CPU's form.
    """
    with patch.context() as here:
        here.setattr(jax, "default_backend", lambda: "tpu")
        return layers.resolve_formulation("auto")


def shapes_of(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def on_devices(tree):
    """Shapes of what is replicated, from those of one copy."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((jax.device_count(), *leaf.shape), leaf.dtype), tree
    )


def lowered_for_tpu(function, *arguments):
    """Return the exported program of a pmapped function."""
    return export.export(jax.jit(function), platforms=["tpu"])(*shapes_of(arguments))


def reduced(text):
    """Return how many arrays of each (shape, type) a program sums over its devices."""
    return collections.Counter(
        (tuple(int(size) for size in sizes.split("x") if size), kind)
        for match in ALL_REDUCE.finditer(text)
        for sizes, kind in TENSOR.findall(match["operands"])
    )


def check_program(program):
    """For TPUs, all devices in one group of each sum, and no call that a TPU does not know."""
    count, text = jax.device_count(), program.mlir_module()
    assert (program.platforms, program.nr_devices) == (("tpu",), count)
    assert f"mhlo.num_partitions = {count} : i32, mhlo.num_replicas = 1 : i32" in text
    sums = list(ALL_REDUCE.finditer(text))
    assert len(sums) == text.count("stablehlo.all_reduce")
    assert sums or count == 1
    for match in sums:
        members, size = GROUPS.search(match["attributes"]).groups()
        assert members.strip("[]") == ", ".join(map(str, range(count)))
        assert int(size) == count
    assert text.count("custom_call") == 0 or CALLED.search(text)
    assert {a or b for a, b in CALLED.findall(text)} <= KNOWN_CALLS


def check_gradients(program, params):
    """The gradient of every parameter, of one device's shape, is summed over several devices."""
    if jax.device_count() == 1:
        return
    wanted = collections.Counter((leaf.shape, "f32") for leaf in jax.tree.leaves(params))
    assert not wanted - reduced(program.mlir_module())


def check_depthwise(program, channels, backward):
    """Depthwise convolutions are the library's own, of these channels; so are their gradients.

    Shifted slices, a CPU's form, have none.
    """
    text = program.mlir_module()
    groups = {
        name: {int(count) for count in re.findall(rf"{name}_group_count = (\d+)", text)}
        for name in ("feature", "batch")
    }
    assert groups["feature"] == {1, *channels}
    # The gradient of a depthwise kernel; lowered as groups of the batch.
    assert groups["batch"] == ({1, *channels} if backward else {1})


def check_donated(function, *arguments):
    """All of the first argument's memory becomes that of the first result; nothing else does."""
    # Only a program of the default platform tells: around an exported one is another function.
    text = function.lower(*shapes_of(arguments)).as_text()
    main = text[text.index("@main(") : text.index("-> (", text.index("@main("))]
    aliases = re.findall(r"%arg(\d+): [^%]*tf\.aliasing_output = (\d+)", main)
    leaves = len(jax.tree.leaves(arguments[0]))
    assert [(int(a), int(b)) for a, b in aliases] == [(i, i) for i in range(leaves)]
    assert "buffer_donor" not in main
