"""Test accuracies and duration of the whole mnist5k pipeline over seeds.

python benchmarks/mnist5k_pipeline.py [--seeds 3] [--keep DIR]

Each run is a fresh process with an empty cache of compiled programs and an unprepared data set.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run(base: Path, seed: int) -> dict[str, float]:
    """Run the pipeline of the README with a seed; return accuracies and seconds."""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(base / "cache"),
        "TFDS_DATA_DIR": str(base / "tfds"),
    }
    main = [sys.executable, "-m", "cpnas_jax.main", "--config=configs/mnist5k.py"]
    started = time.monotonic()
    subprocess.run(
        [*main, f"--config.seed={seed}", f"--workdir={base / 'run'}"],
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    whole = time.monotonic() - started
    results = json.loads((base / "run/results.json").read_text())
    return {
        "child": results["train"]["test"]["top1"],
        "parent": results["parent"]["test"]["top1"],
        "compression": results["summary"]["compression"],
        "seconds": whole,
        **{f"{name}_seconds": results[name]["seconds"] for name in ("search", "train", "parent")},
    }


def main() -> None:
    """Run every seed, print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="directory for the runs' files")
    arguments = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(arguments.seeds):
            base = (arguments.keep or Path(scratch)) / f"seed{seed}"
            base.mkdir(parents=True)
            runs.append(run(base, seed))
            print(f"seed {seed}: " + ", ".join(f"{k} {v:.4g}" for k, v in runs[-1].items()))
    result = {
        "runs": runs,
        **{f"mean_{k}": statistics.mean(run[k] for run in runs) for k in runs[0]},
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
