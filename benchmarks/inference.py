"""Latency, throughput, memory and size of exported networks: 1-bit child against float parent.

Both have the cells of a genotype and are exported as the mode `export` does it, with weights as
they are initialised: no time depends on their values. Forms, each a process of its own:

    float   the float parent: sums over shifted slices and dots, what XLA runs best on a CPU
    signed  the child in the same formulation, its signs as floats -1 and +1
    packed  the child as it is shipped: its StableHLO program, bits and XNOR
    iree    the same, compiled ahead by IREE, one image at a time; where the extra is installed

    python benchmarks/inference.py [--genotype PC_DARTS_CIFAR] [--cells 10] [--channels 36]
    python benchmarks/inference.py --profile

All on one core. Blocks of calls alternate between the forms, never two at once. A table, then one
JSON object as the last line; ratios are of the blocks of one turn. `peak_resident_bytes` are of the
process while it answers, libraries and what compiling left behind included; hence XLA's own account
of the program beside it.
"""

import argparse
import collections
import functools
import gzip
import json
import os
import pathlib
import re
import sys
import tempfile
import time
from typing import Any

FORMS = ("float", "signed", "packed", "iree")
BATCHES = (1, 64)
SECONDS = 0.5
"""Of a block, about."""


def answer(form: str, directory: str, batches: list[int]) -> None:
    """Run a network for the process that asks: a line of JSON there, a line back."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from resident import peak_bytes, reset_peak

    from cpnas_jax.deploy import artefact, program

    network = artefact.open_program(directory)
    shape, facts = network.shipped.structure.image, {}
    calls: dict[int, Any] = {}
    for batch in batches:
        like = jax.ShapeDtypeStruct((batch, *shape), jnp.uint8)
        start = time.perf_counter()
        if form == "iree":
            calls[batch] = artefact.open_iree(directory)
            continue
        function = network.exported.call
        if form == "signed":
            shipped = network.shipped
            function = functools.partial(
                program.logits, shipped.structure, shipped.tensors, engine="signed on cpu"
            )
        calls[batch] = jax.jit(function).lower(like).compile()
        memory = calls[batch].memory_analysis()
        facts[batch] = {
            "compile_seconds": round(time.perf_counter() - start, 1),
            "temporary_bytes": memory.temp_size_in_bytes,
        }
    rng = np.random.default_rng(0)
    images = {b: rng.integers(0, 256, (b, *shape)).astype(np.uint8) for b in batches}
    # All forms of the child answer alike.
    logits = np.asarray(calls[batches[0]](network.images[: batches[0]]))
    print(json.dumps({"facts": facts, "logits": logits.tolist()}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        batch, number = asked["batch"], asked["calls"]
        np.asarray(calls[batch](images[batch]))
        reset_peak()
        start = time.perf_counter()
        for _ in range(number):
            np.asarray(calls[batch](images[batch]))
        seconds = (time.perf_counter() - start) / number
        print(json.dumps({"seconds": seconds, "peak": peak_bytes()}), flush=True)


def profile(flags: argparse.Namespace) -> dict:
    """Return the microseconds of each kind of step of the child, by XLA's own trace; batch 1."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from cpnas_jax.deploy import artefact, program

    report: dict = {"benchmark": "inference profile", "microseconds": {}}
    with tempfile.TemporaryDirectory() as scratch:
        base = pathlib.Path(scratch)
        export_both(flags, base, iree=False)
        for form, name, engine in (
            ("float", "parent", "signed on cpu"),
            ("signed", "child", "signed on cpu"),
            ("packed", "child", "packed"),
        ):
            shipped = artefact.read(base / name)
            network = functools.partial(
                program.logits, shipped.structure, shipped.tensors, engine=engine
            )
            like = jax.ShapeDtypeStruct((1, *shipped.structure.image), jnp.uint8)
            compiled = jax.jit(network).lower(like).compile()
            image = np.zeros(like.shape, np.uint8)
            jax.block_until_ready(compiled(image))
            with jax.profiler.trace(base / form, create_perfetto_trace=True):
                for _ in range(flags.repeats):
                    jax.block_until_ready(compiled(image))
            (path,) = (base / form).rglob("perfetto_trace.json.gz")
            found = by_step(json.loads(gzip.decompress(path.read_bytes())), compiled.as_text())
            of_one = {step: round(own / flags.repeats, 1) for step, own in found.most_common()}
            report["microseconds"][form] = of_one
    return report


