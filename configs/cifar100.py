"""CIFAR-100, 32x32: the settings of CIFAR-10, our choice; nothing is published on it.

python -m cpnas_jax.main --config=configs/cifar100.py:search --workdir=runs/cifar100
"""

from ml_collections import config_dict

from cpnas_jax.config import base_config, parse_argument, shrink


def get_config(argument: str | None = None) -> config_dict.ConfigDict:
    """Return the config of a mode; `,smoke` shrinks it."""
    config = base_config()
    config.mode, smoke = parse_argument(argument, default_mode="search")
    config.dataset.name = "cifar100"
    if smoke:
        shrink(config)
    return config
