"""A config of minutes on one core: small networks, a part of CIFAR-10, small images.

    python -m cpnas_jax.main --config=benchmarks/small_cifar10.py:compare --workdir=DIR \\
        --config.dataset.data_dir=DATA [--config.compare.seeds="(0,1,2)"]

Of the strategies side by side in docs/results.md. All derive cells of 8 edges (`top2`), so that
networks are about as large.
"""

from ml_collections import config_dict

from cpnas_jax.config import apply_argument, base_config

RUN = {
    "dataset.name": "cifar10",
    "dataset.image_size": 12,
    "dataset.crop_padding": 1,
    "dataset.cutout": 0,
    # 2,048 images to train on, 1,024 to validate on.
    "search.examples": 3072,
    "search.validation_fraction": 1 / 3,
    "search.rounds": 1,
    "search.cells": 3,
    "search.reductions": (1, 2),
    "search.channels": 8,
    "search.batch_size": 64,
    "search.score_batch_size": 256,
    "search.child_optimizer": "adam",
    "search.child_learning_rate": 0.005,
    "search.learning_rate": 0.05,
    "search.edge_policy": "top2",
    # With which `cp_plus` costs about as much as `cp`.
    "search.max_scored": 280,
    "search.plus_score_examples": 512,
    "network.cells": 3,
    "network.channels": 16,
    "network.auxiliary": False,
    "network.drop_path": 0.0,
    "train.examples": 10_000,
    "train.epochs": 8,
    "train.evaluate_every": 8,
    "train.batch_size": 50,
    "train.learning_rate": 1e-2,
}
"""Keys of a config."""


def get_config(argument: str | None = None) -> config_dict.ConfigDict:
    """Return the config of a mode, see `config.apply_argument`."""
    config = base_config()
    config.update_from_flattened_dict(RUN)
    config.compare.strategies = ("cp", "cp_plus", "child", "random", "pc_darts")
    apply_argument(config, argument, default_mode="compare")
    return config
