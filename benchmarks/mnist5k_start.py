"""Time of a whole mnist5k search in a fresh process, and to its first training step.

python benchmarks/mnist5k_start.py [--starts 5]

The first run has an empty cache of compiled programs and prepares its data set; it is timed to the
end. The others start the same search with the warm cache and are ended after the first step.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FIRST_STEP = re.compile(r"First training step ([\d.]+) s after the start")


def command(workdir: Path) -> list[str]:
    """Return the search of the README, unbuffered so that its lines can be timed."""
    main = [sys.executable, "-u", "-m", "cpnas_jax.main"]
    return [*main, "--config=configs/mnist5k.py:search", f"--workdir={workdir}"]


def run(workdir: Path, environment: dict[str, str], to_the_end: bool) -> tuple[float, float]:
    """Return seconds to the first step, as the run says, and seconds until it was over."""
    started = time.monotonic()
    process = subprocess.Popen(command(workdir), env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    first = float("nan")
    for line in process.stdout:
        found = FIRST_STEP.search(line)
        if found:
            first = float(found[1])
            if not to_the_end:
                process.kill()
    status = process.wait()
    if to_the_end and status:
        raise SystemExit(f"the search failed with status {status}")
    return first, time.monotonic() - started


def main() -> None:
    """Run, print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=5, help="warm starts")
    starts = parser.parse_args().starts
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        environment = {
            **os.environ,
            "XDG_CACHE_HOME": str(base / "cache"),
            "TFDS_DATA_DIR": str(base / "tfds"),
        }
        cold, whole = run(base / "cold", environment, to_the_end=True)
        warm = [run(base / f"warm{i}", environment, to_the_end=False)[0] for i in range(starts)]
    result = {
        "whole_search_seconds": whole,
        "first_step_seconds_cold": cold,
        "first_step_seconds_warm": warm,
        "first_step_seconds_warm_median": statistics.median(warm),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    print(f"whole search, empty cache      {whole:7.1f} s")
    print(f"first step, empty cache        {cold:7.1f} s")
    print(
        f"first step, warm cache, n = {starts}  {statistics.median(warm):7.1f} s "
        f"({min(warm):.1f} to {max(warm):.1f})"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
