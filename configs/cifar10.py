"""CIFAR-10, 32x32: the settings of the paper's group (DARTS' where the paper is silent).

python -m cpnas_jax.main --config=configs/cifar10.py:search --workdir=runs/cifar10
"""

from ml_collections import config_dict

from cpnas_jax.config import base_config, parse_argument, shrink


def get_config(argument: str | None = None) -> config_dict.ConfigDict:
    """Return the config of a mode; `,smoke` shrinks it."""
    config = base_config()
    config.mode, smoke = parse_argument(argument, default_mode="search")
    config.dataset.name = "cifar10"
    if smoke:
        shrink(config)
    return config
