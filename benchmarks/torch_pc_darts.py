"""A bilevel step of PC-DARTS in eager PyTorch, as a worker that `search_cost.py` drives.

In its own terms (Xu et al. 2020): float operations over a quarter of the channels, the others pass
by, channel shuffle, edge normalisation; a step of alpha by Adam on one batch, then one of the
weights by SGD on another. Written for this benchmark, and meant to be fast: the operations of
`torch_supernet.py`, channels last, `none` is not computed, and alpha's step asks for no gradients
of the weights, which PC-DARTS' own code computes and throws away.

Requests as in `torch_supernet.py`, and besides

    {"command": "weights_step", "name": N}  -> the same of a step of the weights alone (warm-up)
    {"command": "memory", "name": N}        -> {"peak_bytes": resident at most, less what was there
                                               before the first network}
"""

import resource
import time

import torch
from torch import nn
from torch.nn import functional
from torch_supernet import (
    BatchMoments,
    FactorizedReduce,
    Path,
    Pointwise,
    Trainer,
    Weights,
    make_operation,
    serve,
)

OPERATIONS = (
    *("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect"),
    *("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"),
)
EDGES = tuple((source, target) for target in range(2, 6) for source in range(target))
ALPHA_BETAS = (0.5, 0.999)


def resident_bytes():
    """Return the most that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def shuffled(x, groups):
    """Take one channel of each group in turn."""
    n, channels, height, width = x.shape
    apart = x.view(n, groups, channels // groups, height, width)
    joined = apart.transpose(1, 2).reshape(n, channels, height, width)
    return joined.contiguous(memory_format=torch.channels_last)


class MixedEdge(nn.Module):
    """The weighted sum of all operations on the first C // K channels, and the others beside it."""

    def __init__(self, channels, stride, weights, name, partial):
        super().__init__()
        self.seen, self.stride, self.partial = channels // partial, stride, partial
        self.operations = nn.ModuleList(
            make_operation(own, self.seen, stride, weights, f"{name}.{own}", False)
            for own in OPERATIONS[1:]
        )

    def forward(self, x, shares):
        """Return an image of all channels; `shares` are those of all operations."""
        seen = x[:, : self.seen].contiguous(memory_format=torch.channels_last)
        total = None
        for share, operation in zip(shares[1:], self.operations, strict=True):
            part = share * operation(seen)
            total = part if total is None else total + part
        rest = x[:, self.seen :]
        if self.stride == 2:
            rest = functional.max_pool2d(rest, 2, 2)
        return shuffled(torch.cat([total, rest], dim=1), self.partial)


class MixedCell(nn.Module):
    """A cell; `shape` has `kind`, `channels` and `reduce_first_input`."""

    def __init__(self, shape, weights, name, partial):
        super().__init__()
        if shape["reduce_first_input"]:
            first = FactorizedReduce(weights, f"{name}.preprocess0.reduce", False)
        else:
            first = Pointwise(weights, f"{name}.preprocess0.conv", False)
        second = Pointwise(weights, f"{name}.preprocess1.conv", False)
        self.inputs = nn.ModuleList([first, second])
        self.kind = shape["kind"]
        self.edges = nn.ModuleList(
            MixedEdge(
                shape["channels"],
                2 if self.kind == "reduce" and source < 2 else 1,
                weights,
                f"{name}.edges.{edge}",
                partial,
            )
            for edge, (source, _) in enumerate(EDGES)
        )

    def forward(self, previous, current, shares, edge_shares):
        """Return the channel concatenation of the four intermediate nodes."""
        nodes = [self.inputs[0](previous), self.inputs[1](current)]
        for target in range(2, 6):
            total = None
            for edge, (source, end) in enumerate(EDGES):
                if end == target:
                    part = edge_shares[edge] * self.edges[edge](nodes[source], shares[edge])
                    total = part if total is None else total + part
            nodes.append(total)
        return torch.cat(nodes[2:], dim=1)


class Mixture(Path):
    """Stem, mixed cells, classifier; alpha is no parameter of it but an argument."""

    def __init__(self, cells, weights, partial):
        super().__init__([], weights, False)
        self.cells = nn.ModuleList(
            MixedCell(shape, weights, f"cells.{i}", partial) for i, shape in enumerate(cells)
        )

    def forward(self, images, alpha):
        """Return the logits."""
        shares = {kind: functional.softmax(alpha[kind], dim=-1) for kind in ("normal", "reduce")}
        sizes = [sum(end == target for _, end in EDGES) for target in range(2, 6)]
        edge_shares = {
            kind: torch.cat(
                [functional.softmax(own, dim=0) for own in alpha[f"{kind}_edges"].split(sizes)]
            )
            for kind in shares
        }
        stem = self.norm(functional.conv2d(images, self.stem, padding=1))
        previous, current = stem, stem
        for cell in self.cells:
            out = cell(previous, current, shares[cell.kind], edge_shares[cell.kind])
            previous, current = current, out
        return functional.linear(current.mean(dim=(2, 3)), self.classifier, self.bias)


class BilevelTrainer(Trainer):
    """Both updates; the images of the second batch stand beside those of the first."""

    def __init__(self, request):
        self.before = resident_bytes()
        super().__init__(request)

    def make_network(self, arrays, request):
        """Return the mixture; keep alpha and the batch that it learns from."""
        names = [name for name in arrays.files if name.startswith("alpha.")]
        self.alpha = {
            name.removeprefix("alpha."): torch.tensor(arrays[name], requires_grad=True)
            for name in names
        }
        self.alpha_optimizer = torch.optim.Adam(
            self.alpha.values(),
            lr=request["alpha_learning_rate"],
            betas=ALPHA_BETAS,
            weight_decay=request["alpha_weight_decay"],
        )
        other = torch.tensor(arrays["other_images"].transpose(0, 3, 1, 2))
        self.other_images = other.contiguous(memory_format=torch.channels_last)
        self.other_labels = torch.tensor(arrays["other_labels"]).long()
        return Mixture(request["cells"], Weights(arrays, BatchMoments), request["partial"])

    def loss(self):
        """Return the loss of the first batch, for the weights alone."""
        fixed = {name: own.detach() for name, own in self.alpha.items()}
        return functional.cross_entropy(self.network(self.images, fixed), self.labels)

    def weights_step(self):
        """Take a step of the weights."""
        return Trainer.step(self)

    def step(self):
        """Take a step of alpha, then one of the weights."""
        start = time.perf_counter()
        logits = self.network(self.other_images, self.alpha)
        objective = functional.cross_entropy(logits, self.other_labels)
        owns = list(self.alpha.values())
        for own, gradient in zip(owns, torch.autograd.grad(objective, owns), strict=True):
            own.grad = gradient
        self.alpha_optimizer.step()
        answer = Trainer.step(self)
        seconds = time.perf_counter() - start
        return {**answer, "seconds": seconds, "objective": objective.item()}

    def memory(self):
        """Return what the steps took at most."""
        return {"peak_bytes": resident_bytes() - self.before}


if __name__ == "__main__":
    serve(BilevelTrainer)
