"""What the number of devices does to a search: bits, weights, accuracies, time.

    python benchmarks/devices.py [--config configs/mnist5k.py:search,smoke]
        [--devices 1 2 4 8 2x2] [--shards 8] [--keep DIR] [flags of main]

The same search, as the batch is usually divided and in `--shards` virtual shards
(`runtime.deterministic`), on each number of forced CPU devices; `2x2` are two processes of two.
Each is compared with the first of its kind: both models' weights and accuracies after the first
sampled epoch, and what the whole search ends with. A table, then one JSON object as the last line.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parents[1]


def run(workdir: Path, devices: str, flags: list[str]) -> None:
    """Search in processes of their own; what they say goes to a log beside the workdir."""
    processes, _, each = devices.rpartition("x")
    command = [sys.executable, "-m", "cpnas_jax.main"]
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={each}"}
    if processes:
        command = ["launch/local_pod.sh", processes, each]
        environment["PYTHON"] = sys.executable
    with open(f"{workdir}.log", "w") as log:
        subprocess.run(
            [*command, *flags, f"--workdir={workdir}", "--config.runtime.keep_checkpoints=1000"],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
            check=True,
        )


def outcome(workdir: Path) -> dict[str, Any]:
    """Return what a search has led to, in parts that can be compared."""
    lines = [json.loads(line) for line in (workdir / "search/history.jsonl").open()]
    samples = [line for line in lines if line["event"] == "sample"]
    checkpoints = workdir / "search/checkpoints"
    numbers = sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    records = {
        number: json.loads((checkpoints / str(number) / "record/metadata").read_text())
        for number in numbers
    }
    first = next(n for n in numbers if records[n]["record"]["position"]["epoch"] == 1)
    state = ocp.StandardCheckpointer().restore(checkpoints / str(first) / "state")
    return {
        "state": records[numbers[-1]]["digest"],
        "history": [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
        "genotype": (workdir / "genotype.json").read_text(),
        "accuracies": (samples[0]["child_accuracy"], samples[0]["parent_accuracy"]),
        # Of both models, their optimizers' among them.
        "first": [np.asarray(state[name], np.float64) for name in sorted(state)],
        "seconds": statistics.median(line["seconds"] for line in samples[1:]),
    }


def compare(found: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """Return how the outcome of a search differs from that of the first."""
    pairs = list(zip(found["first"], first["first"], strict=True))
    norm = np.sqrt(sum(np.sum(expected**2) for _, expected in pairs))
    distance = np.sqrt(sum(np.sum((own - expected) ** 2) for own, expected in pairs))
    return {
        "bitwise": all(found[key] == first[key] for key in ("state", "history", "genotype")),
        "genotype": found["genotype"] == first["genotype"],
        "relative_distance": float(distance / norm),
        "largest_difference": float(max(np.abs(a - b).max(initial=0.0) for a, b in pairs)),
        "accuracies": found["accuracies"],
        "seconds": found["seconds"],
    }


def main() -> None:
    """Search on all numbers of devices, print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/mnist5k.py:search,smoke")
    parser.add_argument("--devices", nargs="+", default=["1", "2", "4", "8", "2x2"])
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--keep", type=Path, help="directory for the searches' files")
    options, more = parser.parse_known_args()
    kinds = {"usual": 0, f"{options.shards} shards": options.shards}
    found: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
    with tempfile.TemporaryDirectory() as scratch:
        base = options.keep or Path(scratch)
        # Kinds innermost: what is timed against each other runs one after the other.
        for devices in options.devices:
            for kind, shards in kinds.items():
                workdir = base / kind.replace(" ", "_") / devices
                workdir.parent.mkdir(parents=True, exist_ok=True)
                flags = [f"--config={options.config}", f"--config.runtime.deterministic={shards}"]
                run(workdir, devices, [*flags, *more])
                found[kind][devices] = outcome(workdir)
    rows = {
        kind: {devices: compare(own, next(iter(of.values()))) for devices, own in of.items()}
        for kind, of in found.items()
    }
    print(
        f"{'':<10} {'devices':>8} {'end bitwise':>12} {'genotype':>9} {'distance':>9} "
        f"{'largest':>9} {'A_C':>7} {'A_P':>7} {'s/epoch':>8}"
    )
    for kind, of in rows.items():
        for devices, row in of.items():
            child, parent = row["accuracies"]
            print(
                f"{kind:<10} {devices:>8} {row['bitwise']!s:>12} {row['genotype']!s:>9} "
                f"{row['relative_distance']:>9.1e} {row['largest_difference']:>9.1e} "
                f"{child:>7.4f} {parent:>7.4f} {row['seconds']:>8.2f}"
            )
    cores = len(os.sched_getaffinity(0))
    result = {"benchmark": "devices", "config": options.config, "flags": more, "rows": rows}
    print(json.dumps({**result, "cores": cores, "python": platform.python_version()}))


if __name__ == "__main__":
    main()
