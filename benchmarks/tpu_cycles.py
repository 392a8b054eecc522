"""What the TPU's own compiler makes of the operations of a cell, without a TPU.

`libtpu`, the package that `jax[tpu]` installs, compiles for a TPU on any x86-64 machine. It notes
in the compiled program how many cycles it estimates for every fusion; that is its cost model, by
which it chooses layouts and tiles, and no measurement. Forward and backward pass of one operation
of the 1-bit child are compiled as one program, for one chip, at the number of images, the side and
the channels asked for.

    pip install --target=DIR --no-deps 'libtpu==0.0.42.*'
    python benchmarks/tpu_cycles.py --libtpu=DIR/libtpu/libtpu.so sep_conv_3x3:native:256x32x16 ...

A case takes seconds to minutes. With `--file` cases are added to a file's and known ones left out;
without a case the file's are printed, and no libtpu is needed:

    python benchmarks/tpu_cycles.py --file=docs/tpu_cycles.json

A line for each, then one JSON object as the last line. `depthwise` cycles are of the fusions around
a depthwise convolution's forward pass and its gradient to the images; `MB` are what XLA's cost
analysis of the compiled program counts, in the tiles of 8x128 in which a TPU stores arrays; `least
MB` those of perfect fusion (`costs.py`), and `share` is that of the roofline of `chips.py` with
them that the cycles are.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from chips import CHIPS, V5E_CLOCK, roofline_seconds
from harness import progress
from jax.experimental import topologies

from cpnas_jax.models.operations import OperationSettings, apply_module, make_operation
from cpnas_jax.runtime.costs import Cost, program_cost

CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
CALLS = re.compile(r"calls=%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation of a cell at stride 1, and its images."""

    operation: str
    formulation: str
    images: int
    side: int
    channels: int

    @staticmethod
    def parse(text: str) -> "Case":
        """Return the case of operation:formulation:IMAGESxSIDExCHANNELS."""
        operation, formulation, sizes = text.split(":")
        return Case(operation, formulation, *map(int, sizes.split("x")))

    def image(self) -> jax.ShapeDtypeStruct:
        """Return the shape of what the operation is given, and returns."""
        return jax.ShapeDtypeStruct((self.images, self.side, self.side, self.channels), jnp.float32)

    def params(self):
        """Return the shapes of the operation's parameters."""
        dummy = jnp.zeros((1, 4, 4, self.channels))
        variables = jax.eval_shape(lambda: self._module().init(jax.random.key(0), dummy, False))
        return dict(variables.get("params", {}))

    def both(self, params, x, cotangent):
        """Run the operation of the 1-bit child, forward and backward."""
        module = self._module()
        y, pull = jax.vjp(lambda params, x: apply_module(module, params, x, True), params, x)
        return y, pull(cotangent)

    def _module(self):
        settings = OperationSettings(formulation=self.formulation)
        return make_operation(self.operation, self.channels, 1, settings)


def operation_cost(case: Case) -> Cost:
    """Return what the case's program costs, as `costs.py` counts."""
    return program_cost(case.both, case.params(), case.image(), case.image())


def parse_flags() -> argparse.Namespace:
    """Return the command line's flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--libtpu", help="path of libtpu.so; to compile what the file has not")
    parser.add_argument("--topology", default="v5e:2x2", help="of which one chip is compiled for")
    parser.add_argument("--file", type=pathlib.Path, help="of cases; those compiled are added")
    parser.add_argument("cases", nargs="*", help="operation:formulation:IMAGESxSIDExCHANNELS")
    return parser.parse_args()


def compile_case(name: str, device) -> dict:
    """Compile one operation's forward and backward pass; return what the compiler says of it."""
    case = Case.parse(name)
    place = jax.sharding.SingleDeviceSharding(device)

    def placed(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    image, params = placed(case.image()), jax.tree.map(placed, case.params())
    start = time.perf_counter()
    compiled = jax.jit(case.both).lower(params, image, image).compile()
    total, depthwise = count_cycles(compiled.as_text())
    cost = compiled.cost_analysis()
    return {
        "case": name,
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


def compiled_cases(names: list[str], libtpu: str, topology: str) -> list[dict]:
    """Compile every case for one chip of a topology."""
    # What libtpu would otherwise ask the cloud for.
    os.environ.update(
        TPU_LIBRARY_PATH=libtpu,
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
    )
    device: Any = topologies.get_topology_desc(topology, platform="tpu").devices[0]
    rows = []
    for name in names:
        rows.append({**compile_case(name, device), "device": device.device_kind})
        progress(str(rows[-1]))
    return rows


def main() -> None:
    """Compile what is not known, print all."""
    flags = parse_flags()
    jax.config.update("jax_platforms", "cpu")
    known = flags.file is not None and flags.file.exists()
    rows = json.loads(flags.file.read_text())["cases"] if known else []
    missing = [name for name in flags.cases if name not in {row["case"] for row in rows}]
    if missing:
        if not flags.libtpu:
            raise SystemExit(f"--libtpu is not given; it compiles {', '.join(missing)}")
        rows += compiled_cases(missing, flags.libtpu, flags.topology)
    print(f"{'case':<34}{'cycles':>12}{'depthwise':>12}{'MB':>8}{'least MB':>10}{'share':>7}")
    for row in rows:
        cost = operation_cost(Case.parse(row["case"]))
        share = max(roofline_seconds(cost, 0, CHIPS["v5e"]).values()) * V5E_CLOCK / row["cycles"]
        print(
            f"{row['case']:<34}{row['cycles']:>12,}{row['depthwise_cycles']:>12,}"
            f"{row['bytes'] / 1e6:>8,.0f}{cost.least_bytes / 1e6:>10,.0f}{share:>7.2f}"
        )
    text = json.dumps({"benchmark": "tpu_cycles", "cases": rows})
    if flags.file and missing:
        flags.file.write_text(text.replace("}, {", "},\n{") + "\n")
    print(text)


if __name__ == "__main__":
    main()
