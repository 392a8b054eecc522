"""Test accuracies of small trainings that differ in one setting, over seeds.

    python benchmarks/train_variants.py levers --seeds 3 --data-dir DIR
    python benchmarks/train_variants.py loss --seeds 3 --data-dir DIR

Trainings of configs/cifar10.py with the cells found on CIFAR-10, cut down to some minutes on one
core. Each is a process of its own on a core of its own; `--keep DIR` keeps their workdirs, and what
is finished there is not trained again. A table, then one JSON object as the last line.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import platform
import queue
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cpnas_jax.models.blocks import Levers

LEVERS = tuple(field.name for field in dataclasses.fields(Levers))
THREE = ("residual", "prelu", "first_norm")
"""The levers of DCP-NAS' code that leave every activation of a convolution at one bit."""

BUDGET = {
    "dataset.image_size": 16,
    "dataset.crop_padding": 2,
    "dataset.cutout": 0,
    "network.cells": 3,
    "network.channels": 16,
    "network.auxiliary": False,
    "network.drop_path": 0.0,
    "train.batch_size": 50,
    "train.learning_rate": 1e-2,
}
"""What every training here shares, keys of a config."""


def without(*keys: str) -> dict[str, float]:
    """Return the settings that leave out these terms of L_H."""
    return {f"train.{key}_weight": 0.0 for key in keys}


def variants(subject: str) -> dict[str, dict[str, object]]:
    """Return name -> keys for what is compared, the first is what the others are compared to."""
    if subject == "levers":
        three = {f"network.{name}": True for name in THREE}
        alone = {name: {f"network.{name}": True} for name in THREE}
        less = {f"three without {name}": {**three, f"network.{name}": False} for name in THREE}
        others = [name for name in LEVERS if name not in THREE]
        more = {f"three with {name}": {**three, f"network.{name}": True} for name in others}
        return {"faithful": {}, "three": three, **alone, **less, **more}
    weights = {
        f"reconstruction {kernel:g}, center {center:g}": {
            "train.reconstruction_weight": kernel,
            "train.center_weight": center,
        }
        for kernel, center in (
            *((1e-4, 1e-3), (1e-4, 0.0), (0.0, 1e-3)),
            *((1e-3, 0.0), (1e-2, 0.0), (0.0, 1e-2), (0.0, 1e-1)),
        )
    }
    parent = {"parent kernel": {"train.parent_kernel": True}}
    return {"without L_H": without("reconstruction", "center"), **weights, **parent}


def train(base: Path, keys: dict[str, object], core: int) -> dict[str, float]:
    """Train in a process on one core; return its accuracies and seconds."""
    command = [sys.executable, "-m", "cpnas_jax.main", "--config=configs/cifar10.py:train"]
    overrides = [f"--config.{key}={value}" for key, value in keys.items()]
    base.mkdir(parents=True, exist_ok=True)
    with open(base / "log", "a") as log:
        subprocess.run(
            [*command, f"--workdir={base}", *overrides],
            stdout=log,
            stderr=log,
            check=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
    results = json.loads((base / "results.json").read_text())["train"]
    return {"top1": results["test"]["top1"], "seconds": results["seconds"]}


def spread(values: list[float]) -> dict[str, Any]:
    """Return mean, least, largest, number and, in the order of the seeds, the values."""
    return {
        "mean": statistics.mean(values),
        "least": min(values),
        "largest": max(values),
        "n": len(values),
        "values": values,
    }


def spread_text(found: dict[str, Any], sign: str = "") -> str:
    """Return mean [least, largest] of a `spread`; `sign` "+" writes it of every number."""
    mean, least, largest = (f"{found[key]:{sign}.3f}" for key in ("mean", "least", "largest"))
    return f"{mean} [{least}, {largest}]"


def parse_flags() -> argparse.Namespace:
    """Return the command line's flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subject", choices=("levers", "loss"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data-dir", required=True, help="where cifar10 is prepared")
    parser.add_argument("--genotype", default="docs/genotypes/cifar10.json")
    parser.add_argument("--keep", type=Path, help="directory for the trainings' files")
    parser.add_argument("--only", action="append", help="a variant's name; may be repeated")
    parser.add_argument("--examples", type=int, default=10_000, help="0 trains on all of them")
    parser.add_argument("--epochs", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    """Train every variant with every seed, print a table and a JSON line."""
    flags = parse_flags()
    budget = {
        **BUDGET,
        "train.examples": flags.examples,
        "train.epochs": flags.epochs,
        "train.evaluate_every": flags.epochs,
    }
    chosen = variants(flags.subject)
    if flags.only:
        unknown = set(flags.only) - set(chosen)
        if unknown:
            raise SystemExit(f"--only={unknown.pop()!r}; offered are {list(chosen)}")
        chosen = {name: keys for name, keys in chosen.items() if name in flags.only}
    cores: queue.SimpleQueue[int] = queue.SimpleQueue()
    available = sorted(os.sched_getaffinity(0))
    for core in available:
        cores.put(core)

    with tempfile.TemporaryDirectory() as scratch:

        def run(name: str, seed: int) -> dict[str, float]:
            keys = {
                **budget,
                **chosen[name],
                "seed": seed,
                "genotype": flags.genotype,
                "dataset.data_dir": flags.data_dir,
            }
            core = cores.get()
            try:
                base = (flags.keep or Path(scratch)) / name.replace(" ", "_") / str(seed)
                found = train(base, keys, core)
            finally:
                cores.put(core)
            print(f"{name}, seed {seed}: {found}", flush=True)
            return found

        # Seeds outermost: what ends early is a comparison of fewer seeds.
        wanted = [(name, seed) for seed in range(flags.seeds) for name in chosen]
        with concurrent.futures.ThreadPoolExecutor(len(available)) as pool:
            runs = list(pool.map(lambda pair: run(*pair), wanted))

    of = {
        name: [found for (own, _), found in zip(wanted, runs, strict=True) if own == name]
        for name in chosen
    }
    first = of[next(iter(chosen))]
    result = {
        "benchmark": f"train_variants {flags.subject}",
        "top1": {name: spread([run["top1"] for run in found]) for name, found in of.items()},
        # Of the same seeds.
        "difference": {
            name: spread(
                [one["top1"] - other["top1"] for one, other in zip(found, first, strict=True)]
            )
            for name, found in of.items()
        },
        "seconds": {name: spread([run["seconds"] for run in found]) for name, found in of.items()},
        "budget": budget,
        "cores": len(available),
        "python": platform.python_version(),
    }
    heads = ("top-1: mean [least, largest]", "paired difference")
    print(f"{'':44}{heads[0]:>30}{heads[1]:>30}")
    for name in of:
        top1, difference = result["top1"][name], result["difference"][name]
        print(f"{name:44}{spread_text(top1):>30}{spread_text(difference, '+'):>30}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
