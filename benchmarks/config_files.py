"""The config files of this project, for benchmarks: they belong to no package."""

import runpy
from pathlib import Path

from ml_collections import config_dict


def load_config(argument: str) -> config_dict.ConfigDict:
    """Return the config of an argument of `--config`, `FILE:WORDS`, from this repository."""
    path, _, words = argument.partition(":")
    return runpy.run_path(str(Path(__file__).parents[1] / path))["get_config"](words)
