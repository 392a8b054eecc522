"""2,000 of 5,000 real MNIST digits, 14x14: a whole search in minutes on two CPU cores.

python -m cpnas_jax.main --config=configs/mnist5k.py --workdir=runs/mnist5k
"""

from ml_collections import config_dict

from cpnas_jax.config import apply_argument, base_config

SIZES = {
    "small": {"cells": 3, "channels": 16},
    "medium": {"cells": 5, "channels": 16},
    "large": {"cells": 5, "channels": 36},
}


def get_config(argument: str | None = None) -> config_dict.ConfigDict:
    """Return the config of `mode,size,plus,smoke`, see `config.apply_argument`."""
    config = base_config()
    config.dataset.name = "mnist5k"
    config.dataset.image_size = 14
    config.search.examples = 2000  # of 4,000: enough to search in five minutes
    config.dataset.crop_padding = 1
    config.dataset.flip = False  # a mirrored digit is another sign
    config.search.rounds = 1
    config.search.cells = 3
    config.search.channels = 8
    config.search.reductions = (1, 2)
    config.search.batch_size = 50
    config.search.score_batch_size = 250
    config.search.learning_rate = 0.05
    config.search.child_optimizer = "adam"
    config.search.child_learning_rate = 0.005
    config.runtime.optimization_level = 1  # a short run: compiling is a sixth of it
    config.dataset.cutout = 0
    config.network.update(cells=5, channels=16, drop_path=0.0, auxiliary=False)
    config.train.update(epochs=30, batch_size=50, learning_rate=2e-3, evaluate_every=5)
    apply_argument(config, argument, default_mode="pipeline", sizes=SIZES)
    return config
