"""The sampled path of the supernet in eager PyTorch, as a worker that `search_step.py` drives.

A small implementation of its own, meant to be fast: channels last, in-place arithmetic in the
estimators, multi-tensor clipping and SGD, only the sampled operations exist and run. It needs
PyTorch and NumPy alone, so that it can run in an environment without JAX.

One request a line on standard input, one answer a line on standard output, both JSON:

    {"command": "load", "name": N, "path": weights.npz, "cells": [...], "binary": B, ...}  -> {}
    {"command": "step", "name": N}  -> {"seconds": s, "loss": l, "gradient_norm": g}
"""

import json
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional

BATCH_NORM_EPSILON = 1e-3


class Sign(torch.autograd.Function):
    """Sign with sign(0) = +1, without a derivative."""

    @staticmethod
    def forward(ctx, x):
        """Return the signs of x; ten times faster than `torch.where` with two numbers."""
        ctx.save_for_backward(x)
        return torch.ge(x, 0, out=torch.empty_like(x)).mul_(2).sub_(1)


class ActivationSign(Sign):
    """The Bi-Real derivative, 2 - 2|x| inside [-1, 1]."""

    @staticmethod
    def backward(ctx, cotangent):
        """Multiply by the surrogate derivative."""
        (x,) = ctx.saved_tensors
        return x.abs().mul_(-2).add_(2).clamp_(min=0).mul_(cotangent)


class WeightSign(Sign):
    """The gradient passes where |H| <= 1."""

    @staticmethod
    def backward(ctx, cotangent):
        """Multiply by the surrogate derivative."""
        (x,) = ctx.saved_tensors
        return cotangent * (x.abs() <= 1)


class BatchMoments(nn.Module):
    """Batch norm by the batch's own moments, without affine parameters: the search's."""

    def __init__(self, channels):
        super().__init__()

    def forward(self, x):
        """Return x, normalised."""
        return functional.batch_norm(x, None, None, training=True, eps=BATCH_NORM_EPSILON)


def activate(x, binary):
    """Sign in the child, ReLU in the parent."""
    return ActivationSign.apply(x) if binary else functional.relu(x)


def effective(kernel, binary):
    """Latent weights, or in the child their signs times the mean |H| of each output filter.

    The scale multiplies the kernel, not the output: the same numbers, and cheaper in eager mode.
    """
    if not binary:
        return kernel
    scale = kernel.detach().abs().mean(dim=(1, 2, 3), keepdim=True)
    return WeightSign.apply(kernel) * scale