def by_step(trace: dict | list, text: str) -> collections.Counter[str]:
    """Return step -> microseconds of a trace, by the names that a program's text gives."""
    # %name = type op(...), metadata={op_name="jit(logits)/<step>/..."}
    steps = {}
    for line in text.splitlines():
        name = re.match(r"\s*(?:ROOT )?%([\w.-]+) = ", line)
        step = re.search(r'op_name="jit\(\w+\)/(\w+)', line)
        if name and step:
            steps[name[1]] = step[1]
    found: collections.Counter[str] = collections.Counter()
    for event in trace["traceEvents"] if isinstance(trace, dict) else trace:
        name = event.get("args", {}).get("hlo_op")
        # A branch holds the events of what is in it.
        if event.get("ph") == "X" and name is not None and not name.startswith("cond"):
            found[steps.get(name, "other")] += event["dur"]
    return found


def export_both(flags: argparse.Namespace, base: pathlib.Path, iree: bool) -> dict[str, int]:
    """Export child and parent to `base`; return bytes of their tensors' files."""
    import jax
    import numpy as np

    from cpnas_jax.architecture.named import named_genotype
    from cpnas_jax.config import base_config
    from cpnas_jax.deploy import artefact
    from cpnas_jax.folding import fold
    from cpnas_jax.models import network
    from cpnas_jax.network_config import network_settings

    config = base_config()
    config.network.update({"cells": flags.cells, "channels": flags.channels, "auxiliary": False})
    for lever in ("residual", "prelu", "first_norm") if flags.plus else ():
        config.network[lever] = True
    genotype, sizes = named_genotype(flags.genotype), {}
    image = (flags.image_size, flags.image_size, 3)
    mean, std = np.full(3, 0.5, np.float32), np.full(3, 0.25, np.float32)
    classes = tuple(map(str, range(10)))
    images = np.random.default_rng(1).integers(0, 256, (4, *image)).astype(np.uint8)
    for name, binary in (("child", True), ("parent", False)):
        settings = network_settings(config, genotype, len(classes), binary=binary)
        variables = jax.device_get(network.init(jax.random.key(0), settings, image))
        structure, tensors = fold(settings, variables, mean, std, image)
        shipped = artefact.Shipped(
            structure, tensors, json.loads(genotype.to_json()), classes, {"form": "central square"}
        )
        ahead = ("host",) if iree and binary else ()
        artefact.write(shipped, base / name, images, iree=ahead)
        sizes[name] = (base / name / artefact.MODEL).stat().st_size
    return sizes


