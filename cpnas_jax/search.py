"""The search phase: Algorithm 9 of CP-NAS, resumable at every sampled epoch.

Reads the train split alone; the test split's file is never opened.
"""

import dataclasses
import hashlib
import json
import os
import time
from typing import Any

import numpy as np
from ml_collections import config_dict

from cpnas_jax import figures
from cpnas_jax.architecture.alpha import restart, update_alpha
from cpnas_jax.architecture.edge_policy import Derivation, derive
from cpnas_jax.architecture.events import sample_line, stage_line
from cpnas_jax.architecture.genotype import Genotype
from cpnas_jax.architecture.indicator import child_parent_score, drop_worst, indicator
from cpnas_jax.architecture.replay import replay
from cpnas_jax.architecture.sampling import (
    LAST_STAGE,
    all_survivors,
    num_sampled_epochs,
    stage_permutations,
)
from cpnas_jax.config import config_hash, deciding_keys, flatten
from cpnas_jax.data.datasets import limit_examples, load_split, train_validation_parts
from cpnas_jax.data.undecodable import tell_skipped
from cpnas_jax.diagnosis import NotFinite
from cpnas_jax.models.space import CELL_TYPES
from cpnas_jax.path_optimizer import CHILD, PARENT
from cpnas_jax.runtime import environment
from cpnas_jax.runtime.checkpoints import Checkpoints, holds_checkpoints
from cpnas_jax.runtime.console import Reporter, duration
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.memory import describe
from cpnas_jax.runtime.workdir import History, Workdir
from cpnas_jax.search_networks import EpochResult, Networks
from cpnas_jax.search_text import plan_text, stage_text


@dataclasses.dataclass
class Position:
    """Where a search is: the next sampled epoch is sample `sample` of round `round_index`.

    Attributes:
        stage: K, operations left on each edge.
        round_index: t, from 1.
        sample: s, from 1.
        epoch: sampled epochs done in the whole search.
    """

    stage: int
    round_index: int = 1
    sample: int = 1
    epoch: int = 0


@dataclasses.dataclass
class Progress:
    """The discrete side of a search; with the networks' state all that decides its result."""

    position: Position
    survivors: np.ndarray
    alpha: Any
    alpha_state: Any

    @classmethod
    def start(cls, operations: tuple[str, ...]) -> "Progress":
        """Stand before the first stage."""
        return cls(Position(len(operations)), all_survivors(operations), *restart())

    def arrays(self) -> dict[str, Any]:
        """Return what a checkpoint stores beside the networks."""
        return {
            "survivors": self.survivors,
            "alpha": self.alpha,
            "alpha_state": self.alpha_state,
        }


def search(
    config: config_dict.ConfigDict, workdir: str | os.PathLike[str], reporter: Reporter
) -> Genotype:
    """Run or resume a search; return its genotype.

    Args:
        config: validated.
        workdir: where all files go (README, "Files of a run"); one that holds a run of the same
            config is resumed, a finished one is not run again.
        reporter: prints what happens.

    Returns:
        The genotype, also written to `genotype.json`.

    Raises:
        UserError: see the errors of the data, the workdir and the checkpoints.
    """
    with Workdir(workdir) as directory:
        return search_in(config, directory, reporter)


def search_in(config: config_dict.ConfigDict, directory: Workdir, reporter: Reporter) -> Genotype:
    """Do what `search` does, in a workdir that is open already."""
    started = environment.process_start()
    _refuse_other(config, directory)
    genotype = _finished(directory, config)
    if genotype is not None:
        reporter.say(f"The search in {directory.path} is finished; nothing is run again.")
        reporter.say(figures.cell_tables(genotype))
        return genotype

    dataset = config.dataset
    split = load_split(
        dataset.name,
        "train",
        dataset.data_dir or None,
        dataset.image_size or None,
        dataset.max_undecodable,
    )
    skipped = len(split.undecodable)
    tell_skipped(reporter, {"train": skipped})
    split = limit_examples(split, config.search.examples, config.seed, "search.examples")
    fraction = config.search.validation_fraction
    train, validation = train_validation_parts(split, fraction, config.seed)
    total = num_sampled_epochs(config.search.rounds, len(config.search.operations))
    networks = Networks(config, train, validation, total, started)
    checkpoints = Checkpoints(
        directory.path / "search" / "checkpoints", config.runtime.keep_checkpoints
    )
    with checkpoints:
        run = _Run(config, networks, directory, checkpoints, reporter, total)
        reporter.say(plan_text(config, train, validation, total, networks.steps_per_epoch))
        run.resume_or_start()
        run.go_on()
    return run.finish(train.name, skipped)


