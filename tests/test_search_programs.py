"""What a search makes its programs of and calls them with; programs are stood in for."""

import io
import json

import numpy as np
import pytest
from oracle import replace_data
from reads import OF_GRADIENT, OF_SAMPLED, note_reads
from rich.console import Console

from cpnas_jax import config as configs
from cpnas_jax import config_keys, main, search_networks, search_results
from cpnas_jax import search as search_module
from cpnas_jax.models.space import CHILD, PARENT
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.search import search
from cpnas_jax.search_networks import Networks


@pytest.fixture(autouse=True)
def data(monkeypatch):
    replace_data(monkeypatch)


class FakeProgram:
    """In place of a pmapped function: keeps what it was called with."""

    def __init__(self, made_with):
        self.made_with, self.calls, self.options = made_with, [], None

    def lower(self, *_):
        return self

    def compile(self, options):
        self.options = options
        return self

    def __call__(self, first, examples, call):
        take = {name: np.asarray(getattr(call, name))[0] for name in call.__dataclass_fields__}
        self.calls.append((first, examples, take))
        devices = len(call.num_steps)
        if "train" in self.made_with:
            sums = {"loss": [float(take["num_steps"])], "correct": [0], "stop": [0]}
            sums["bad_step"] = [-1]
            return first, {name: OnDevices(np.repeat(v, devices)) for name, v in sums.items()}
        sums = {"correct": 5, "log_likelihood": np.float32(-36)}
        return {name: OnDevices(np.full((devices, 1), value)) for name, value in sums.items()}


class OnDevices:
    """An array with the shards that `to_host` looks at."""

    def __init__(self, values):
        self.addressable_shards = [type("Shard", (), {"data": values})()]


UNUSUAL = {
    "beta_p": 1.5,
    "operations": ("none", "skip_connect"),
    "cells": 4,
    "channels": 2,
    "reductions": (0, 3),
    "separable_repeats": 1,
    "binary_preprocess": False,
    "batch_size": 8,
    "score_batch_size": 16,
    "score_examples": 18,
    "learning_rate": 0.3,
    "momentum": 0.7,
    "weight_decay": 0.01,
    "gradient_clip": 2.0,
    "child_optimizer": "adam",
    "child_learning_rate": 0.004,
    "edge_policy": "top2",
    "rounds": 2,
}


@pytest.fixture
def programs(monkeypatch):
    """Networks that compile nothing: what their programs are made with and called with."""
    made = {}

    def fake(kind, name):
        def make(*settings):
            made[name] = FakeProgram({kind: settings})
            return made[name]

        return make

    monkeypatch.setattr(search_networks, "make_train_call", fake("train", "train"))
    monkeypatch.setattr(search_networks, "make_score_call", fake("score", "score"))
    monkeypatch.setattr(search_networks, "pmap_donated", lambda program: program)
    monkeypatch.setattr(search_networks, "pmap_kept", lambda program: program)

    def initial_state(self):
        return {
            name: {"params": np.full(3, i, np.float32)} for i, name in enumerate((CHILD, PARENT))
        }

    class State(dict):
        @property
        def params(self):
            return self["params"]

    monkeypatch.setattr(Networks, "initial_state", initial_state)
    monkeypatch.setattr(
        Networks,
        "load",
        lambda self, states: self._states.update(
            {name: State(state) for name, state in states.items()}
        ),
    )
    monkeypatch.setattr(
        Networks, "host_state", lambda self: {k: dict(v) for k, v in self._states.items()}
    )
    monkeypatch.setattr(Networks, "memory_bytes", lambda self: {"weights": 0})
    return made


