"""A discrete network in final training in eager PyTorch, as a worker that `train_step.py` drives.

The cells are those of `torch_supernet.py`, which also says how requests and answers look. BN is
affine with running averages; loss of the classifier plus that of the auxiliary head; Adam in its
fused form. Weights arrive by name; BN begins as it always does. `moments` answers with the norm of
Adam's first moments, `reset_peak` and `peak` with the memory of the process.
"""

import torch
from resident import peak_bytes, reset_peak, resident_bytes
from torch import nn
from torch.nn import functional
from torch_supernet import BATCH_NORM_EPSILON, Cell, Trainer, Weights, serve


def affine_norm(channels):
    """Return BN as final training has it."""
    return nn.BatchNorm2d(channels, BATCH_NORM_EPSILON, momentum=0.1)


class Auxiliary(nn.Module):
    """The auxiliary head of DARTS on an 8x8 map; float."""

    def __init__(self, weights):
        super().__init__()
        self.first = nn.Parameter(weights.dense("auxiliary.conv0.kernel"))
        self.second = nn.Parameter(weights.dense("auxiliary.conv1.kernel"))
        self.first_norm = weights.norm(self.first.shape[0])
        self.second_norm = weights.norm(self.second.shape[0])
        self.classifier = nn.Parameter(weights.plain("auxiliary.classifier.kernel"))
        self.bias = nn.Parameter(weights.plain("auxiliary.classifier.bias"))

    def forward(self, x):
        """Return the auxiliary logits."""
        x = functional.avg_pool2d(functional.relu(x), 5, stride=3)
        x = functional.relu(self.first_norm(functional.conv2d(x, self.first)))
        x = functional.relu(self.second_norm(functional.conv2d(x, self.second)))
        return functional.linear(x.flatten(1), self.classifier, self.bias)


class Network(nn.Module):
    """Stem, cells, auxiliary head behind cell 2L // 3, classifier."""

    def __init__(self, cells, weights, binary):
        super().__init__()
        self.stem = nn.Parameter(weights.dense("stem.conv0.kernel"))
        self.stem_norm = weights.norm(self.stem.shape[0])
        self.cells = nn.ModuleList(
            Cell(shape, weights, f"cells{i}", binary) for i, shape in enumerate(cells)
        )
        self.auxiliary = Auxiliary(weights)
        self.classifier = nn.Parameter(weights.plain("classifier.kernel"))
        self.bias = nn.Parameter(weights.plain("classifier.bias"))

    def forward(self, images):
        """Return logits and auxiliary logits."""
        stem = self.stem_norm(functional.conv2d(images, self.stem, padding=1))
        previous, current = stem, stem
        for i, cell in enumerate(self.cells):
            previous, current = current, cell(previous, current)
            if i == 2 * len(self.cells) // 3:
                auxiliary = self.auxiliary(current)
        logits = functional.linear(current.mean(dim=(2, 3)), self.classifier, self.bias)
        return logits, auxiliary


class NetworkTrainer(Trainer):
    """A discrete network, Adam and a batch."""

    def __init__(self, request):
        super().__init__(request)
        self.auxiliary_weight = request["auxiliary_weight"]

    def make_network(self, arrays, request):
        """Return the network of a request."""
        return Network(request["cells"], Weights(arrays, affine_norm), request["binary"])

    def make_optimizer(self, request):
        """Return Adam, without decay."""
        return torch.optim.Adam(self.parameters, lr=request["learning_rate"], fused=True)

    def loss(self):
        """Return both heads' cross-entropies, weighted."""
        logits, auxiliary = self.network(self.images)
        main = functional.cross_entropy(logits, self.labels)
        return main + self.auxiliary_weight * functional.cross_entropy(auxiliary, self.labels)

    def moments(self):
        """Return the norm of Adam's first moments."""
        norms = [state["exp_avg"].norm() for state in self.optimizer.state.values()]
        return {"norm": torch.stack(norms).norm().item()}

    def reset_peak(self):
        """Let the peak of the resident memory begin now."""
        reset_peak()
        return {"resident_bytes": resident_bytes()}

    def peak(self):
        """Return the peak of the resident memory."""
        return {"peak_resident_bytes": peak_bytes()}


if __name__ == "__main__":
    serve(NetworkTrainer)