def _refuse_other(config: config_dict.ConfigDict, directory: Workdir) -> None:
    """Compare a config with that of the run in the workdir.

    Before anything is searched there, only what a search shares with a training is compared.

    Raises:
        UserError: the workdir holds a run of another config; the differing keys are named.
    """
    keys = deciding_keys(config)
    searched = holds_checkpoints(directory.path / "search" / "checkpoints")
    if not searched and not (directory.path / "genotype.json").exists():
        trained = deciding_keys(config, "train")
        keys = {key: value for key, value in keys.items() if key in trained}
    directory.refuse_other(keys)


def _finished(directory: Workdir, config: config_dict.ConfigDict) -> Genotype | None:
    """Return the genotype of a finished search of this config, if the workdir holds it."""
    path = directory.path / "genotype.json"
    if not path.exists():
        return None
    try:
        genotype = Genotype.load(path)
    except UserError as error:
        raise UserError(
            f"{error}. Delete it: the same command writes it again from the checkpoint"
        ) from error
    found, expected = dict(genotype.provenance).get("config_hash"), config_hash(config)
    if found != expected:
        raise UserError(
            f"{path} is not of this config (its config_hash is {found!r}, here {expected!r}); "
            "move it away or use another --workdir"
        )
    return genotype


class _Run:
    """The loop of a search over its networks, files and messages."""

    def __init__(
        self,
        config: config_dict.ConfigDict,
        networks: Networks,
        directory: Workdir,
        checkpoints: Checkpoints,
        reporter: Reporter,
        total: int,
    ) -> None:
        self.config, self.networks, self.directory = config, networks, directory
        self.checkpoints, self.reporter, self.total = checkpoints, reporter, total
        self.progress = Progress.start(tuple(config.search.operations))
        self.history: History
        self.history_path = directory.path / "search" / "history.jsonl"

    def resume_or_start(self) -> None:
        """Take up the newest checkpoint, or begin with fresh weights and an empty history.

        Raises:
            UserError: the checkpoint is another config's.
        """
        states = self.networks.initial_state()
        found = self.checkpoints.restore_newest(
            {**states, **self.progress.arrays()}, config_hash(self.config)
        )
        changes = self.directory.claim(
            "search",
            flatten(self.config),
            environment.record(),
            deciding_keys(self.config),
            resumed=found is not None,
        )
        if changes:
            self.reporter.say(
                f"Begun elsewhere: {'; '.join(changes)}. The search goes on, but need not end "
                "bitwise as it would have there."
            )
        if found is None:
            self.history = History(self.history_path, [])
        else:
            states = {name: found.state[name] for name in states}
            self.progress = Progress(
                Position(**found.record["position"]),
                found.state["survivors"],
                found.state["alpha"],
                found.state["alpha_state"],
            )
            self.history = History(self.history_path, found.record["history"])
            self.reporter.say(
                f"Resumed after sampled epoch {self.progress.position.epoch} of {self.total}."
            )
        self.networks.load(states)

    def go_on(self) -> None:
        """Sample, train, score and drop until one operation is left on every edge."""
        position = self.progress.position
        if position.stage < LAST_STAGE:
            return
        self.reporter.start_progress(self.total, position.epoch, "compiling the training program")
        self.networks.compile()
        self.reporter.say(
            f"Compiled in {self.networks.compile_seconds['train']:.1f} s; estimated memory of a "
            f"device: {describe(self.networks.memory_bytes())}."
        )
        first = position.epoch
        self.reporter.show(f"sampled epoch {first + 1}/{self.total}")
        while position.stage >= LAST_STAGE:
            self._sampled_epoch(is_first=position.epoch == first)

    def _sampled_epoch(self, is_first: bool) -> None:
        progress, position, search = self.progress, self.progress.position, self.config.search
        before, compiled = time.monotonic(), sum(self.networks.compile_seconds.values())
        permutations = stage_permutations(
            self.config.seed, position.stage, position.round_index, progress.survivors
        )
        architecture = permutations[position.sample - 1]
        trained, accuracies = {}, {}
        for model in (CHILD, PARENT):
            try:
                trained[model] = self.networks.train_epoch(model, architecture, position.epoch)
            except NotFinite as error:
                # Its number is that of the sampled epochs done.
                held = {position.epoch: f"after sampled epoch {position.epoch}"}
                raise error.naming(self.checkpoints.last_good(held)) from error
            accuracies[model] = self.networks.score(model, architecture)
        z = child_parent_score(accuracies[CHILD], accuracies[PARENT], search.beta_p)
        progress.alpha, progress.alpha_state = update_alpha(
            progress.alpha, progress.alpha_state, architecture, z, position.round_index
        )
        seconds = time.monotonic() - before
        line = sample_line(
            stage=position.stage,
            round_index=position.round_index,
            sample=position.sample,
            architecture=architecture,
            child_accuracy=accuracies[CHILD],
            parent_accuracy=accuracies[PARENT],
            z=z,
            seconds=seconds,
        )
        self.history.append(line)
        position.epoch += 1
        compiled = sum(self.networks.compile_seconds.values()) - compiled
        self._tell_epoch(line, trained, seconds - compiled, is_first)
        self._advance()
        self._save()

    def _tell_epoch(
        self,
        line: dict[str, Any],
        trained: dict[str, EpochResult],
        seconds: float,
        is_first: bool,
    ) -> None:
        position = self.progress.position
        images = 2 * self.networks.steps_per_epoch * self.config.search.batch_size / seconds
        left = seconds * (self.total - position.epoch)
        self.reporter.advance(
            position.epoch,
            f"epoch {position.epoch}/{self.total} stage {line['stage']} round {line['round']} "
            f"sample {line['sample']}: A_C {line['child_accuracy']:.3f} A_P "
            f"{line['parent_accuracy']:.3f} z {line['z']:.3f} loss {trained[CHILD].loss:.2f} / "
            f"{trained[PARENT].loss:.2f}, {images:.0f} images/s, {duration(left)} left",
        )
        if is_first:
            assert self.networks.first_step_seconds is not None
            self.reporter.say(
                f"First training step {self.networks.first_step_seconds:.1f} s after the start; "
                f"all {self.total} sampled epochs will take about {duration(seconds * self.total)}."
            )

    def _advance(self) -> None:
        """Go to the next sample; at the end of a stage drop an operation of every edge."""
        progress, position = self.progress, self.progress.position
        position.sample += 1
        if position.sample > position.stage:
            position.sample, position.round_index = 1, position.round_index + 1
        if position.round_index <= self.config.search.rounds:
            return
        values = indicator(progress.alpha, progress.survivors)
        remaining, dropped = drop_worst(values, progress.survivors)
        line = stage_line(
            stage=position.stage,
            indicator=values,
            survivors=progress.survivors,
            dropped=dropped,
        )
        self.history.append(line)
        self.reporter.say(stage_text(line))
        progress.survivors = remaining
        position.stage, position.round_index = position.stage - 1, 1
        progress.alpha, progress.alpha_state = restart()

    def _save(self) -> None:
        state = {**self.networks.host_state(), **self.progress.arrays()}
        record = {
            "position": dataclasses.asdict(self.progress.position),
            "history": self.history.lines,
            "config_hash": config_hash(self.config),
        }
        self.checkpoints.save(self.progress.position.epoch, state, record)

    def finish(self, dataset: str, skipped: int) -> Genotype:
        """Check the whole log, derive the genotype from it, and write the results.

        Args:
            dataset: its name.
            skipped: training examples that cannot be decoded.
        """
        config, lines = self.config, self.history.lines
        checked = replay(
            lines,
            seed=config.seed,
            rounds=config.search.rounds,
            beta_p=config.search.beta_p,
            operations=tuple(config.search.operations),
            name=str(self.history_path),
        )
        assert checked.operations is not None
        assert checked.mean_z is not None
        assert checked.compared is not None
        assert (checked.survivors == self.progress.survivors).all()
        derivation = derive(
            checked.operations,
            checked.mean_z,
            checked.compared,
            config.search.edge_policy,
            indicator=indicator(
                dict(zip(CELL_TYPES, checked.mean_z, strict=True)), checked.compared
            ),
            provenance={
                "config_hash": config_hash(config),
                "seed": config.seed,
                "dataset": dataset,
            },
        )
        for restored in derivation.restored:
            self.reporter.say(str(restored))
        genotype = derivation.genotype
        path = self.directory.path
        drawings = figures.draw_cells(genotype, path) + figures.draw_accuracies(lines, path)
        self.reporter.say(figures.cell_tables(genotype))
        self._write_results(derivation, lines, skipped)
        genotype.save(path / "genotype.json")
        self.reporter.say(
            f"Wrote {path / 'genotype.json'} and {', '.join(p.name for p in drawings)}."
        )
        return genotype

    def _write_results(
        self, derivation: Derivation, lines: list[dict[str, Any]], skipped: int
    ) -> None:
        samples = [line for line in lines if line["event"] == "sample"]
        timeless = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
        results = self.directory.read_json("results.json") or {}
        results["search"] = {
            "sampled_epochs": len(samples),
            # Of the sampled epochs; starting and compiling the training program not included.
            "seconds": sum(line["seconds"] for line in samples),
            "last_child_accuracy": samples[-1]["child_accuracy"],
            "last_parent_accuracy": samples[-1]["parent_accuracy"],
            "operation_counts": derivation.genotype.operation_counts(),
            # Edges that are not as the search left them, such as those of a dead node.
            "restored": [str(restored) for restored in derivation.restored],
            "undecodable": {"train": skipped},
            # Two runs took the same way exactly if these agree; durations are left out.
            "history_sha256": hashlib.sha256(json.dumps(timeless).encode()).hexdigest(),
            "config_hash": config_hash(self.config),
        }
        self.directory.write_json("results.json", results)
