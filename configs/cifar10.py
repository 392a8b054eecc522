"""CIFAR-10, 32x32: the settings of the paper's group (DARTS' where the paper is silent).

python -m cpnas_jax.main --config=configs/cifar10.py:search --workdir=runs/cifar10
"""

from ml_collections import config_dict

from cpnas_jax.config import apply_argument, base_config


def get_config(argument: str | None = None) -> config_dict.ConfigDict:
    """Return the config of `mode,size,plus,smoke`, see `config.apply_argument`."""
    config = base_config()
    config.dataset.name = "cifar10"  # [paper]
    apply_argument(config, argument, default_mode="search")
    return config
