"""What a search asks of its networks and does with their answers; networks are stood in for."""

import dataclasses
import io
import itertools
import json
import os
import signal

import numpy as np
import pytest
from reads import note_reads
from rich.console import Console

from cpnas_jax import config as configs
from cpnas_jax import main, search_networks, search_results
from cpnas_jax import search as search_module
from cpnas_jax.architecture.events import parse_history
from cpnas_jax.architecture.genotype import Genotype
from cpnas_jax.architecture.replay import replay
from cpnas_jax.data.datasets import Split
from cpnas_jax.diagnosis import NotFinite
from cpnas_jax.models.space import OPERATIONS
from cpnas_jax.path_optimizer import CHILD, PARENT
from cpnas_jax.runtime import processes
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.interruptions import Stopped, handled, stop_wished
from cpnas_jax.search import search
from cpnas_jax.search_networks import Networks

NONE = OPERATIONS.index("none")
FIVE = OPERATIONS[:5]
"""What an edge chooses from where nothing else is said."""
TOTAL = 5 + 4 + 3 + 2
"""Sampled epochs of a search with one round."""


@pytest.fixture(autouse=True)
def data(monkeypatch):
    """Forty grey images in place of a data set."""
    generator = np.random.default_rng(0)
    split = Split(
        generator.integers(0, 256, (40, 4, 4, 1), np.uint8),
        np.arange(40, dtype=np.int32) % 10,
        10,
        tuple("0123456789"),
        "greys",
    )
    monkeypatch.setattr(search_module, "load_split", lambda *_: split)


class Oracle:
    """Networks whose accuracy is the mean worth of what was sampled, and a log of the requests."""

    paths, steps_per_epoch = 1, 3
    first_step_seconds = 1.0
    worth = np.linspace(0.1, 0.8, len(OPERATIONS))

    def __init__(self, config, train, validation, total, started):
        del started
        self.requests, self.total = [], total
        self.parts = (len(train.labels), len(validation.labels))
        self.compile_seconds = {"train": 0.0, "score": 0.0}
        self.batch = config.search.batch_size
        Oracle.last = self

    def initial_state(self):
        return {name: {"weights": np.zeros(2, np.float32)} for name in (CHILD, PARENT)}

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

    def accuracy(self, model, architecture):
        return float(self.worth[architecture].mean()) * (1.0 if model == PARENT else 0.5)


@pytest.fixture
def handlers():
    with handled():
        yield


class LikesNothing(Oracle):
    """Best is `none` on the two edges that enter the first node of the normal cell."""

    def accuracy(self, model, architecture):
        return 0.5 * float(architecture[0, 0] == NONE) + 0.4 * float(architecture[0, 1] == NONE)


def run(monkeypatch, workdir, networks=Oracle, **settings):
    monkeypatch.setattr(search_module, "Networks", networks)
    config = configs.base_config()
    config.search.update({"rounds": 1, "operations": FIVE, **settings})
    file = io.StringIO()
    genotype = search(config, workdir, Reporter(Console(file=file, width=200)))
    return genotype, file.getvalue()


def log_of(workdir):
    return list(parse_history((workdir / "search/history.jsonl").read_text()))


def test_both_models_are_trained_and_scored_with_what_was_sampled(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path)
    samples = [line for line in log_of(tmp_path) if line["event"] == "sample"]
    assert len(samples) == Oracle.last.total == TOTAL
    assert Oracle.last.parts == (20, 20)
    requests = iter(Oracle.last.requests)
    for epoch, line in enumerate(samples):
        names = [[OPERATIONS.index(name) for name in cell] for cell in line["architecture"]]
        for model in (CHILD, PARENT):
            for kind, number in (("train", epoch), ("score", None)):
                found = next(requests)
                assert (found[0], found[1], found[3]) == (kind, model, number)
                np.testing.assert_array_equal(found[2], names)
        worth = Oracle.worth[np.asarray(names)].mean()
        assert line["parent_accuracy"] == pytest.approx(worth)
        assert line["child_accuracy"] == pytest.approx(worth / 2)
        assert line["z"] == pytest.approx(2 * (worth - worth / 2) + worth / 2)
    assert next(requests, None) is None


