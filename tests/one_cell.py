"""Trainings of one small cell on eight devices, on images made here."""

import io
import json

import numpy as np
from rich.console import Console

from cpnas_jax import config as configs
from cpnas_jax import feeds
from cpnas_jax.architecture.genotype import Edge, Genotype
from cpnas_jax.data.datasets import Split
from cpnas_jax.models.space import EDGES
from cpnas_jax.network_config import network_settings
from cpnas_jax.runtime.checkpoints import Checkpoints
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.train import train
from cpnas_jax.trainer import Trainer

# As little to compile as there can be with a pool, a factorized reduce and a binary convolution.
CHOSEN = {
    (0, 2): "max_pool_3x3",
    (1, 3): "skip_connect",
    (2, 4): "dil_conv_3x3",
    (4, 5): "skip_connect",
}
CELL = tuple(
    Edge(target=target, source=source, operation=CHOSEN.get((source, target), "none"))
    for source, target in EDGES
)
GENOTYPE = Genotype(normal=CELL, reduce=CELL, edge_policy="all")


def part(n, seed):
    """Classes that differ in their brightness."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.int32) % 6
    images = generator.integers(0, 60, (n, 8, 8, 1)) + 38 * labels[:, None, None, None]
    return Split(images.astype(np.uint8), labels, 6, tuple("abcdef"), "greys")


# Four steps an epoch of 16 images; the test images are no multiple of anything.
PARTS = {"train": part(70, 0), "test": part(37, 1)}


def replace_data(patch):
    """Put the data above in place of a data set."""
    patch.setattr(feeds, "load_split", lambda _, split, *__: PARTS[split])


def config_in(directory):
    path = directory / "cells.json"
    GENOTYPE.save(path)
    config = configs.base_config()
    config.genotype = str(path)
    config.dataset.update(crop_padding=1, cutout=2)
    config.network.update(cells=1, channels=4, drop_path=0.1)
    config.train.update(epochs=2, batch_size=16, evaluate_every=1, learning_rate=0.01)
    config.train.update(label_smoothing=0.1, average_decay=0.5, warmup_epochs=1)
    config.evaluate.batch_size = 16
    config.runtime.update(optimization_level=0, steps_per_call=3)
    return config


def reporter_to(file):
    return Reporter(Console(file=file, width=200))


def run(config, workdir):
    file = io.StringIO()
    train(config, workdir, reporter_to(file))
    return file.getvalue()


def lines_of(workdir):
    text = (workdir / "train/metrics.jsonl").read_text()
    timed = ("seconds", "images_per_second")
    return [
        {k: v for k, v in json.loads(line).items() if k not in timed} for line in text.splitlines()
    ]


def results_of(workdir):
    return json.loads((workdir / "results.json").read_text())["train"]


def trainer_of(config, binary=True):
    settings = network_settings(config, GENOTYPE, 6, binary=binary)
    return Trainer(config, settings, feeds.open_feed(config))


def final_state(like, workdir):
    with Checkpoints(workdir / "train/checkpoints", 2) as checkpoints:
        return checkpoints.restore_newest(like).state
