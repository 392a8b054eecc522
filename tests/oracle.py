"""A search whose networks are stood in for: what it asks of them and does with the answers.

Nothing is drawn, which would take most of its time; figures have tests of their own.
"""

import io

import numpy as np
from rich.console import Console

from cpnas_jax import config as configs
from cpnas_jax import figures, search_figures
from cpnas_jax import search as search_module
from cpnas_jax.architecture.parsing import parse_history
from cpnas_jax.data.datasets import Split
from cpnas_jax.models.space import OPERATIONS, PARENT
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.runtime.interruptions import stop_wished
from cpnas_jax.search import search

NONE = OPERATIONS.index("none")
FIVE = OPERATIONS[:5]
"""What an edge chooses from where nothing else is said."""
TOTAL = 5 + 4 + 3 + 2
"""Sampled epochs of a search with one round."""


def replace_data(patch):
    """Let a search read forty grey images in place of a data set, and draw nothing."""
    generator = np.random.default_rng(0)
    split = Split(
        generator.integers(0, 256, (40, 4, 4, 1), np.uint8),
        np.arange(40, dtype=np.int32) % 10,
        10,
        tuple("0123456789"),
        "greys",
    )
    patch.setattr(search_module, "load_split", lambda *_: split)
    patch.setattr(figures, "draw_cells", lambda *_: [])
    patch.setattr(search_figures, "draw_accuracies", lambda *_: [])


class Oracle:
    """Networks whose accuracy is the mean worth of what was sampled, and a log of the requests."""

    paths, steps_per_epoch = 1, 3
    first_step_seconds = 1.0
    worth = np.linspace(0.1, 0.8, len(OPERATIONS))

    def __init__(self, config, train, validation, total, started, models, takes_turns):
        del started
        self.models, self.takes_turns = models, takes_turns
        self.requests, self.total = [], total
        self.parts = (len(train.labels), len(validation.labels))
        self.compile_seconds = {"train": 0.0, "score": 0.0}
        self.batch = config.search.batch_size
        Oracle.last = self

    def initial_state(self, draw=0):
        return {name: {"weights": np.full(2, draw, np.float32)} for name in self.models}

    def load(self, states):
        self.states = states

    def host_state(self):
        return self.states

    def compile(self):
        pass

    def memory_bytes(self):
        return {"weights": 2**20}

    def train(self, model, architectures, epoch, sums):
        if not sums.steps:
            for number, architecture in enumerate(architectures):
                self.requests.append(("train", model, architecture.copy(), epoch + number))
        sums.steps += 1
        sums.loss += 1.0
        return stop_wished()

    def score(self, model, architectures):
        for architecture in architectures:
            self.requests.append(("score", model, architecture.copy(), None))
        return [self.accuracy(model, architecture) for architecture in architectures]

    def scores(self, model, architectures):
        accuracies = self.score(model, architectures)
        return {"accuracy": accuracies, "log_likelihood": [value - 1 for value in accuracies]}

    def accuracy(self, model, architecture):
        return float(self.worth[architecture].mean()) * (1.0 if model == PARENT else 0.5)


def run(monkeypatch, workdir, networks=Oracle, **settings):
    monkeypatch.setattr(search_module, "Networks", networks)
    config = configs.base_config()
    config.search.update({"rounds": 1, "operations": FIVE, **settings})
    file = io.StringIO()
    genotype = search(config, workdir, Reporter(Console(file=file, width=200)))
    return genotype, file.getvalue()


def log_of(workdir):
    return list(parse_history((workdir / "search/history.jsonl").read_text()))