class SeparableUnit(nn.Module):
    """Depthwise k x k and 1x1; in the child with BN and sign between them."""

    def __init__(self, weights, name, stride, dilation, binary):
        super().__init__()
        depthwise = weights.depthwise(f"{name}.depthwise.kernel")
        self.depthwise = nn.Parameter(depthwise)
        self.pointwise = nn.Parameter(weights.pointwise(f"{name}.pointwise.kernel"))
        self.between = weights.norm(depthwise.shape[0]) if binary else nn.Identity()
        self.norm = weights.norm(self.pointwise.shape[0])
        self.stride, self.dilation, self.binary = stride, dilation, binary
        self.padding = dilation * (depthwise.shape[-1] // 2)

    def forward(self, x):
        """Return an image of the same channels."""
        y = functional.conv2d(
            activate(x, self.binary),
            effective(self.depthwise, self.binary),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.depthwise.shape[0],
        )
        if self.binary:
            y = ActivationSign.apply(self.between(y))
        return self.norm(functional.conv2d(y, effective(self.pointwise, self.binary)))


class Pool(nn.Module):
    """3x3 pooling and BN; padding does not count in the average."""

    def __init__(self, kind, stride, norm):
        super().__init__()
        self.kind, self.stride, self.norm = kind, stride, norm

    def forward(self, x):
        """Return the pooled image."""
        if self.kind == "max":
            return self.norm(functional.max_pool2d(x, 3, self.stride, 1))
        pooled = functional.avg_pool2d(x, 3, self.stride, 1, count_include_pad=False)
        return self.norm(pooled)


class FactorizedReduce(nn.Module):
    """Two strided 1x1 convolutions one pixel apart, side by side, then BN; even sizes only."""

    def __init__(self, weights, name, binary):
        super().__init__()
        self.even, self.odd = (
            nn.Parameter(weights.pointwise(f"{name}.{half}.kernel")) for half in ("even", "odd")
        )
        self.norm = weights.norm(self.even.shape[0] + self.odd.shape[0])
        self.binary = binary

    def forward(self, x):
        """Return an image of half the resolution."""
        x = activate(x, self.binary)
        halves = (
            functional.conv2d(x, effective(self.even, self.binary), stride=2),
            functional.conv2d(x[:, :, 1:, 1:], effective(self.odd, self.binary), stride=2),
        )
        return self.norm(torch.cat(halves, dim=1))


class Pointwise(nn.Module):
    """Activation, 1x1 convolution, BN: the preprocessing of a cell's input."""

    def __init__(self, weights, name, binary):
        super().__init__()
        self.kernel, self.binary = nn.Parameter(weights.pointwise(f"{name}.kernel")), binary
        self.norm = weights.norm(self.kernel.shape[0])

    def forward(self, x):
        """Return an image of the cell's channels."""
        x = activate(x, self.binary)
        return self.norm(functional.conv2d(x, effective(self.kernel, self.binary)))


class Weights:
    """Arrays of the JAX side by dotted name, in PyTorch's layouts; `norm` makes BN of channels."""

    def __init__(self, arrays, norm):
        self._arrays, self.norm = arrays, norm

    def pointwise(self, name):
        """[in, out] to [out, in, 1, 1]."""
        return torch.tensor(np.ascontiguousarray(self._arrays[name].T))[:, :, None, None]

    def depthwise(self, name):
        """[k, k, C] to [C, 1, k, k]."""
        return torch.tensor(np.ascontiguousarray(self._arrays[name].transpose(2, 0, 1)[:, None]))

    def dense(self, name):
        """[k, k, in, out] to [out, in, k, k]."""
        return torch.tensor(np.ascontiguousarray(self._arrays[name].transpose(3, 2, 0, 1)))

    def plain(self, name):
        """An array as it is, matrices transposed."""
        return torch.tensor(np.ascontiguousarray(self._arrays[name].T))


def make_operation(operation, channels, stride, weights, name, binary):
    """Return the module of an operation other than `none`."""
    if operation == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduce(weights, name, binary)
    if operation.endswith("pool_3x3"):
        return Pool(operation[:3], stride, weights.norm(channels))
    repeats, dilation = (2, 1) if operation.startswith("sep") else (1, 2)
    units = [
        SeparableUnit(weights, f"{name}.unit{i}", stride if i == 0 else 1, dilation, binary)
        for i in range(repeats)
    ]
    return nn.Sequential(*units)


class Cell(nn.Module):
    """A cell.

    `shape` has `kind`, `channels`, `reduce_first_input` and `edges`, a list of (name, source,
    target, stride, operation).
    """

    def __init__(self, shape, weights, name, binary):
        super().__init__()
        if shape["reduce_first_input"]:
            first = FactorizedReduce(weights, f"{name}.preprocess0.reduce", binary)
        else:
            first = Pointwise(weights, f"{name}.preprocess0.conv", binary)
        self.inputs = nn.ModuleList([first, Pointwise(weights, f"{name}.preprocess1.conv", binary)])
        self.operations = nn.ModuleList()
        self.edges = []
        for edge, source, target, stride, operation in shape["edges"]:
            if operation != "none":
                self.operations.append(
                    make_operation(
                        operation, shape["channels"], stride, weights, f"{name}.{edge}", binary
                    )
                )
                self.edges.append((source, target))
        self.channels, self.reduction = shape["channels"], shape["kind"] == "reduce"

    def forward(self, previous, current):
        """Return the channel concatenation of the four intermediate nodes."""
        nodes = [self.inputs[0](previous), self.inputs[1](current)]
        size = [side // 2 if self.reduction else side for side in nodes[1].shape[2:]]
        for target in range(2, 6):
            parts = [
                operation(nodes[source])
                for operation, (source, end) in zip(self.operations, self.edges, strict=True)
                if end == target
            ]
            if parts:
                total = parts[0]
                for part in parts[1:]:
                    total = total + part
            else:
                total = nodes[1].new_zeros((nodes[1].shape[0], self.channels, *size))
                total = total.to(memory_format=torch.channels_last)
            nodes.append(total)
        return torch.cat(nodes[2:], dim=1)


class Path(nn.Module):
    """Stem, cells, classifier."""

    def __init__(self, cells, weights, binary):
        super().__init__()
        self.stem = nn.Parameter(weights.dense("stem.kernel"))
        self.norm = weights.norm(self.stem.shape[0])
        self.cells = nn.ModuleList(
            Cell(shape, weights, f"cells.{i}", binary) for i, shape in enumerate(cells)
        )
        self.classifier = nn.Parameter(weights.plain("classifier.kernel"))
        self.bias = nn.Parameter(weights.plain("classifier.bias"))

    def forward(self, images):
        """Return the logits."""
        stem = self.norm(functional.conv2d(images, self.stem, padding=1))
        previous, current = stem, stem
        for cell in self.cells:
            previous, current = current, cell(previous, current)
        return functional.linear(current.mean(dim=(2, 3)), self.classifier, self.bias)


class Trainer:
    """A network, its optimizer and its batch; a subclass for final training."""

    def __init__(self, request):
        arrays = np.load(request["path"])
        self.network = self.make_network(arrays, request).to(memory_format=torch.channels_last)
        images = torch.tensor(arrays["images"].transpose(0, 3, 1, 2))
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.tensor(arrays["labels"]).long()
        # A path may not reach some parameters; PyTorch gives those no gradient and skips them.
        self.parameters = list(self.network.parameters())
        self.clip = request["gradient_clip"]
        self.optimizer = self.make_optimizer(request)

    def make_network(self, arrays, request):
        """Return the network of a request."""
        return Path(request["cells"], Weights(arrays, BatchMoments), request["binary"])

    def make_optimizer(self, request):
        """Return SGD with momentum and decay."""
        return torch.optim.SGD(
            self.parameters,
            lr=request["learning_rate"],
            momentum=request["momentum"],
            weight_decay=request["weight_decay"],
            foreach=True,
        )

    def loss(self):
        """Return the loss of the batch."""
        return functional.cross_entropy(self.network(self.images), self.labels)

    def step(self):
        """Take one step; return its seconds, its loss and the norm of the unclipped gradient."""
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip, foreach=True)
        self.optimizer.step()
        loss, norm = loss.item(), norm.item()
        return {"seconds": time.perf_counter() - start, "loss": loss, "gradient_norm": norm}


def serve(trainer):
    """Answer requests until standard input ends; the only argument is the number of threads."""
    torch.set_num_threads(int(sys.argv[1]))
    trainers = {}
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["command"] == "load":
            trainers[request["name"]] = trainer(request)
            answer = {}
        else:
            answer = getattr(trainers[request["name"]], request["command"])()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(Trainer)