def test_programs_are_made_of_the_config_and_called_with_the_position(programs, tmp_path):
    config = configs.base_config()
    config.search.update(UNUSUAL)
    config.dataset.update(crop_padding=3, flip=False)
    config.binarizer.update(activation_estimator="swish", weight_scale="layer", pad_value=1.0)
    config.runtime.update(steps_per_call=1, optimization_level=1, formulation="native")
    search(config, tmp_path, Reporter(Console(file=io.StringIO())))
    step, optimizer = programs["train"].made_with["train"]
    network, validation, score_batch, _ = programs["score"].made_with["score"]
    assert (validation, score_batch) == (18, 16)
    assert step.supernet == network
    assert (network.cells, network.channels, network.reductions) == (4, 2, (0, 3))
    assert network.operations.separable_repeats == 1
    assert not network.operations.binary_preprocess
    assert network.operations.formulation == "native"
    assert network.operations.binarizer.activation_estimator == "swish"
    assert network.operations.binarizer.weight_scale == "layer"
    assert network.operations.binarizer.pad_value == 1.0
    assert (step.batch_size, step.crop_padding, step.flip) == (8, 3, False)
    settings = optimizer._settings
    for key in ("learning_rate", "momentum", "weight_decay", "gradient_clip"):
        assert getattr(settings, key) == UNUSUAL[key]
    assert settings.child_optimizer == "adam"
    assert settings.child_learning_rate == 0.004
    # T = 2 rounds of the one stage with two operations, two steps an epoch.
    assert settings.total_steps == 4 * 2
    assert programs["train"].options == {"xla_backend_optimization_level": 1}
    calls = [call for _, _, call in programs["train"].calls]
    assert [int(call["epoch"]) for call in calls] == [e for e in range(4) for _ in range(4)]
    assert [bool(call["binary"]) for call in calls] == [True, True, False, False] * 4
    assert [int(call["first_step"]) for call in calls] == [0, 1] * 8
    assert {int(call["num_steps"]) for call in calls} == {1}
    scored = programs["score"].calls
    assert [bool(call["binary"]) for _, _, call in scored] == [True, False] * 4
    # The scoring part, and each model's own weights.
    assert all(np.asarray(examples.labels).shape[1] == 20 for _, examples, _ in scored)
    assert [float(params[0]) for params, _, _ in scored] == [0.0, 1.0] * 4
    lines = (tmp_path / "search/history.jsonl").read_text().splitlines()
    samples = [line for line in map(json.loads, lines) if line["event"] == "sample"]
    assert {line["child_accuracy"] for line in samples} == {5 / 18}
    trained = {np.asarray(e.images).tobytes() for _, e, _ in programs["train"].calls}
    assert trained.isdisjoint({np.asarray(e.images).tobytes() for _, e, _ in scored})


OF_TRAINING = {
    *("genotype", "dataset.cutout", "dataset.color_jitter", "runtime.checkpoint_every"),
    *("dataset.stream", "dataset.workers", "dataset.crop_area", "dataset.central_crop"),
}
OF_SEARCH = {
    key
    for key in configs.RULED_KEYS - OF_TRAINING - OF_GRADIENT - OF_SAMPLED
    if key.split(".")[0] not in ("network", "train", "evaluate", "compare")
}


def test_every_key_of_the_search_is_read(programs, tmp_path, monkeypatch):
    config = configs.base_config()
    config.search.update(UNUSUAL)
    monkeypatch.setattr(main, "_CONFIG", type("Flag", (), {"value": config}))
    monkeypatch.setattr(main, "_WORKDIR", type("Flag", (), {"value": str(tmp_path)}))
    monkeypatch.setattr(main, "_parse", lambda argv: None)
    main.flags.FLAGS(["main"])
    monkeypatch.setattr(main.environment, "cache_compiled_programs", lambda: None)
    # Checks and records look at every key.
    for name in ("validate", "flatten", "config_hash", "deciding_keys"):
        for module in (configs, config_keys, search_module, search_results):
            if hasattr(module, name):
                value = {"validate": None, "config_hash": "0"}.get(name, {})
                monkeypatch.setattr(module, name, lambda *_, value=value: value)
    read = note_reads(monkeypatch, config)
    main.run([])
    # The binarizer's keys are passed on as a whole.
    assert "binarizer" in read
    assert {key for key in OF_SEARCH - read if not key.startswith("binarizer.")} == set()