@pytest.mark.parametrize(("policy", "edges"), [("all", 14), ("top2", 8)])
def test_the_edge_policy_is_that_of_the_config(monkeypatch, tmp_path, policy, edges):
    genotype, _ = run(monkeypatch, tmp_path, edge_policy=policy)
    assert genotype.edge_policy == policy
    assert (len(genotype.normal), len(genotype.reduce)) == (edges, edges)
    assert genotype == Genotype.load(tmp_path / "genotype.json")


def test_a_dead_node_is_restored_aloud_and_on_record(monkeypatch, tmp_path):
    operations = ("none", "skip_connect", "sep_conv_3x3")
    genotype, said = run(monkeypatch, tmp_path, LikesNothing, operations=operations, rounds=4)
    restored = json.loads((tmp_path / "results.json").read_text())["search"]["restored"]
    checked = replay(log_of(tmp_path), seed=0, rounds=4, beta_p=2.0, operations=operations)
    differing = int((genotype.architecture() != checked.operations).sum())
    assert len(restored) == differing > 0
    for line in restored:
        assert "normal cell, edge" in line
        assert "dead node" in line
        assert line in said


def test_a_genotype_of_another_config_is_not_taken_for_a_finished_search(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path / "first")
    other = tmp_path / "second"
    other.mkdir()
    (tmp_path / "first/genotype.json").rename(other / "genotype.json")
    with pytest.raises(UserError, match="not of this config"):
        run(monkeypatch, other, beta_p=1.0)
    # Nor did the mistake claim the directory.
    assert not (other / "config.json").exists()
    assert not (other / "search").exists()


def test_checkpoints_of_another_config_are_refused_and_kept(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path)
    for name in ("config.json", "genotype.json"):
        (tmp_path / name).unlink()
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"checkpoints in .* are not of this config"):
        run(monkeypatch, tmp_path, beta_p=1.0)
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"score_batch_size": 32}, r"config.search.score_batch_size is 32.*only 20 images"),
        ({"batch_size": 24}, r"config.search.batch_size is 24.*only 20 images"),
        (
            {"channels": 4096},
            "needs about .* MiB .weights and optimizers.*lower config.search.channels",
        ),
    ],
)
def test_sizes_that_data_or_memory_do_not_allow(monkeypatch, tmp_path, settings, words):
    fitting = {"batch_size": 16, "score_batch_size": 16}
    with pytest.raises(UserError, match=words):
        run(monkeypatch, tmp_path, Networks, **{**fitting, **settings})
    assert not (tmp_path / "config.json").exists()


def test_a_border_wider_than_the_image(monkeypatch, tmp_path):
    monkeypatch.setattr(search_module, "Networks", Networks)
    config = configs.base_config()
    config.search.update(batch_size=16, score_batch_size=16)
    config.dataset.crop_padding = 5
    with pytest.raises(UserError, match=r"config.dataset.crop_padding is 5.*at most 4"):
        search(config, tmp_path, Reporter(Console(file=io.StringIO())))


def test_a_damaged_genotype_of_a_finished_search_is_made_again(monkeypatch, tmp_path):
    genotype, _ = run(monkeypatch, tmp_path)
    path = tmp_path / "genotype.json"
    whole = path.read_text()
    path.write_text(whole[:100])
    with pytest.raises(UserError, match="Delete it: the same command writes it again"):
        run(monkeypatch, tmp_path)
    path.unlink()
    assert run(monkeypatch, tmp_path)[0] == genotype
    assert path.read_text() == whole
    assert Oracle.last.requests == []


