"""What `config.search.parallel` does to what is found: small searches on CIFAR-10, over seeds.

    python benchmarks/search_parallel.py --seeds 3 --data-dir DIR

Every search is a process on a core of its own: `path` on several forced CPU devices, one to an
architecture; `data`, of which the number of devices is no hyper-parameter, on one. The 1-bit child
of what is found is trained by itself; `small_cifar10.py` has the budget of both. `--keep DIR` keeps
the workdirs, and what is finished there is not run again. A table of the children's test
accuracies, then one JSON object as the last line.
"""

import argparse
from pathlib import Path

from small_cifar10 import RUN
from train_variants import report, run_all, run_phase, train


def main() -> None:
    """Search and train with every seed, print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--devices", type=int, default=4, help="of `path`")
    parser.add_argument("--data-dir", required=True, help="where cifar10 is prepared")
    parser.add_argument("--keep", type=Path, help="directory for the runs' files")
    flags = parser.parse_args()

    def run(parallel: str, seed: int, base: Path, core: int) -> dict[str, float]:
        keys = {**RUN, "seed": seed, "dataset.data_dir": flags.data_dir}
        keys["search.parallel"] = parallel
        devices = flags.devices if parallel == "path" else 1
        searched = run_phase("search", base / "search", keys, core, devices)
        found = {**keys, "genotype": base / "search/genotype.json"}
        # The table's seconds are the search's.
        return {**train(base / "train", found, core), "seconds": searched["seconds"]}

    of = run_all(["data", "path"], flags.seeds, flags.keep, run)
    report("search_parallel", of, {**RUN, "devices": flags.devices})


if __name__ == "__main__":
    main()
