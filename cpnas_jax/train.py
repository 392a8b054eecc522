"""The training phase: a genotype in, a trained network out, resumable at every checkpoint."""

import contextlib
import dataclasses
import os
from typing import Any

from ml_collections import config_dict

from cpnas_jax.architecture.genotype import Genotype
from cpnas_jax.config_keys import deciding_keys, flatten
from cpnas_jax.data.undecodable import tell_skipped
from cpnas_jax.diagnosis import NotFinite
from cpnas_jax.evaluate import Evaluation
from cpnas_jax.feed import Facts, Feed
from cpnas_jax.feeds import open_feed
from cpnas_jax.network_config import network_settings
from cpnas_jax.runtime import environment, processes, stall
from cpnas_jax.runtime.board import Board, board_directory
from cpnas_jax.runtime.checkpoints import Checkpoints
from cpnas_jax.runtime.console import Reporter, duration
from cpnas_jax.runtime.interruptions import Stopped, noted
from cpnas_jax.runtime.workdir import History, Workdir
from cpnas_jax.trained import (
    check_cells,
    directory_name,
    finished,
    refuse_other,
    resolve_genotype,
    training_hash,
)
from cpnas_jax.trainer import EpochSums, Trainer


@dataclasses.dataclass
class Position:
    """Where a training is: the next step is step `step` of epoch `epoch`, both from 0."""

    epoch: int = 0
    step: int = 0


def train(
    config: config_dict.ConfigDict, workdir: str | os.PathLike[str], reporter: Reporter
) -> None:
    """Train the network of `config.genotype`, or go on with it.

    Args:
        config: validated.
        workdir: where all files go; one that holds a run of the same config is resumed.
        reporter: prints what happens.

    Raises:
        UserError: see the errors of the genotype, the data, the workdir and the checkpoints.
    """
    genotype = resolve_genotype(config, workdir)
    with Workdir(workdir) as directory:
        refuse_other(config, directory)
        binary = config.network.precision == "binary"
        if not finished(config, directory, reporter, genotype, binary=binary):
            with contextlib.closing(open_feed(config)) as feed:
                train_network(config, directory, reporter, genotype, feed, binary=binary)


def _plan(config: config_dict.ConfigDict, trainer: Trainer, facts: Facts, edges: int) -> str:
    """Say what will happen, in a few lines."""
    size = "x".join(map(str, facts.image_shape))
    network, options = config.network, config.train
    kind = "1-bit child" if trainer.precision == "binary" else "float parent"
    return "\n".join(
        [
            f"Training a {kind} on {facts.name}: {facts.num_train} training and "
            f"{facts.num_test} {config.evaluate.split} images of {size}, {facts.num_classes} "
            "classes.",
            f"Network: {network.cells} cells, C {network.channels}, {edges} edges a cell.",
            f"{options.epochs} epochs of {trainer.steps_per_epoch} steps, evaluated every "
            f"{options.evaluate_every}.",
            environment.devices_text(options.batch_size),
        ]
    )


def train_network(
    config: config_dict.ConfigDict,
    directory: Workdir,
    reporter: Reporter,
    genotype: Genotype,
    feed: Feed,
    *,
    binary: bool,
) -> None:
    """Train one network in its part of a workdir; write what `results.json` says of it."""
    name, facts = directory_name(binary), feed.facts
    settings = network_settings(config, genotype, facts.num_classes, binary=binary)
    trainer = Trainer(config, settings, feed)
    reporter.say(_plan(config, trainer, facts, len(genotype.normal)))
    root = directory.path / name
    check_cells(directory, name, genotype)
    with (
        Checkpoints(root / "checkpoints", config.runtime.keep_checkpoints) as last,
        # The one before is the best again when a kill falls between this save and the other.
        Checkpoints(root / "best", 2) as best,
    ):
        run = _Run(config, genotype, trainer, directory, name, last, best, reporter)
        run.resume_or_start()
        processes.first_alone(lambda: genotype.save(root / "genotype.json"))
        run.go_on()
    results = directory.read_json("results.json") or {}
    results[name] = run.results()
    directory.write_json("results.json", results)
    tell_skipped(reporter, results[name]["undecodable"])