def test_what_was_not_decoded_is_told_and_on_record(monkeypatch, tmp_path):
    split = search_module.load_split()
    fewer = dataclasses.replace(split, undecodable=(3, 8))
    monkeypatch.setattr(search_module, "load_split", lambda *_: fewer)
    _, said = run(monkeypatch, tmp_path)
    assert "skipped because they cannot be decoded: 2 of split 'train'." in said
    results = json.loads((tmp_path / "results.json").read_text())["search"]
    assert results["undecodable"] == {"train": 2}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ((7,), "example 3 can be decoded again"),
        ((3, 7, 9), "example 7, 9 can no longer be decoded"),
    ],
)
def test_other_damaged_examples_than_before_are_refused(monkeypatch, tmp_path, rows, words):
    class Stops(Oracle):
        def train(self, model, architectures, epoch, sums):
            if epoch == 4:
                raise UserError("stop")
            return super().train(model, architectures, epoch, sums)

    whole = search_module.load_split()
    monkeypatch.setattr(
        search_module, "load_split", lambda *_: dataclasses.replace(whole, undecodable=(3,))
    )
    with pytest.raises(UserError, match="stop"):
        run(monkeypatch, tmp_path, Stops)
    monkeypatch.setattr(
        search_module, "load_split", lambda *_: dataclasses.replace(whole, undecodable=rows)
    )
    with pytest.raises(UserError, match=words):
        run(monkeypatch, tmp_path)
    monkeypatch.setattr(
        search_module, "load_split", lambda *_: dataclasses.replace(whole, undecodable=(3,))
    )
    run(monkeypatch, tmp_path)


def test_a_step_that_is_not_finite_names_what_is_saved(monkeypatch, tmp_path):
    class Bad(Oracle):
        def train(self, model, architecture, epoch, sums):
            if (model, epoch, sums.steps) == (PARENT, 4, 2):
                raise NotFinite("step 3 is not", "conv 0", "Try another")
            return super().train(model, architecture, epoch, sums)

    with pytest.raises(UserError) as caught:
        run(monkeypatch, tmp_path, Bad)
    # Two models of three steps and one more number each.
    path = tmp_path / "search/checkpoints" / str(4 * 2 * 4)
    assert str(caught.value) == (
        f"step 3 is not; conv 0; the last good checkpoint is {path}, after sampled epoch 4 of "
        f"{TOTAL}. Try another"
    )
    assert path.exists()
    assert processes.is_everywhere(caught.value)
    assert f"Resumed after sampled epoch 4 of {TOTAL}" in run(monkeypatch, tmp_path)[1]


def test_another_machine_is_told(monkeypatch, tmp_path):
    class Stops(Oracle):
        def train(self, model, architectures, epoch, sums):
            if epoch == 4:
                raise UserError("stop")
            return super().train(model, architectures, epoch, sums)

    with pytest.raises(UserError, match="stop"):
        run(monkeypatch, tmp_path, Stops)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    stored["search"]["devices"] = ["TPU v4"] * 32
    path.write_text(json.dumps(stored))
    _, said = run(monkeypatch, tmp_path)
    assert "Begun elsewhere: devices was ['TPU v4'" in said
    assert f"Resumed after sampled epoch 4 of {TOTAL}" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("model", [CHILD, PARENT])
@pytest.mark.parametrize("step", [1, 3])
def test_a_signal_saves_in_the_middle_of_a_sampled_epoch(
    monkeypatch, tmp_path, handlers, capfd, number, model, step
):
    undisturbed, _ = run(monkeypatch, tmp_path / "undisturbed")
    requests = Oracle.last.requests

    class Signalled(Oracle):
        def train(self, own, architectures, epoch, sums):
            stop = super().train(own, architectures, epoch, sums)
            if (epoch, own, sums.steps) == (4, model, step) and not stop:
                os.kill(os.getpid(), number)
                sum(range(10))  # the signal is looked at here
                return stop_wished()
            return stop

    where = f"in sampled epoch 5 of {TOTAL}, after step {step} of the {model}"
    with pytest.raises(Stopped, match=where):
        run(monkeypatch, tmp_path / "run", Signalled)
    assert "once more stops at once" in capfd.readouterr().err
    before = Oracle.last.requests
    genotype, said = run(monkeypatch, tmp_path / "run")
    assert f"Resumed {where}." in said
    assert genotype == undisturbed
    histories = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in log_of(tmp_path / name)]
        for name in ("run", "undisturbed")
    ]
    assert histories[0] == histories[1]
    # Nothing is done twice; a training that goes on asks again.
    for first, second in zip(before + Oracle.last.requests, requests, strict=True):
        assert first[:2] == second[:2]
        np.testing.assert_array_equal(first[2], second[2])


