"""What saving at every sampled epoch costs a search.

    python benchmarks/checkpoint_overhead.py [--config configs/mnist5k.py:search]
        [--data-dir DIR] [--seed 0] [--pairs 20]

Architectures differ by more than a save costs. So every sampled epoch is run twice with the same
architecture, from the same weights, once with the save of the epoch before written in the
background and once without, in alternating order. The cost is the time for which the search waits
until the background takes over, and the difference between the two. Processor time, of all cores,
is less noisy than time, and an upper bound of what a save costs a search that keeps all cores
busy is its share. Prints a table, then one JSON object as the last line.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time

import numpy as np
from config_files import load_config

from cpnas_jax.architecture.events import sample_line
from cpnas_jax.architecture.sampling import (
    all_survivors,
    num_sampled_epochs,
    stage_permutations,
)
from cpnas_jax.data.datasets import limit_examples, load_split, train_validation_parts
from cpnas_jax.runtime import environment
from cpnas_jax.runtime.checkpoints import Checkpoints
from cpnas_jax.search_networks import MODELS, EpochSums, Networks
from cpnas_jax.search_state import Position, Progress
from cpnas_jax.strategies import sampled_strategy


def sampled_epoch(networks: Networks, architectures: np.ndarray) -> None:
    """Train and score both models, as a search does."""
    for model in MODELS:
        sums = EpochSums()
        while sums.steps < networks.steps_per_epoch:
            networks.train(model, architectures, 0, sums)
        networks.score(model, architectures)


def main() -> None:
    """Time pairs of sampled epochs, print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/mnist5k.py:search")
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=20)
    flags = parser.parse_args()
    config = load_config(flags.config)
    config.seed, config.dataset.data_dir = flags.seed, flags.data_dir
    environment.cache_compiled_programs()
    split = load_split(
        config.dataset.name,
        "train",
        config.dataset.data_dir or None,
        config.dataset.image_size or None,
    )
    split = limit_examples(split, config.search.examples, config.seed, "search.examples")
    parts = train_validation_parts(split, config.search.validation_fraction, config.seed)
    total = num_sampled_epochs(config.search.rounds)
    networks = Networks(config, *parts, total, time.monotonic())
    networks.load(networks.initial_state())
    strategy = sampled_strategy(config)
    survivors, stage = all_survivors(strategy.operations), len(strategy.operations)
    progress = Progress(Position(stage), survivors, *strategy.begin_alpha())
    # As long a history as a search has in the end.
    history = []

    waits, differences, alone, processor, processor_alone = [], [], [], [], []
    with tempfile.TemporaryDirectory() as scratch, Checkpoints(scratch, keep=2) as checkpoints:

        def timed(architecture: np.ndarray, number: int | None) -> tuple[float, float, float]:
            """Return the seconds of waiting for a save, of the sampled epoch, and of processors."""
            before, used = time.perf_counter(), time.process_time()
            if number is not None:
                state = {**networks.host_state(), **progress.arrays()}
                checkpoints.save(number, state, {"history": history})
            begun = time.perf_counter()
            sampled_epoch(networks, architecture)
            ended = time.perf_counter()
            checkpoints.wait()
            return begun - before, ended - begun, time.process_time() - used

        for pair in range(-1, flags.pairs):
            round_index, sample = divmod(pair + 1, 8)
            architecture = stage_permutations(0, 8, round_index + 1, progress.survivors)[sample]
            history += 2 * [
                sample_line(
                    stage=8,
                    round_index=round_index + 1,
                    sample=sample + 1,
                    architecture=architecture,
                    child_accuracy=0.5,
                    parent_accuracy=0.5,
                    z=0.5,
                    seconds=1.0,
                )
            ]
            states = networks.host_state()
            found = {}
            for saved in (True, False) if pair % 2 else (False, True):
                networks.load(states)
                found[saved] = timed(architecture[None], pair + 1 if saved else None)
            # The first pair compiles.
            if pair >= 0:
                waits.append(found[True][0])
                differences.append(found[True][1] - found[False][1])
                alone.append(found[False][1])
                processor.append(found[True][2] - found[False][2])
                processor_alone.append(found[False][2])
    epoch, number = statistics.mean(alone), len(alone)
    costs = [wait + difference for wait, difference in zip(waits, differences, strict=True)]
    busy = statistics.mean(processor_alone)
    shares = {
        name: (statistics.mean(values) / whole, statistics.stdev(values) / number**0.5 / whole)
        for name, values, whole in (
            ("wait", waits, epoch),
            ("background", differences, epoch),
            ("save", costs, epoch),
            ("processor time", processor, busy),
        )
    }
    print(f"sampled epoch without a save   {epoch:8.3f} s   n = {number}")
    for name, (share, error) in shares.items():
        print(f"{name:<30} {share:8.2%}   standard error {error:.2%}")
    result = {
        "benchmark": "checkpoint_overhead",
        "config": flags.config,
        "epoch_seconds": epoch,
        "epoch_processor_seconds": busy,
        "pairs": number,
        "shares": {name: share for name, (share, _) in shares.items()},
        "standard_errors": {name: error for name, (_, error) in shares.items()},
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
