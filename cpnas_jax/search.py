"""The search phase: Algorithm 9 of CP-NAS, resumable at every sampled epoch.

Reads the train split alone; the test split's file is never opened.
"""

import dataclasses
import os
import time
from typing import Any

import numpy as np
from ml_collections import config_dict

from cpnas_jax import figures
from cpnas_jax.architecture.alpha import restart, update_alpha
from cpnas_jax.architecture.events import sample_line, stage_line
from cpnas_jax.architecture.genotype import Genotype
from cpnas_jax.architecture.indicator import child_parent_score, drop_worst, indicator
from cpnas_jax.architecture.sampling import LAST_STAGE, num_sampled_epochs, stage_permutations
from cpnas_jax.config import config_hash, deciding_keys, flatten
from cpnas_jax.data.datasets import limit_examples, load_split, train_validation_parts
from cpnas_jax.data.undecodable import refuse_other, tell_skipped
from cpnas_jax.diagnosis import NotFinite
from cpnas_jax.path_optimizer import CHILD, PARENT
from cpnas_jax.runtime import environment, processes, stall
from cpnas_jax.runtime.checkpoints import Checkpoints, holds_checkpoints
from cpnas_jax.runtime.console import Reporter, duration
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.interruptions import Stopped, noted
from cpnas_jax.runtime.memory import describe
from cpnas_jax.runtime.workdir import History, Workdir
from cpnas_jax.search_networks import MODELS, Networks
from cpnas_jax.search_results import finish
from cpnas_jax.search_state import Position, Progress, Underway
from cpnas_jax.search_text import plan_text, stage_text


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
    # The first process may have to prepare what the others read.
    with stall.waiting("the data to be read"):
        split = processes.first_before_others(
            lambda: load_split(
                dataset.name,
                "train",
                dataset.data_dir or None,
                dataset.image_size or None,
                dataset.max_undecodable,
            )
        )
    processes.require_agreement("reading the data", undecodable=split.undecodable)
    undecodable = split.undecodable
    tell_skipped(reporter, {"train": len(undecodable)})
    split = limit_examples(split, config.search.examples, config.seed, "search.examples")
    fraction = config.search.validation_fraction
    train, validation = train_validation_parts(split, fraction, config.seed)
    total = num_sampled_epochs(config.search.rounds, len(config.search.operations))
    networks = Networks(config, train, validation, total, started)
    checkpoints = Checkpoints(
        directory.path / "search" / "checkpoints", config.runtime.keep_checkpoints
    )
    with checkpoints:
        run = _Run(config, networks, directory, checkpoints, reporter, total, undecodable)
        reporter.say(plan_text(config, train, validation, total, networks))
        run.resume_or_start()
        run.go_on()
    return finish(
        config,
        directory,
        reporter,
        run.history,
        run.progress.survivors,
        dataset=train.name,
        skipped=len(undecodable),
    )


def _refuse_other(config: config_dict.ConfigDict, directory: Workdir) -> None:
    """Compare a config with that of the run in the workdir.

    Before anything is searched there, only what a search shares with a training is compared.

    Raises:
        UserError: the workdir holds a run of another config; the differing keys are named.
    """
    keys, path = deciding_keys(config), directory.path
    searched = holds_checkpoints(path / "search" / "checkpoints")
    if not searched and not processes.from_first((path / "genotype.json").exists):
        trained = deciding_keys(config, "train")
        keys = {key: value for key, value in keys.items() if key in trained}
    directory.refuse_other(keys)


def _finished(directory: Workdir, config: config_dict.ConfigDict) -> Genotype | None:
    """Return the genotype of a finished search of this config, if the workdir holds it."""
    return processes.from_first(lambda: _found(directory, config))


