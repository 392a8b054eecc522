"""A supernet of one cell and three operations, on images made here."""

import time

import numpy as np

from cpnas_jax import config as configs
from cpnas_jax.data.datasets import Split
from cpnas_jax.models.space import MODELS
from cpnas_jax.search_networks import Networks

OFFERED = ("none", "skip_connect", "dil_conv_3x3")
STEPS = 5
"""Of an epoch."""


def part(n):
    generator = np.random.default_rng(n)
    images = generator.integers(0, 256, (n, 8, 8, 1)).astype(np.uint8)
    return Split(images, generator.integers(0, 3, n).astype(np.int32), 3, tuple("abc"), "greys")


def networks_of(steps_per_call=4, takes_turns=False):
    config = configs.base_config()
    config.search.update(cells=1, channels=2, reductions=(), batch_size=8, score_batch_size=8)
    config.search.operations = OFFERED
    config.dataset.crop_padding = 1
    config.runtime.update(optimization_level=0, steps_per_call=steps_per_call)
    networks = Networks(config, part(8 * STEPS), part(16), 4, time.monotonic(), MODELS, takes_turns)
    networks.first_step_seconds = 0.0
    return networks
