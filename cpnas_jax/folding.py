"""What is shipped of a trained network: its structure, and the tensors of its steps.

Normalisations by running averages stay as they are computed in training, in its order: a rounding
can decide a sign further on, and a sign much. Where the sum of a 1-bit depthwise convolution is
normalised and its sign taken, both become one threshold of the sum, which is found by doing in
float32 what training does for every sum that can occur.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from cpnas_jax.deploy.program import AllTensors
from cpnas_jax.deploy.steps import Step
from cpnas_jax.deploy.structure import CellShape, Structure, steps
from cpnas_jax.models import network
from cpnas_jax.models.binarize import binarize_weights
from cpnas_jax.models.layers import BATCH_NORM_EPSILON
from cpnas_jax.models.network import NetworkSettings

Arrays = dict[str, np.ndarray]


def structure_of(settings: NetworkSettings, image: tuple[int, int, int]) -> Structure:
    """Return the structure of a network for images of a shape.

    Raises:
        ValueError: the child's weights are real, as in the first part of two-step training.
    """
    operations = settings.operations
    if settings.binary and not operations.binary_weights:
        raise ValueError("a child with real weights has no bits to ship")
    levers = operations.levers
    return Structure(
        binary=settings.binary,
        image=image,
        num_classes=settings.num_classes,
        stem=settings.stem,
        stem_channels=network.stem_channels(settings),
        cells=tuple(CellShape(*place) for place in network.cell_places(settings)),
        normal=settings.normal,
        reduce=settings.reduce,
        separable_repeats=operations.separable_repeats,
        binary_preprocess=operations.binary_preprocess,
        normalize_pools=operations.normalize_pools,
        pad_value=int(operations.binarizer.pad_value),
        levers=tuple(name for name, on in vars(levers).items() if on) if settings.binary else (),
    )


def fold(
    settings: NetworkSettings,
    variables: Mapping[str, Any],
    mean: np.ndarray,
    std: np.ndarray,
    image: tuple[int, int, int],
) -> tuple[Structure, AllTensors]:
    """Return structure and tensors of a trained network.

    Args:
        settings: of the network.
        variables: {"params", "batch_stats"}, float32 on the host.
        mean: f32[c] that images are normalised with.
        std: f32[c], likewise.
        image: height, width and channels of images.
    """
    structure = structure_of(settings, image)
    folding = _Folding(settings, variables)
    given = {"mean": np.asarray(mean, np.float32), "std": np.asarray(std, np.float32)}
    tensors = {}
    for step in steps(structure):
        own = given if step.op == "normalise" else folding.tensors(step)
        for field, spec in step.tensors.items():
            assert own[field].shape == spec.shape, (step.name, field, own[field].shape, spec.shape)
        tensors[step.name] = {field: own[field] for field in step.tensors}
    return structure, tensors


class _Folding:
    """Looks up what a step needs in the variables of a network."""

    def __init__(self, settings: NetworkSettings, variables: Mapping[str, Any]) -> None:
        self.settings, self.variables = settings, variables
        self.stretches = {
            stretch.first + offset: (stretch, offset)
            for stretch in network.stretches(settings)
            for offset in range(stretch.length)
        }

    def find(self, collection: str, name: str) -> Any:
        """Return the variables of a module by its step's name, None where it has none."""
        found, parts, offset = self.variables[collection], name.split("."), None
        if parts[0] == "cells":
            stretch, position = self.stretches[int(parts[1])]
            parts = [f"cells{stretch.first}", *parts[2:]]
            offset = position if stretch.length > 1 else None
        for part in parts:
            if part not in found:
                return None
            found = found[part]
        if offset is None:
            return found
        return _rows(found, offset)

    def norm(self, name: str) -> Arrays:
        """Return mean, factor and bias, f32[C], of a normalisation: (x - mean) * factor + bias."""
        params = self.find("params", f"{name}.affine")
        averages = self.find("batch_stats", f"{name}.affine")
        # XLA's own root, as in training.
        root = lax.rsqrt(jnp.asarray(averages["var"]) + np.float32(BATCH_NORM_EPSILON))
        factor = np.asarray(root * params["scale"])
        return {"mean": averages["mean"], "factor": factor, "bias": params["bias"]}

    def kernel(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the signs of a 1-bit kernel, as bool, and the scale of each output channel."""
        latent = self.find("params", name)["kernel"]
        signs, scale = binarize_weights(latent, self.settings.operations.binarizer)
        return np.asarray(signs) > 0, np.broadcast_to(np.asarray(scale), latent.shape[-1:])

    def threshold(self, name: str) -> np.ndarray | float:
        """Return what a sign subtracts first, f32[C], or 0."""
        found = self.find("params", f"{name}.sign")
        return 0.0 if found is None else found["threshold"]

    def tensors(self, step: Step) -> Arrays:
        """Return the tensors of a step."""
        own = step.name.rpartition(".")
        match step.op:
            case "convolution" | "pointwise" | "depthwise":
                return {"kernel": self.find("params", step.name)["kernel"]}
            case "dense":
                return self.find("params", "classifier")
            case "prelu":
                return self.find("params", step.name)
            case "affine":
                # The one normalisation of the stem and of a pool has the step's own name.
                inner = own[2] in ("ending", "activation")
                return self.norm(f"{step.name}.norm" if inner else step.name)
            case "sign":
                return self.sign(step)
            case "signed_depthwise":
                return {"kernel": self.kernel(step.name)[0]}
            case "binary_depthwise":
                return self.binary_depthwise(step)
            case "binary_pointwise":
                return self.binary_pointwise(step)
        return {}

    def sign(self, step: Step) -> Arrays:
        """Return what comes before a sign, where anything does."""
        found: Arrays = {}
        if "factor" in step.tensors:
            found |= self.norm(f"{step.name}.norm")
        if "scale" in step.tensors:
            # Of the depthwise convolution before.
            found["scale"] = self.kernel(f"{step.name.removesuffix('between')}depthwise")[1]
        if "threshold" in step.tensors:
            found["threshold"] = np.asarray(self.threshold(step.name), np.float32)
        return found

    def binary_depthwise(self, step: Step) -> Arrays:
        """Return kernel, threshold and flip."""
        signs, scale = self.kernel(step.name)
        between = f"{step.name.removesuffix('depthwise')}between"
        norm = self.norm(f"{between}.norm")
        largest = signs.shape[0] * signs.shape[1]
        sums = np.arange(-largest, largest + 1, dtype=np.float32)[:, None]
        values = (sums * scale - norm["mean"]) * norm["factor"] + norm["bias"]
        threshold, flip = threshold_of(values - self.threshold(between) >= 0, largest)
        return {"kernel": signs, "threshold": threshold, "flip": flip}

    def binary_pointwise(self, step: Step) -> Arrays:
        """Return kernel, scale and normalisation."""
        signs, scale = self.kernel(step.name)
        base, _, last = step.name.rpartition(".")
        norm = self.norm(f"{base}.ending.norm")
        # Halves of a factorized reduce share a normalisation.
        size, whole = len(scale), len(norm["mean"])
        rows = slice(0, size) if last != "odd" else slice(whole - size, whole)
        own = {field: np.asarray(tensor)[rows] for field, tensor in norm.items()}
        return {"kernel": signs, "scale": scale, **own}


def threshold_of(positive: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (D >= threshold) != flip for a function of D that changes once.

    Args:
        positive: bool[2 * largest + 1, C], for D from -largest to largest.
        largest: of |D|.

    Returns:
        Threshold int8[C], flip bool[C].

    Raises:
        ValueError: it changes more than once, as that of weights that are not finite may.
    """
    flip = positive[0] & ~positive[-1]
    rising = positive != flip
    if (rising[:-1] & ~rising[1:]).any():
        raise ValueError("the sign behind a sum changes more than once: weights are not finite")
    reached = rising.any(axis=0)
    threshold = np.where(reached, rising.argmax(axis=0) - largest, largest + 1)
    return threshold.astype(np.int8), flip


def _rows(tree: Any, position: int) -> Any:
    if isinstance(tree, Mapping):
        return {name: _rows(own, position) for name, own in tree.items()}
    return tree[position]