def _found(directory: Workdir, config: config_dict.ConfigDict) -> Genotype | None:
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
        undecodable: tuple[int, ...],
    ) -> None:
        self.undecodable = undecodable
        self.config, self.networks, self.directory = config, networks, directory
        self.checkpoints, self.reporter, self.total = checkpoints, reporter, total
        self.progress = Progress.start(tuple(config.search.operations))
        self.held: dict[int, str] = {}
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
                Underway.from_record(found.record["underway"]),
            )
            self._refuse_other_paths(found.record["paths"])
            refuse_other("train", found.record["undecodable"], self.undecodable)
            self.history = History(self.history_path, found.record["history"])
            self.held[found.step] = self._where()
            self.reporter.say(f"Resumed {self._where()}.")
        self.networks.load(states)

    def _refuse_other_paths(self, stored: int) -> None:
        """Compare how many architectures are trained at the same time with a checkpoint's number.

        Raises:
            UserError: some are half trained, and here another number is trained together.
        """
        here = self.networks.paths
        if self.progress.underway.sums and stored != here:
            raise UserError(
                f"the search was stopped while {stored} architectures were trained at the same "
                f"time, and these devices train {here}; finish them on a number of devices that "
                f"makes {stored} groups (config.search.parallel is "
                f"{self.config.search.parallel!r})"
            )

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
        with noted():
            while position.stage >= LAST_STAGE:
                self._sampled_epoch(is_first=position.epoch == first)

    def _where(self) -> str:
        """Say where the search is."""
        position, underway = self.progress.position, self.progress.underway
        if not underway.sums:
            return f"after sampled epoch {position.epoch} of {self.total}"
        return (
            f"in sampled epoch {position.epoch + 1} of {self.total}, after step "
            f"{underway.own_sums().steps} of the {underway.next_model()}"
        )

    def _sampled_epoch(self, is_first: bool) -> None:
        progress, position = self.progress, self.progress.position
        compiled = sum(self.networks.compile_seconds.values())
        permutations = stage_permutations(
            self.config.seed, position.stage, position.round_index, progress.survivors
        )
        # One, or as many of the round's as are trained at the same time.
        first = position.sample - 1
        architectures = permutations[first : first + self.networks.paths]
        for _ in MODELS[len(progress.underway.accuracies) :]:
            self._train_and_score(architectures)
        underway, progress.underway = progress.underway, Underway()
        compiled = sum(self.networks.compile_seconds.values()) - compiled
        for number, architecture in enumerate(architectures):
            line = self._credit(architecture, underway, number, len(architectures))
            self._tell_epoch(line, underway, len(architectures), compiled, is_first and number == 0)
            self._advance()
        self._save()

    def _credit(
        self, architecture: np.ndarray, underway: Underway, number: int, together: int
    ) -> dict[str, Any]:
        """Give alpha what an architecture's accuracies say; return the line of the history."""
        progress, position = self.progress, self.progress.position
        accuracies = {model: underway.accuracies[model][number] for model in MODELS}
        z = child_parent_score(accuracies[CHILD], accuracies[PARENT], self.config.search.beta_p)
        progress.alpha, progress.alpha_state = update_alpha(
            progress.alpha, progress.alpha_state, architecture, z, position.round_index
        )
        line = sample_line(
            stage=position.stage,
            round_index=position.round_index,
            sample=position.sample,
            architecture=architecture,
            child_accuracy=accuracies[CHILD],
            parent_accuracy=accuracies[PARENT],
            z=z,
            seconds=underway.seconds / together,
        )
        processes.require_agreement(
            f"sampled epoch {position.epoch + 1}",
            architecture=architecture,
            accuracies=accuracies,
            alpha=progress.alpha,
            survivors=progress.survivors,
        )
        self.history.append(line)
        position.epoch += 1
        return line

    def _train_and_score(self, architectures: np.ndarray) -> None:
        """Take the next model through its part of the sampled epoch.

        Raises:
            Stopped: the run was asked to stop, and is saved.
        """
        networks, underway = self.networks, self.progress.underway
        model, sums, epoch = (
            underway.next_model(),
            underway.own_sums(),
            self.progress.position.epoch,
        )
        while sums.steps < networks.steps_per_epoch:
            before = time.monotonic()
            stall.at(f"search {self._where()}")
            try:
                stop = networks.train(model, architectures, epoch, sums)
            except NotFinite as error:
                raise error.naming(self.checkpoints.last_good(self.held)) from error
            underway.seconds += time.monotonic() - before
            if stop:
                self._save()
                self.checkpoints.wait()
                raise Stopped(self._where())
        before = time.monotonic()
        underway.accuracies[model] = networks.score(model, architectures)
        underway.seconds += time.monotonic() - before

    def _tell_epoch(
        self,
        line: dict[str, Any],
        underway: Underway,
        together: int,
        compiling: float,
        is_first: bool,
    ) -> None:
        """Say what a sampled epoch gave, and how long it takes apart from compiling."""
        position = self.progress.position
        seconds = (underway.seconds - compiling) / together
        images = 2 * self.networks.steps_per_epoch * self.config.search.batch_size / seconds
        left = seconds * (self.total - position.epoch)
        losses = " / ".join(f"{underway.sums[model].mean_loss:.2f}" for model in MODELS)
        self.reporter.advance(
            position.epoch,
            f"epoch {position.epoch}/{self.total} stage {line['stage']} round {line['round']} "
            f"sample {line['sample']}: A_C {line['child_accuracy']:.3f} A_P "
            f"{line['parent_accuracy']:.3f} z {line['z']:.3f} loss {losses}, "
            f"{images:.0f} images/s, {duration(left)} left",
        )
        # A search that was stopped after the last step of an epoch begins with scoring it.
        if is_first and self.networks.first_step_seconds is not None:
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
        progress = self.progress
        state = {**self.networks.host_state(), **progress.arrays()}
        record = {
            "position": dataclasses.asdict(progress.position),
            "underway": dataclasses.asdict(progress.underway),
            "paths": self.networks.paths,
            "undecodable": list(self.undecodable),
            "history": self.history.lines,
            "config_hash": config_hash(self.config),
        }
        number = progress.number(self.networks.steps_per_epoch)
        self.checkpoints.save(number, state, record)
        self.held[number] = self._where()
