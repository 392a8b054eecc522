"""Modes that look at a network: what it costs, and what a trained one answers."""

import contextlib
import os
from typing import Any

from ml_collections import config_dict

from cpnas_jax import evaluate as evaluation
from cpnas_jax import predictions
from cpnas_jax.architecture.genotype import Genotype
from cpnas_jax.data.datasets import describe
from cpnas_jax.data.undecodable import tell_skipped
from cpnas_jax.feed import Feed
from cpnas_jax.feeds import open_feed
from cpnas_jax.models.summary import Summary, summarise, table
from cpnas_jax.network_config import network_settings
from cpnas_jax.runtime.checkpoints import Checkpoints, holds_checkpoints
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.workdir import Workdir
from cpnas_jax.trained import (
    begun,
    check_cells,
    directory_name,
    refuse_other,
    resolve_genotype,
    training_hash,
)
from cpnas_jax.trainer import Trainer


def summary_mode(
    config: config_dict.ConfigDict, workdir: str | os.PathLike[str], reporter: Reporter
) -> None:
    """Say what the network of `config.genotype` costs, without its data and without training."""
    genotype = resolve_genotype(config, workdir)
    with Workdir(workdir) as directory:
        binary = config.network.precision == "binary"
        if begun(directory):
            refuse_other(config, directory, "evaluate.split", "evaluate.examples")
            check_cells(directory, directory_name(binary), genotype)
        reporter.say(table(write_summary(config, directory, genotype, binary=binary)))


def write_summary(
    config: config_dict.ConfigDict, directory: Workdir, genotype: Genotype, *, binary: bool
) -> Summary:
    """Write `summary.json`, or a parent's `summary_parent.json`, and return what is in it."""
    dataset = config.dataset
    shape, classes = describe(dataset.name, dataset.data_dir or None, dataset.image_size or None)
    settings = network_settings(config, genotype, classes, binary=binary)
    summary = summarise(settings, shape)
    directory.write_json("summary.json" if binary else "summary_parent.json", summary.to_dict())
    return summary


def evaluate_mode(
    config: config_dict.ConfigDict, workdir: str | os.PathLike[str], reporter: Reporter
) -> None:
    """Count the answers of a trained network over a split; see `evaluate_network`."""
    genotype = resolve_genotype(config, workdir)
    with Workdir(workdir) as directory:
        refuse_other(config, directory, "evaluate.split", "evaluate.examples")
        binary = config.network.precision == "binary"
        check_trained(config, directory, binary=binary)
        with contextlib.closing(open_feed(config)) as feed:
            evaluate_network(config, directory, reporter, genotype, feed, binary=binary)


def _checkpoints(config: config_dict.ConfigDict, directory: Workdir, *, binary: bool) -> Any:
    kind = "checkpoints" if config.evaluate.checkpoint == "last" else "best"
    return directory.path / directory_name(binary) / kind


def check_trained(config: config_dict.ConfigDict, directory: Workdir, *, binary: bool) -> None:
    """Refuse a workdir without a training, before any data is read.

    Raises:
        UserError: what to run first.
    """
    path, name = _checkpoints(config, directory, binary=binary), directory_name(binary)
    if holds_checkpoints(path):
        return
    if _is_finished(directory, name):
        raise UserError(
            f"{path} holds no checkpoint of the finished training; restore it, or "
            f"{_beginning_again(directory, name)}"
        )
    raise UserError(f"{path} holds no checkpoint; run the same command with the mode `train` first")


def _is_finished(directory: Workdir, name: str) -> bool:
    return name in (directory.read_json("results.json") or {})


def _beginning_again(directory: Workdir, name: str) -> str:
    """Say how to train anew what is finished."""
    return (
        f"delete {directory.path / name} and {name!r} in {directory.path / 'results.json'}, then "
        "run the same command with the mode `train`"
    )


def _remedy(config: config_dict.ConfigDict, directory: Workdir, name: str) -> str:
    """Say what to do about a damaged checkpoint; another one would answer for other weights."""
    last = config.evaluate.checkpoint == "last"
    finished = _is_finished(directory, name)
    if last and not finished:
        return "the same command with the mode `train` resumes from the one before"
    other = f"--config.evaluate.checkpoint={'best' if last else 'last'}"
    if not finished:
        return f"restore it, or give {other}"
    return f"restore it, give {other}, or {_beginning_again(directory, name)}"