def measure(flags: argparse.Namespace) -> dict:
    """Export, start a process for each form, take blocks in turn."""
    import importlib.util

    import numpy as np
    from harness import Worker, machine_facts, progress, spread

    load = os.getloadavg()[0]
    forms = [form for form in flags.forms if form != "iree" or importlib.util.find_spec("iree")]
    with tempfile.TemporaryDirectory() as scratch:
        base = pathlib.Path(scratch)
        sizes = export_both(flags, base, "iree" in forms)
        progress("exported")
        workers = {
            form: Worker(
                [
                    *(sys.executable, __file__, f"--worker={form}"),
                    f"--directory={base / ('parent' if form == 'float' else 'child')}",
                    *("--batches", *map(str, flags.batches)),
                ]
            )
            for form in forms
        }
        try:
            answers = [
                np.asarray(workers[form].facts["logits"]) for form in forms if form != "float"
            ]
            agree = max(float(abs(own - answers[0]).max()) for own in answers)
            progress(f"compiled; logits of the child's forms differ by at most {agree:.1e}")
            if agree > 1e-3:
                raise SystemExit("the child's forms answer differently")
            found = {batch: _blocks(workers, batch, flags.repeats) for batch in flags.batches}
        finally:
            for worker in workers.values():
                worker.close()
    report: dict = {"benchmark": "inference", "sizes": sizes, "forms": {}}
    report["settings"] = {
        **{name: getattr(flags, name) for name in ("genotype", "cells", "channels", "plus")},
        "image_size": flags.image_size,
    }
    report["logits_differ_by"] = agree
    for form in forms:
        report["forms"][form] = {
            str(batch): {
                "milliseconds": spread([1e3 * own["seconds"] for own in of[form]]),
                "images_per_second": batch / float(np.median([o["seconds"] for o in of[form]])),
                "float_over_this": spread(
                    [
                        f["seconds"] / own["seconds"]
                        for f, own in zip(of["float"], of[form], strict=True)
                    ]
                ),
                "signed_over_this": spread(
                    [
                        s["seconds"] / own["seconds"]
                        for s, own in zip(of["signed"], of[form], strict=True)
                    ]
                ),
                "peak_resident_bytes": max(own["peak"] for own in of[form]),
                **workers[form].facts["facts"].get(str(batch), {}),
            }
            for batch, of in found.items()
        }
    report["machine"] = machine_facts(load)
    return report


def _blocks(workers: dict, batch: int, repeats: int) -> dict[str, list[dict]]:
    first = {form: worker.ask(batch=batch, calls=1)["seconds"] for form, worker in workers.items()}
    calls = {form: max(1, round(SECONDS / seconds)) for form, seconds in first.items()}
    found: dict[str, list[dict]] = {form: [] for form in workers}
    for _ in range(repeats):
        for form, worker in workers.items():
            found[form].append(worker.ask(batch=batch, calls=calls[form]))
    return found


def table(report: dict) -> str:
    """Return the figures as a table for people."""
    from harness import spread_text

    lines = [
        f"{'form':<8}{'batch':>6}  {'ms':<28}{'images/s':>9}  {'x as fast as float':<24}"
        f"{'as signed':<24}{'peak MiB':>9}{'XLA MiB':>9}"
    ]
    for form, batches in report["forms"].items():
        for batch, own in batches.items():
            temporary = own.get("temporary_bytes")
            lines.append(
                f"{form:<8}{batch:>6}  {spread_text(own['milliseconds']):<28}"
                f"{own['images_per_second']:>9.0f}  {spread_text(own['float_over_this']):<24}"
                f"{spread_text(own['signed_over_this']):<24}"
                f"{own['peak_resident_bytes'] / 2**20:>9.0f}"
                f"{'' if temporary is None else format(temporary / 2**20, '.1f'):>9}"
            )
    sizes = report["sizes"]
    lines.append(
        f"model.safetensors: child {sizes['child']:,} bytes, parent {sizes['parent']:,}, "
        f"{sizes['parent'] / sizes['child']:.1f} times as much"
    )
    return "\n".join(lines)


def profile_table(report: dict) -> str:
    """Return shares of the time by kind of step."""
    lines = []
    for form, found in report["microseconds"].items():
        whole = sum(found.values())
        shares = ", ".join(f"{step} {own / whole:.0%}" for step, own in found.items())
        lines.append(f"{form}: {whole / 1e3:.2f} ms: {shares}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--genotype", default="PC_DARTS_CIFAR", help="a published name")
    parser.add_argument("--cells", type=int, default=10)
    parser.add_argument("--channels", type=int, default=36)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--plus", action="store_true", help="with the levers of `plus`")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--core", type=int, help="the one that is used; else the first allowed")
    parser.add_argument("--profile", action="store_true", help="time by kind of step instead")
    parser.add_argument("--worker", choices=FORMS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    # XLA asks how many cores it has when it starts.
    core = min(os.sched_getaffinity(0)) if flags.core is None else flags.core
    os.sched_setaffinity(0, {core})
    if flags.worker:
        answer(flags.worker, flags.directory, flags.batches)
        return
    report = profile(flags) if flags.profile else measure(flags)
    print(profile_table(report) if flags.profile else table(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
