"""How far the search's scores of operations repeat themselves, and what they say of trained cells.

    python benchmarks/indicator.py --data-dir DIR --keep KEEP

Trains supernets (child and parent) by rounds of Algorithm 9's first stage on a part of CIFAR-10
and scores architectures with them at several ages; trains the first of these architectures alone,
by final training; then prints reliabilities and Kendall's tau between the two (see
`indicator_report.py`), and one JSON object as the last line. What is found in KEEP is not measured
again, also after a kill. `--phase` runs a part of it.
"""

import argparse
import json
import os
import time
from pathlib import Path

import jax
import numpy as np
from config_files import load_config
from indicator_report import report
from small_cifar10 import RUN
from train_variants import run_all, train

from cpnas_jax.architecture.edge_policy import NONE
from cpnas_jax.architecture.genotype import from_architecture
from cpnas_jax.architecture.sampling import FIRST_STAGE, all_survivors, stage_permutations
from cpnas_jax.data.datasets import Split, limit_examples, load_split, train_validation_parts
from cpnas_jax.models.space import EDGES, NUM_INPUTS, NUM_NODES
from cpnas_jax.path_optimizer import CHILD
from cpnas_jax.runtime import environment
from cpnas_jax.search_networks import MODELS, EpochSums, Networks

SUPERNET = {
    **RUN,
    "search.examples": 1536,
    "search.score_examples": 256,
}
"""Keys of the supernets: 1,024 training images, scored on 256 others."""

RATE_ROUNDS = 8
"""The learning rates fall as in a search with so many rounds a stage."""

AGES = {1: 160, 4: 160, 12: 320}
"""Rounds of training -> architectures that are scored then, with the same weights."""

SPREAD_FROM, SPREAD = 9, 8
"""From this round on so many more architectures are scored after each sampled epoch."""

ALONE = {**SUPERNET, "search.examples": 2048, "search.score_examples": 0}
"""Keys of the trainings of a single architecture with the supernet's layers, of the 1-bit child."""

ALONE_EPOCHS, ALONE_TEST = 8, 10_000

FINAL = {
    **RUN,
    "network.channels": 8,
    "train.examples": 8_000,
    "train.epochs": 6,
    "train.evaluate_every": 6,
    # Compiling takes about as long as training.
    "runtime.optimization_level": 1,
}
"""Keys of the final trainings of an architecture, of the 1-bit child."""

PHASES = ("all", "supernets", "alone", "final", "report")

SCORED_SEED = 2**20
"""Of the permutations that are scored; those that are trained follow the supernet's seed."""


