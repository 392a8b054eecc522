"""Modes that look at a network: what it costs, and what a trained one answers."""

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
from cpnas_jax.train import CHILD_DIRECTORY, deciding, load_data, load_genotype
from cpnas_jax.trainer import Trainer, network_settings


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
