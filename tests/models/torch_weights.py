"""Parameters and running averages between the package's trees and PyTorch modules, by name."""

import jax
import numpy as np
import torch
from torch import nn

LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
AVERAGES = {"mean": "running_mean", "var": "running_var"}
LEVELS = ("ending", "affine")
"""Levels of the package's trees that the PyTorch modules do not have."""


def torch_names(tree, lengths=()):
    """PyTorch name -> leaf of a tree of parameters or running averages.

    `lengths` are (first cell, number) of the cells whose leaves are stacked.
    """
    stacked = {f"cells{first}": (first, length) for first, length in lengths if length > 1}
    names = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *levels, last = (entry.key for entry in path)
        tail = [level for level in levels if level not in LEVELS]
        tail.append((LEAVES | AVERAGES)[last])
        if tail[0] not in stacked:
            names[".".join(tail)] = np.asarray(leaf)
            continue
        first, length = stacked[tail[0]]
        for i in range(length):
            names[".".join([f"cells{first + i}", *tail[1:]])] = np.asarray(leaf[i])
    return names


def to_package_layout(array, shape):
    """A PyTorch kernel [out, in, k, k] or [out, in], or a vector, in the package's shape.

    The package has [k, k, in, out]; [k, k, C] for a depthwise kernel, [in, out] for a 1x1.
    """
    return np.transpose(array, (*range(2, array.ndim), 1, 0)[-array.ndim :]).reshape(shape)


def load(module, params, averages, lengths=()):
    """Copy a network's parameters and running averages; every one must find its place."""
    own = dict(module.state_dict())
    for name, leaf in (torch_names(params, lengths) | torch_names(averages, lengths)).items():
        target = own.pop(name)
        if leaf.ndim == 1:
            value = leaf
        elif target.ndim == 2:
            value = leaf.T
        elif target.shape[1] == 1 and leaf.ndim == 3:
            value = leaf.transpose(2, 0, 1)[:, None]
        else:
            value = np.reshape(leaf, (*target.shape[2:], *leaf.shape[-2:])).transpose(3, 2, 0, 1)
        assert value.shape == tuple(target.shape), name
        with torch.no_grad():
            target.copy_(torch.tensor(np.ascontiguousarray(value)))
    assert all(name.endswith("num_batches_tracked") for name in own), own.keys()


def gradients(module, params, lengths=()):
    """PyTorch name -> gradient in the package's layout; zeros where PyTorch has none."""
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {
        name: np.zeros(leaf.shape)
        if found[name] is None
        else to_package_layout(found[name].numpy(), leaf.shape)
        for name, leaf in torch_names(params, lengths).items()
    }


def to_torch(array):
    """NHWC to NCHW, other arrays as they are; float64, with a gradient."""
    array = np.asarray(array, np.float64)
    array = array.transpose(0, 3, 1, 2) if array.ndim == 4 else array
    return torch.tensor(np.ascontiguousarray(array), requires_grad=True)


def to_numpy(tensor):
    """NCHW to NHWC, other tensors as they are."""
    array = tensor.detach().numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


class BiasedVariance:
    """Undo what PyTorch's running variances have over flax's.

    Both normalise by the biased variance of the batch, the mean over its n = N H W pixels. PyTorch
    moves the running average by the unbiased one, n / (n - 1) times as large; flax by the biased.
    """

    def __init__(self, module):
        self._pixels, self._before = {}, {}
        for name, part in module.named_modules():
            if isinstance(part, nn.BatchNorm2d) and part.track_running_stats:
                self._before[name] = part.running_var.clone()
                part.register_forward_pre_hook(self._counter(name))

    def _counter(self, name):
        def count(part, inputs):
            self._pixels[name] = inputs[0].numel() // inputs[0].shape[1]

        return count

    def averages(self, module):
        """PyTorch name -> running mean, or the running variance that flax would have."""
        found = {}
        for name, part in module.named_modules():
            if name not in self._before:
                continue
            variance = part.running_var
            if part.training:
                kept = (1 - part.momentum) * self._before[name]
                n = self._pixels[name]
                variance = kept + (variance - kept) * (n - 1) / n
            found[f"{name}.running_mean"] = part.running_mean.numpy()
            found[f"{name}.running_var"] = variance.numpy()
        return found
