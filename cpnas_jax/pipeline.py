"""Modes made of phases: the whole way, and looking at what a training left."""

import os
from typing import Any

from ml_collections import config_dict

from cpnas_jax import evaluate as evaluation
from cpnas_jax.architecture.genotype import Genotype
from cpnas_jax.models.summary import Summary, summarise, table
from cpnas_jax.runtime.checkpoints import Checkpoints
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.workdir import Workdir
from cpnas_jax.search import search
from cpnas_jax.train import (
    CHILD_DIRECTORY,
    PARENT_DIRECTORY,
    deciding,
    load_data,
    load_genotype,
    train_network,
)
from cpnas_jax.trainer import Trainer, network_settings


def pipeline(
    config: config_dict.ConfigDict, workdir: str | os.PathLike[str], reporter: Reporter
) -> None:
    """Search, train the child and for reference its parent, evaluate both, summarise.

    Args:
        config: validated.
        workdir: where all files go; the same command resumes in whatever phase it was ended.
        reporter: prints what happens.

    Raises:
        UserError: see the phases.
    """
    genotype = search(config, workdir, reporter)
    with Workdir(workdir) as directory:
        data = load_data(config)
        shape, classes = data[0].images.shape[1:], data[0].num_classes
        found = {}
        for binary, name in ((True, CHILD_DIRECTORY), (False, PARENT_DIRECTORY)):
            reporter.say(f"Training the {'1-bit child' if binary else 'float parent'}.")
            found[name] = train_network(
                config, directory, reporter, genotype, data, binary=binary, name=name
            )
        summary = _summarise(config, genotype, shape, classes, binary=True)
        _keep_summary(directory, summary, reporter)
        for name, results in found.items():
            test = results["test"]
            reporter.say(
                f"{name}: top-1 {test['top1']:.4f} of {test['examples']} test images, after "
                f"{results['epochs']} epochs."
            )


def summary_mode(
    config: config_dict.ConfigDict, workdir: str | os.PathLike[str], reporter: Reporter
) -> None:
    """Say what the network of `config.genotype` costs, without training it."""
    genotype = load_genotype(config.genotype)
    with Workdir(workdir) as directory:
        train, _ = load_data(config)
        binary = config.network.precision == "binary"
        shape = train.images.shape[1:]
        summary = _summarise(config, genotype, shape, train.num_classes, binary=binary)
        _keep_summary(directory, summary, reporter)


def _summarise(
    config: config_dict.ConfigDict,
    genotype: Genotype,
    shape: tuple[int, ...],
    classes: int,
    *,
    binary: bool,
) -> Summary:
    height, width, channels = shape
    settings = network_settings(config, genotype, classes, binary=binary)
    return summarise(settings, (height, width, channels))


def _keep_summary(directory: Workdir, summary: Summary, reporter: Reporter) -> None:
    directory.write_json("summary.json", summary.to_dict())
    reporter.say(table(summary))


def evaluate_mode(
    config: config_dict.ConfigDict, workdir: str | os.PathLike[str], reporter: Reporter
) -> None:
    """Count the answers of a trained network over a split; write `evaluation.json`.

    Raises:
        UserError: the workdir holds no training of this config.
    """
    genotype = load_genotype(config.genotype)
    with Workdir(workdir) as directory:
        directory.refuse_other(deciding(config, genotype))
        kind = "checkpoints" if config.evaluate.checkpoint == "last" else "best"
        path = directory.path / CHILD_DIRECTORY / kind
        if not path.exists():
            raise UserError(
                f"{path} holds no checkpoint; run the same command with the mode `train` first"
            )
        train, split = load_data(config)
        binary = config.network.precision == "binary"
        settings = network_settings(config, genotype, train.num_classes, binary=binary)
        trainer = Trainer(config, settings, train, split)
        with Checkpoints(path, config.runtime.keep_checkpoints) as checkpoints:
            found = checkpoints.restore_newest(trainer.initial_state())
        if found is None:
            raise UserError(f"{path} holds no checkpoint; train first")
        trainer.load(found.state)
        counted = trainer.evaluate()
        value: dict[str, Any] = {
            "split": config.evaluate.split,
            "checkpoint": config.evaluate.checkpoint,
            "epoch": found.record["position"]["epoch"],
            "class_names": list(split.class_names),
            **counted.to_dict(),
        }
        directory.write_json("evaluation.json", value)
        reporter.say(evaluation.table(counted, split.class_names))
