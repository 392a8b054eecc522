"""What the TPU's own compiler makes of the operations of a cell, without a TPU.

`libtpu`, the package that `jax[tpu]` installs, compiles for a TPU on any x86-64 machine. It notes
in the compiled program how many cycles it estimates for every fusion; that is its cost model, by
which it chooses layouts and tiles, and no measurement. Forward and backward pass of one operation
of the 1-bit child are compiled as one program, for one chip, at the number of images, the side and
the channels asked for.

    pip install --target=DIR --no-deps 'libtpu==0.0.42.*'
    python benchmarks/tpu_cycles.py --libtpu=DIR/libtpu/libtpu.so sep_conv_3x3:native:256x32x16 ...

A line for each, then one JSON object as the last line. `depthwise_cycles` are of the fusions around
a depthwise convolution's forward pass and its gradient to the images; `bytes` are what XLA's cost
analysis of the compiled program counts, in the tiles of 8x128 in which a TPU stores arrays.
"""

import argparse
import json
import os
import re
import time

import jax
import jax.numpy as jnp
from harness import progress
from jax.experimental import topologies

from cpnas_jax.models.operations import OperationSettings, apply_module, make_operation

CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
CALLS = re.compile(r"calls=%([\w.\-]+)")


def parse_flags() -> argparse.Namespace:
    """Return the command line's flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--libtpu", required=True, help="path of libtpu.so")
    parser.add_argument("--topology", default="v5e:2x2", help="of which one chip is compiled for")
    parser.add_argument("cases", nargs="+", help="operation:formulation:IMAGESxSIDExCHANNELS")
    return parser.parse_args()


def compile_case(case: str, device) -> dict:
    """Compile one operation's forward and backward pass; return what the compiler says of it."""
    name, formulation, sizes = case.split(":")
    images, side, channels = map(int, sizes.split("x"))
    module = make_operation(name, channels, 1, OperationSettings(formulation=formulation))
    place = jax.sharding.SingleDeviceSharding(device)

    def placed(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    def both(params, x, cotangent):
        y, pull = jax.vjp(lambda params, x: apply_module(module, params, x, True), params, x)
        return y, pull(cotangent)

    image = placed(jax.ShapeDtypeStruct((images, side, side, channels), jnp.float32))
    variables = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, 4, 4, channels)), False)
    )
    params = jax.tree.map(placed, dict(variables.get("params", {})))
    start = time.perf_counter()
    compiled = jax.jit(both).lower(params, image, image).compile()
    total, depthwise = count_cycles(compiled.as_text())
    cost = compiled.cost_analysis()
    return {
        "case": case,
        "cycles": total,
        "depthwise_cycles": depthwise,
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "compile_seconds": time.perf_counter() - start,
    }


def count_cycles(text: str) -> tuple[int, int]:
    """Return the cycles of all fusions, and of those around a depthwise convolution."""
    grouped, computation = set(), ""
    for line in text.splitlines():
        if line.endswith("{") and " = " not in line.split("(")[0]:
            computation = line.removeprefix("ENTRY ").split()[0].lstrip("%")
        elif "feature_group_count" in line:
            grouped.add(computation)
    total = depthwise = 0
    for line in text[text.index("\nENTRY") :].splitlines():
        found = CYCLES.search(line)
        if found:
            total += int(found[1])
            if "feature_group_count" in line or set(CALLS.findall(line)) & grouped:
                depthwise += int(found[1])
    return total, depthwise


def main() -> None:
    """Compile every case."""
    flags = parse_flags()
    # What libtpu would otherwise ask the cloud for.
    os.environ.update(
        TPU_LIBRARY_PATH=flags.libtpu,
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
    )
    jax.config.update("jax_platforms", "cpu")
    device = topologies.get_topology_desc(flags.topology, platform="tpu").devices[0]
    found = []
    for case in flags.cases:
        found.append(compile_case(case, device))
        progress(str(found[-1]))
    for row in found:
        print(f"{row['case']:<36} {row['cycles']:>12,} cycles, {row['depthwise_cycles']:,} of them")
    print(json.dumps({"benchmark": "tpu_cycles", "device": device.device_kind, "cases": found}))


if __name__ == "__main__":
    main()
