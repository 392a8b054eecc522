"""Networks with random weights and averages, and what is shipped of them."""

import jax
import numpy as np

from cpnas_jax.data.augment import normalise
from cpnas_jax.deploy.artefact import Shipped
from cpnas_jax.folding import fold
from cpnas_jax.models import network
from cpnas_jax.models.network import Network

CLASSES = ("one", "two", "three", "four", "five")
MEAN, STD = np.array([0.4, 0.5, 0.6], np.float32), np.array([0.2, 0.25, 0.3], np.float32)


def variables_of(settings, size, seed=0):
    """Random numbers everywhere: factors of both signs, averages far from 0 and 1."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(lambda key: network.init(key, settings, (size, size, 3)), key)
    rng = np.random.default_rng(seed)

    def leaf(path, like):
        values = rng.normal(size=like.shape)
        if path[-1].key == "var":
            values = 0.5 + values**2
        if path[-1].key == "kernel":
            values *= 2 / np.sqrt(np.prod(like.shape[:-1]))
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def images_of(size, number=3, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (number, size, size, 3)).astype(np.uint8)


def trained_logits(settings, variables, images):
    """What evaluation of the trained network computes."""
    return Network(settings).apply(variables, normalise(images, MEAN, STD), train=False).logits


def shipped_of(settings, variables, size):
    structure, tensors = fold(settings, variables, MEAN, STD, (size, size, 3))
    genotype = {"normal": [list(edge) for edge in settings.normal]}
    return Shipped(structure, tensors, genotype, CLASSES, {"size": size})