class _Run:
    """The loop of a training over its trainer, files and messages."""

    def __init__(
        self,
        config: config_dict.ConfigDict,
        genotype: Genotype,
        trainer: Trainer,
        directory: Workdir,
        name: str,
        last: Checkpoints,
        best: Checkpoints,
        reporter: Reporter,
    ) -> None:
        self.config, self.trainer, self.directory = config, trainer, directory
        self.hash = training_hash(config, genotype, binary=trainer.precision == "binary")
        self.name, self.last, self.best, self.reporter = name, last, best, reporter
        self.position, self.sums = Position(), EpochSums()
        self.best_accuracy, self.best_epoch = -1.0, 0
        self.history: History
        self.board: Board
        self.held: dict[int, str] = {}
        self.evaluated: Evaluation | None = None

    def resume_or_start(self) -> None:
        """Take up the newest checkpoint, or begin with fresh weights.

        Raises:
            UserError: the checkpoint is another config's, or none can be read; the training does
                not fit on a device.
        """
        state = self.trainer.initial_state()
        found = self.last.restore_newest(state, self.hash)
        lines: list[dict[str, Any]] = []
        if found is not None:
            state, lines = found.state, found.record["history"]
            self.position = Position(**found.record["position"])
            self.sums = EpochSums(**found.record["sums"])
            self.held[found.step] = self._reached()
            self.best_accuracy = found.record["best_accuracy"]
            self.best_epoch = found.record["best_epoch"]
            self.trainer.met_before(found.record["undecodable"])
            epochs = self.config.train.epochs
            self.reporter.say(
                f"Resumed in epoch {self.position.epoch + 1} of {epochs}, after step "
                f"{self.position.step}."
                if self.position.epoch < epochs
                else f"Resumed after the last of {epochs} epochs."
            )
        self.trainer.load(state)
        self._compile()
        # Not before: a run that does not fit leaves the workdir to one that does.
        own = deciding_keys(self.config, "train")
        changes = self.directory.claim(
            self.name,
            flatten(self.config),
            environment.record(),
            own,
            resumed=found is not None,
        )
        if changes:
            self.reporter.say(
                f"Begun elsewhere: {'; '.join(changes)}. The training goes on, but need not end "
                "bitwise as it would have there."
            )
        # One that was saved after the newest checkpoint will be saved again, bit by bit.
        self.best.forget_above(self.position.epoch)
        if self.best_epoch not in self.best.steps():
            self.best_accuracy, self.best_epoch = -1.0, 0
        self.history = History(self.directory.path / self.name / "metrics.jsonl", lines)

    def _compile(self) -> None:
        first, epochs = self.position.epoch, self.config.train.epochs
        if first < epochs:
            self.reporter.start_progress(epochs, first, "compiling the programs")
            self.trainer.compile(first, epochs - 1)
            self.reporter.show(f"epoch {first + 1}/{epochs}")
            self.reporter.say(self.trainer.compiled_text("train"))

    def go_on(self) -> None:
        """Train to the last epoch, evaluating and saving on the way."""
        position, epochs = self.position, self.config.train.epochs
        path = board_directory(self.directory.path, self.name)
        wanted = self.config.runtime.tensorboard
        self.board = Board(path, position.epoch + 1, wanted=wanted)
        with noted(), contextlib.closing(self.board):
            while position.epoch < epochs:
                self._epoch()
        self.evaluated = self.evaluated or self.trainer.evaluate(epochs - 1)

    def _epoch(self) -> None:
        position, steps = self.position, self.trainer.steps_per_epoch
        every = self.config.runtime.checkpoint_every or steps
        while position.step < steps:
            # Calls end at the same steps wherever a run was interrupted.
            since = position.step % every
            left = self.config.runtime.steps_per_call - since % self.config.runtime.steps_per_call
            count = min(left, every - since, steps - position.step)
            stall.at(f"{self.name} {self._where()}")
            try:
                stop = self.trainer.train(position.epoch, position.step, count, self.sums)
            except NotFinite as error:
                raise error.naming(self.last.last_good(self.held)) from error
            position.step += count
            if stop:
                self._save()
                self.last.wait()
                raise Stopped(self._where())
            if position.step % every == 0 and position.step < steps:
                self._save()
        self._end_epoch()

    def _where(self) -> str:
        """Say where the training is."""
        return (
            f"in epoch {self.position.epoch + 1} of {self.config.train.epochs}, after step "
            f"{self.position.step} of {self.trainer.steps_per_epoch}"
        )

    def _end_epoch(self) -> None:
        position, config = self.position, self.config
        means, seconds = self.sums.means(), self.sums.seconds
        done = position.epoch + 1
        step = done * self.trainer.steps_per_epoch
        line: dict[str, Any] = {
            "event": "epoch",
            "epoch": done,
            "step": step,
            **means,
            "learning_rate": self.trainer.learning_rate(step - 1),
            "images_per_second": self.sums.steps * config.train.batch_size / seconds,
            "seconds": seconds,
        }
        text = f"epoch {done}/{config.train.epochs}: loss {means['loss']:.3f} "
        text += f"accuracy {means['accuracy']:.4f}"
        self.evaluated = None
        if done % config.train.evaluate_every == 0 or done == config.train.epochs:
            self.evaluated = self.trainer.evaluate(position.epoch)
            line["test_accuracy"] = self.evaluated.top1
            line["test_loss"] = self.evaluated.loss
            text += f" {config.evaluate.split} {self.evaluated.top1:.4f}"
        processes.require_agreement(f"epoch {done}", **self._agreed())
        self.history.append(line)
        self.board.scalars(done, {key: line[key] for key in line if key not in ("event", "epoch")})
        self.board.flush()
        position.epoch, position.step, self.sums = done, 0, EpochSums()
        left = seconds * (config.train.epochs - done)
        self.reporter.advance(
            done, f"{text}, {line['images_per_second']:.0f} images/s, {duration(left)} left"
        )
        # With real weights it is not the network that is asked for.
        candidate = None if self.trainer.real_weights(done - 1) else self.evaluated
        if candidate is not None and candidate.top1 > self.best_accuracy:
            self.best_accuracy, self.best_epoch = candidate.top1, done
            self.best.save(done, self.trainer.host_state(), self._record())
            # A newer checkpoint must not tell of a best one that is not on the disk.
            self.best.wait()
        self._save()

    def _agreed(self) -> dict[str, Any]:
        """Return what must be the same in all processes."""
        found = self.evaluated
        return {"metrics": self.sums.values, "evaluation": found and found.to_dict()}

    def _record(self) -> dict[str, Any]:
        return {
            "position": dataclasses.asdict(self.position),
            "sums": dataclasses.asdict(self.sums),
            "history": self.history.lines,
            "best_accuracy": self.best_accuracy,
            "best_epoch": self.best_epoch,
            "undecodable": self.trainer.undecodable(),
            "config_hash": self.hash,
        }

    def _save(self) -> None:
        # One more than the steps: all steps done is not yet the epoch evaluated.
        number = self.position.epoch * (self.trainer.steps_per_epoch + 1) + self.position.step
        self.last.save(number, self.trainer.host_state(), self._record())
        self.held[number] = self._reached()

    def _reached(self) -> str:
        epoch, step = self.position.epoch, self.position.step
        return f"after step {step} of epoch {epoch + 1}" if step else f"after epoch {epoch}"

    def results(self) -> dict[str, Any]:
        """Return what a script reads of the finished training."""
        assert self.evaluated is not None
        skipped = self.trainer.undecodable()
        return {
            "epochs": self.config.train.epochs,
            "split": self.config.evaluate.split,
            "seconds": sum(line["seconds"] for line in self.history.lines),
            "test": {
                key: value
                for key, value in self.evaluated.to_dict().items()
                if key not in ("confusion", "per_class")
            },
            # Chosen on the same images it is measured on: not an estimate for others.
            "best_test_accuracy": self.best_accuracy,
            "best_epoch": self.best_epoch,
            "undecodable": {split: len(rows) for split, rows in skipped.items()},
            "config_hash": self.hash,
        }
