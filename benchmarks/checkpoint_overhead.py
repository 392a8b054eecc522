"""What saving at every sampled epoch costs a search.

    python benchmarks/checkpoint_overhead.py [--config configs/mnist5k.py:search]
        [--data-dir DIR] [--seed 0]

One search, which saves after every other sampled epoch alone. A save costs the time for which the
search waits for it, and what it takes from the epoch that follows while it is written in the
background: the difference between sampled epochs with and without a save under way. Shares are of
a sampled epoch without a save, so that they are those of a search that saves after every one.
Prints a table, then one JSON object as the last line.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

from cpnas_jax.runtime import environment
from cpnas_jax.runtime.checkpoints import Checkpoints
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.search import search


def main() -> None:
    """Search once, print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/mnist5k.py:search")
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    path, _, words = flags.config.partition(":")
    spec = importlib.util.spec_from_file_location("config", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(words)
    config.seed, config.dataset.data_dir = flags.seed, flags.data_dir
    environment.cache_compiled_programs()

    waited: list[float] = []
    epochs = 0
    save = Checkpoints.save

    def every_other(self, *arguments):
        nonlocal epochs
        epochs += 1
        before = time.perf_counter()
        if epochs % 2:
            save(self, *arguments)
            waited.append(time.perf_counter() - before)
        else:
            # The next epoch has the processors for itself.
            self.wait()

    Checkpoints.save = every_other
    with tempfile.TemporaryDirectory() as scratch:
        workdir = Path(scratch) / "run"
        before = time.perf_counter()
        search(config, workdir, Reporter())
        whole = time.perf_counter() - before
        lines = [json.loads(line) for line in (workdir / "search/history.jsonl").open()]
    seconds = [line["seconds"] for line in lines if line["event"] == "sample"]
    # The first two compile; a save after an epoch of odd number is written during an even one.
    beside, apart = seconds[3::2], seconds[2::2]
    wait, slowed = statistics.mean(waited[1:]), statistics.mean(beside) - statistics.mean(apart)
    error = (
        statistics.variance(beside) / len(beside) + statistics.variance(apart) / len(apart)
    ) ** 0.5
    epoch = statistics.mean(apart)
    result = {
        "benchmark": "checkpoint_overhead",
        "config": flags.config,
        "whole_seconds": whole,
        "epoch_seconds": epoch,
        "wait_share": wait / epoch,
        "longest_wait_share": max(waited[1:]) / epoch,
        "background_share": slowed / epoch,
        "background_standard_error": error / epoch,
        "saves": len(waited),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    print(f"sampled epoch without a save   {epoch:8.3f} s   n = {len(apart)}")
    print(f"waiting for a save             {wait / epoch:8.2%}     n = {len(waited) - 1}")
    print(f"beside a save, longer by       {slowed / epoch:8.2%}     +- {error / epoch:.2%}")
    print(f"a save at every sampled epoch  {(wait + slowed) / epoch:8.2%}     of the run time")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