def _epoch(config: config_dict.ConfigDict, results: dict[str, Any]) -> Any:
    """Return of which epoch the checkpoint is that a finished training is evaluated by."""
    return results.get("epochs" if config.evaluate.checkpoint == "last" else "best_epoch")


def evaluated(config: config_dict.ConfigDict, directory: Workdir, *, binary: bool) -> bool:
    """Tell whether `evaluation.json` is what this config asks of the finished training."""
    name = directory_name(binary)
    found = directory.read_json(f"{name}/evaluation.json") or {}
    trained = (directory.read_json("results.json") or {})[name]
    wanted = {
        "split": config.evaluate.split,
        "checkpoint": config.evaluate.checkpoint,
        "epoch": _epoch(config, trained),
        # `evaluate` may have been asked for fewer in between.
        "examples": trained["test"]["examples"],
    }
    return all(found.get(key) == value for key, value in wanted.items())


def evaluate_network(
    config: config_dict.ConfigDict,
    directory: Workdir,
    reporter: Reporter,
    genotype: Genotype,
    feed: Feed,
    *,
    binary: bool,
) -> None:
    """Count a trained network's answers; write them into files beside its checkpoints.

    Raises:
        UserError: the workdir holds no training of this config, or the checkpoint that is asked
            for is damaged; evaluating does not fit on a device.
    """
    trainer, position = restored(config, directory, genotype, feed, binary=binary)
    # The last epoch of which anything was trained.
    epoch = position["epoch"] - (position["step"] == 0)
    trainer.compile_evaluation(epoch)
    reporter.say(trainer.compiled_text("evaluate"))
    counted = trainer.evaluate(epoch)
    name = directory_name(binary)
    names, skipped = feed.facts.class_names, trainer.undecodable()
    value: dict[str, Any] = {
        "split": config.evaluate.split,
        "checkpoint": config.evaluate.checkpoint,
        "precision": trainer.precision,
        "epoch": position["epoch"],
        "class_names": list(names),
        "undecodable": len(skipped[config.evaluate.split]),
        **counted.to_dict(),
    }
    # First: evaluation.json says that all of it is done.
    directory.write(f"{name}/{predictions.NAME}", predictions.encoded(counted, feed))
    directory.write_json(f"{name}/evaluation.json", value)
    steps = f" and {position['step']} steps" if position["step"] else ""
    reporter.say(
        f"{config.evaluate.checkpoint} checkpoint, after epoch {position['epoch']}{steps}, on the "
        f"split {config.evaluate.split}, {evaluation.table(counted, names)}"
    )
    tell_skipped(reporter, {config.evaluate.split: value["undecodable"]})


def restored(
    config: config_dict.ConfigDict,
    directory: Workdir,
    genotype: Genotype,
    feed: Feed,
    *,
    binary: bool,
) -> tuple[Trainer, dict[str, int]]:
    """Return a trainer with the checkpoint that is asked for, and its position: epoch and step.

    Raises:
        UserError: the workdir holds no training of this config, or the checkpoint that is asked
            for is damaged.
    """
    check_trained(config, directory, binary=binary)
    name, path = directory_name(binary), _checkpoints(config, directory, binary=binary)
    check_cells(directory, name, genotype)
    settings = network_settings(config, genotype, feed.facts.num_classes, binary=binary)
    trainer = Trainer(config, settings, feed)
    with Checkpoints(path, config.runtime.keep_checkpoints) as checkpoints:
        found = checkpoints.restore_only_newest(
            trainer.initial_state(),
            training_hash(config, genotype, binary=binary),
            _remedy(config, directory, name),
        )
    if found is None:
        raise UserError(f"{path} holds no checkpoint that can be read; train first")
    position = found.record["position"]
    results = (directory.read_json("results.json") or {}).get(name)
    if isinstance(results, dict) and position["epoch"] != _epoch(config, results):
        raise UserError(
            f"{path} holds epoch {position['epoch']}, but not epoch {_epoch(config, results)} of "
            f"the finished training; {_remedy(config, directory, name)}"
        )
    trainer.load(found.state)
    return trainer, position
