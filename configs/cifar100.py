"""CIFAR-100, 32x32: the settings of CIFAR-10, our choice; nothing is published on it.

python -m cpnas_jax.main --config=configs/cifar100.py:search --workdir=runs/cifar100
"""

from ml_collections import config_dict

from cpnas_jax.config import apply_argument, base_config


def get_config(argument: str | None = None) -> config_dict.ConfigDict:
    """Return the config of `mode,size,plus,smoke`, see `config.apply_argument`."""
    config = base_config()
    config.dataset.name = "cifar100"  # [ours]
    apply_argument(config, argument, default_mode="search")
    return config