def scored_architectures(number: int, first: int = 0) -> np.ndarray:
    """Return int32[number, 2, 14] of whole rounds without replacement, from the first-th on."""
    rounds = range(first // FIRST_STAGE, -(-(first + number) // FIRST_STAGE))
    drawn = [stage_permutations(SCORED_SEED, FIRST_STAGE, t + 1, all_survivors()) for t in rounds]
    return np.concatenate(drawn)[:number]


def alive(architecture: np.ndarray) -> bool:
    """Return whether every node has an edge that is not `none`, as final training asks."""
    targets = np.array([target for _, target in EDGES])
    nodes = range(NUM_INPUTS, NUM_NODES)
    return all((cell[targets == node] != NONE).any() for cell in architecture for node in nodes)


def trained_positions(number: int) -> list[int]:
    """Return the positions of the first so many scored architectures that can be trained alone."""
    candidates = scored_architectures(2 * number)
    return [position for position, own in enumerate(candidates) if alive(own)][:number]


def configured(keys: dict[str, object], seed: int, data_dir: str):
    """Return the config of a search with these keys."""
    config = load_config("configs/cifar10.py:search")
    config.update_from_flattened_dict({**keys, "seed": seed, "dataset.data_dir": data_dir})
    return config


def images(config, split: str, examples: int) -> Split:
    """Return so many examples of a split, the same ones for every seed."""
    dataset = config.dataset
    whole = load_split(dataset.name, split, dataset.data_dir, dataset.image_size)
    return limit_examples(whole, examples, 0, "search.examples")


class Supernet:
    """A child and a parent under way, with files for what was scored and for going on."""

    def __init__(self, base: Path, sampling: str, seed: int, data_dir: str) -> None:
        self.base, self.sampling, self.seed = base, sampling, seed
        base.mkdir(parents=True, exist_ok=True)
        config = configured(SUPERNET, seed, data_dir)
        # The same images for every seed: what differs is the weights, their order and the paths.
        split = images(config, "train", config.search.examples)
        parts = train_validation_parts(split, config.search.validation_fraction, 0)
        total = RATE_ROUNDS * sum(range(2, FIRST_STAGE + 1))
        self.networks = Networks(
            config, *parts, total, time.monotonic(), takes_turns=sampling == "step"
        )
        self.start = self.networks.initial_state()

    def resume(self) -> int:
        """Load the newest state; return the rounds done."""
        path, leaves, done = self.base / "state.npz", jax.tree.leaves(self.start), 0
        if path.exists():
            with np.load(path) as stored:
                done = int(stored["rounds"])
                leaves = [stored[str(number)] for number in range(len(leaves))]
        self.networks.load(jax.tree.unflatten(jax.tree.structure(self.start), leaves))
        return done

    def scores(self, architectures: np.ndarray) -> dict[str, np.ndarray]:
        """Return architectures with accuracy and log-likelihood, f64[2, n], of child and parent."""
        found = [
            [self.networks.scores(model, own[None]) for own in architectures] for model in MODELS
        ]
        return {
            "architectures": architectures.astype(np.int8),
            **{
                name: np.array([[own[name][0] for own in of_model] for of_model in found])
                for name in ("accuracy", "log_likelihood")
            },
        }

    def epoch(self, number: int, paths: np.ndarray) -> None:
        """Train both models for an epoch, with a path int32[1, 2, 14] or one for each step."""
        for model in MODELS:
            sums = EpochSums()
            while sums.steps < self.networks.steps_per_epoch:
                self.networks.train(model, paths, number, sums)

    def round(self, number: int) -> None:
        """Train for a round, score on its way and after it, and save."""
        begin = time.monotonic()
        sampled = stage_permutations(self.seed, FIRST_STAGE, number, all_survivors())
        own, spread = [], []
        for sample, path in enumerate(sampled):
            epoch = (number - 1) * FIRST_STAGE + sample
            paths = path[None]
            if self.sampling == "step":
                steps = self.networks.steps_per_epoch
                rounds = range(-(-steps // FIRST_STAGE))
                # Numbers of rounds that no epoch before has had.
                first = epoch * len(rounds) + 1
                paths = np.concatenate(
                    [
                        stage_permutations(self.seed, FIRST_STAGE, first + t, all_survivors())
                        for t in rounds
                    ]
                )
            self.epoch(epoch, paths)
            own.append(self.scores(path[None]))
            if number >= SPREAD_FROM:
                first = ((number - SPREAD_FROM) * FIRST_STAGE + sample) * SPREAD
                spread.append(self.scores(scored_architectures(SPREAD, first)))
        trained = time.monotonic()
        rows = {"own": joined(own)}
        if spread:
            rows["spread"] = joined(spread)
        if number in AGES:
            rows["frozen"] = self.scores(scored_architectures(AGES[number]))
        arrays = {
            f"{name}.{key}": values for name, of in rows.items() for key, values in of.items()
        }
        save(self.base / f"round{number:02}.npz", arrays)
        leaves = jax.tree.leaves(self.networks.host_state())
        state = {str(position): leaf for position, leaf in enumerate(leaves)}
        save(self.base / "state.npz", {**state, "rounds": np.asarray(number)})
        text = ", ".join(f"{k} {v['accuracy'].mean(axis=1).round(3)}" for k, v in rows.items())
        seconds = f"{trained - begin:.0f} + {time.monotonic() - trained:.0f} s"
        print(f"{self.base.name}, round {number}: {text}, {seconds}", flush=True)


def joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Join rows; architectures go along the first axis, scores along the last."""
    return {
        key: np.concatenate([part[key] for part in parts], 0 if key == "architectures" else 1)
        for key in parts[0]
    }


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_suffix(".part.npz")
    np.savez(temporary, **arrays)
    os.replace(temporary, path)


def runs_alone(flags: argparse.Namespace) -> list[tuple[int, int]]:
    """Return (position, seed) of what is trained alone; the first few with a second seed too."""
    positions = trained_positions(flags.alone)
    return [(own, 0) for own in positions] + [(own, 1) for own in positions[: flags.repeated]]


def train_alone(flags: argparse.Namespace) -> None:
    """Train single architectures with the layers and the program of the supernet: none compiles."""
    base = flags.keep / "alone"
    base.mkdir(parents=True, exist_ok=True)
    wanted = [run for run in runs_alone(flags) if not (base / "{}-{}.json".format(*run)).exists()]
    networks, current = None, None
    drawn = scored_architectures(trained_positions(flags.alone)[-1] + 1)
    for position, seed in wanted:
        if networks is None or seed != current:
            config = configured(ALONE, seed, flags.data_dir)
            parts = (
                images(config, "train", ALONE["search.examples"]),
                images(config, "test", ALONE_TEST),
            )
            networks, current = Networks(config, *parts, ALONE_EPOCHS, time.monotonic()), seed
            start = networks.initial_state()
        networks.load(start)
        begin, losses = time.monotonic(), []
        own = drawn[position][None]
        for epoch in range(ALONE_EPOCHS):
            sums = EpochSums()
            while sums.steps < networks.steps_per_epoch:
                networks.train(CHILD, own, epoch, sums)
            losses.append(sums.mean_loss)
        found = {name: values[0] for name, values in networks.scores(CHILD, own).items()}
        found |= {"losses": losses, "seconds": time.monotonic() - begin}
        path = base / f"{position}-{seed}.json"
        path.with_suffix(".part").write_text(json.dumps(found))
        os.replace(path.with_suffix(".part"), path)
        print(f"alone {position}, seed {seed}: {found}", flush=True)


def train_finally(flags: argparse.Namespace) -> None:
    """Train the first architectures by final training, each a process that compiles its network."""
    positions = trained_positions(flags.final)
    drawn = scored_architectures(max(positions) + 1)
    base = flags.keep / "final"
    base.mkdir(parents=True, exist_ok=True)

    def run(name: str, seed: int, directory: Path, core: int) -> dict[str, float]:
        genotype = base / f"{name}.json"
        if not genotype.exists():
            from_architecture(drawn[int(name)]).save(genotype)
        keys = {**FINAL, "seed": seed, "genotype": genotype, "dataset.data_dir": flags.data_dir}
        return train(directory, keys, core)

    run_all([str(position) for position in positions], 1, base, run)


def main() -> None:
    """Measure what KEEP does not hold yet; report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True, help="where cifar10 is prepared")
    parser.add_argument("--keep", type=Path, required=True, help="directory for what is measured")
    parser.add_argument("--phase", choices=PHASES, default="all")
    parser.add_argument("--sampling", choices=("epoch", "step"), action="append")
    parser.add_argument("--seed", type=int, action="append", help="of supernets; 0 and 1")
    parser.add_argument("--rounds", type=int, default=max(AGES), help="of training of a supernet")
    parser.add_argument("--alone", type=int, default=32, help="architectures trained alone")
    parser.add_argument("--repeated", type=int, default=8, help="of them with a second seed")
    parser.add_argument("--final", type=int, default=24, help="of them by final training too")
    flags = parser.parse_args()
    environment.cache_compiled_programs()
    if flags.phase in ("all", "supernets"):
        for seed in flags.seed or (0, 1):
            for sampling in flags.sampling or ("epoch", "step"):
                base = flags.keep / f"{sampling}-{seed}"
                if (base / f"round{flags.rounds:02}.npz").exists():
                    continue
                supernet = Supernet(base, sampling, seed, flags.data_dir)
                for number in range(supernet.resume() + 1, flags.rounds + 1):
                    supernet.round(number)
    if flags.phase in ("all", "alone"):
        train_alone(flags)
    if flags.phase in ("all", "final"):
        train_finally(flags)
    report(flags.keep)


if __name__ == "__main__":
    main()