def test_a_signal_after_the_last_step_is_not_forgotten(monkeypatch, tmp_path, handlers):
    class Late(Oracle):
        def score(self, model, architectures):
            if len(self.requests) == 4 * TOTAL - 1:
                os.kill(os.getpid(), signal.SIGTERM)
                sum(range(10))
            return super().score(model, architectures)

    with pytest.raises(Stopped, match="after the last step"):
        run(monkeypatch, tmp_path, Late)
    assert f"Resumed after sampled epoch {TOTAL} of {TOTAL}" in run(monkeypatch, tmp_path)[1]


class Together(Oracle):
    """Trains up to three architectures of a round at the same time."""

    paths = 3


def test_waves_of_a_round_are_credited_in_its_order(monkeypatch, tmp_path):
    genotype, said = run(monkeypatch, tmp_path, Together)
    lines = log_of(tmp_path)
    # Whatever is trained together, the log is that of an Algorithm 9: it can be replayed.
    checked = replay(lines, seed=0, rounds=1, beta_p=2.0, operations=FIVE)
    np.testing.assert_array_equal(genotype.architecture(), checked.operations)
    assert "Up to 3 architectures of a round are trained at the same time" in said
    requests = Together.last.requests
    waves = [len(list(group)) for _, group in itertools.groupby(requests, lambda each: each[:2])]
    # A round of 5 is 3 + 2; both models are trained and then scored.
    assert waves[:8] == [3] * 4 + [2] * 4
    trained = [epoch for *what, _, epoch in requests if what == ["train", CHILD]]
    assert trained == list(range(TOTAL))


@pytest.mark.parametrize("paths", [3, 2])
def test_a_wave_is_finished_by_as_many_groups(monkeypatch, tmp_path, handlers, paths):
    class Signalled(Together):
        def train(self, own, architectures, epoch, sums):
            stop = super().train(own, architectures, epoch, sums)
            if (epoch, own, sums.steps) == (3, PARENT, 2) and not stop:
                os.kill(os.getpid(), signal.SIGTERM)
                sum(range(10))  # the signal is looked at here
                return stop_wished()
            return stop

    with pytest.raises(Stopped, match=f"in sampled epoch 4 of {TOTAL}, after step 2 of the parent"):
        run(monkeypatch, tmp_path / "run", Signalled)
    monkeypatch.setattr(Oracle, "paths", paths)
    if paths == 2:
        with pytest.raises(UserError, match=r"3 architectures were .* these devices train 2"):
            run(monkeypatch, tmp_path / "run")
    monkeypatch.setattr(Oracle, "paths", 3)
    genotype, _ = run(monkeypatch, tmp_path / "run")
    assert genotype == run(monkeypatch, tmp_path / "undisturbed")[0]


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
        return OnDevices(np.full((devices, 1), 5))


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
    assert (validation, score_batch) == (20, 16)
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
    trained = {np.asarray(e.images).tobytes() for _, e, _ in programs["train"].calls}
    assert trained.isdisjoint({np.asarray(e.images).tobytes() for _, e, _ in scored})


OF_TRAINING = {
    *("genotype", "dataset.cutout", "dataset.color_jitter", "runtime.checkpoint_every"),
    *("dataset.stream", "dataset.workers", "dataset.crop_area", "dataset.central_crop"),
}
OF_SEARCH = {
    key
    for key in configs.RULED_KEYS - OF_TRAINING
    if key.split(".")[0] not in ("network", "train", "evaluate")
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
        for module in (configs, search_module, search_results):
            if hasattr(module, name):
                value = {"validate": None, "config_hash": "0"}.get(name, {})
                monkeypatch.setattr(module, name, lambda *_, value=value: value)
    read = note_reads(monkeypatch, config)
    main.run([])
    # The binarizer's keys are passed on as a whole.
    assert "binarizer" in read
    assert {key for key in OF_SEARCH - read if not key.startswith("binarizer.")} == set()
