"""Whole trainings of one small cell on eight devices: files, variants, mistakes.

Compiling is what takes time: programs of equal settings come from a cache of this file, and one
training serves all tests that only look at what it wrote.
"""

import dataclasses
import io
import json
import math
from typing import NamedTuple

import jax
import numpy as np
import pytest
from draws import QUICK
from one_cell import (
    GENOTYPE,
    PARTS,
    config_in,
    lines_of,
    replace_data,
    reporter_to,
    results_of,
    run,
    trainer_of,
)
from reads import note_reads
from scipy import special

from cpnas_jax import config as configs
from cpnas_jax import config_keys, modes, predictions, train_step
from cpnas_jax import train as train_module
from cpnas_jax import trained as trained_module
from cpnas_jax.models.network import Network
from cpnas_jax.models.summary import summarise
from cpnas_jax.network_config import network_settings
from cpnas_jax.runtime import environment
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.packing import digest
from cpnas_jax.runtime.parallel import replicate
from cpnas_jax.trainer import EpochSums


@pytest.fixture(autouse=True, scope="module")
def data():
    """The data above in place of a data set."""
    with pytest.MonkeyPatch.context() as patch:
        replace_data(patch)
        yield


@pytest.fixture
def config(tmp_path):
    return config_in(tmp_path)


class Trained(NamedTuple):
    """A finished training: where it is, what it said and which keys it read."""

    workdir: object
    said: str
    read: set


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    config = config_in(directory)
    with pytest.MonkeyPatch.context() as patch:
        read = note_reads(patch, config)

        def unnoted(function):
            """Records look at every key, whether anything depends on it or not."""

            def call(*arguments):
                before = set(read)
                value = function(*arguments)
                read.intersection_update(before)
                return value

            return call

        for module, name in (
            (train_module, "deciding_keys"),
            (train_module, "flatten"),
            (trained_module, "deciding_keys"),
        ):
            patch.setattr(module, name, unnoted(getattr(module, name)))
        said = run(config, directory / "run")
        return Trained(directory / "run", said, set(read))


def test_a_training_and_its_files(config, trained):
    lines = lines_of(trained.workdir)
    assert [(line["event"], line["epoch"], line["step"]) for line in lines] == [
        ("epoch", 1, 4),
        ("epoch", 2, 8),
    ]
    for name in ("loss", "cross_entropy", "auxiliary", "reconstruction", "center"):
        assert all(line[name] > 0 for line in lines)
    total = lines[0]
    weighted = (
        total["cross_entropy"]
        + 0.4 * total["auxiliary"]
        + 1e-4 * total["reconstruction"]
        + 1e-3 * total["center"]
    )
    assert total["loss"] == pytest.approx(weighted, rel=1e-5)
    # Three of four steps of warm-up are done; at the end the cosine's last step but one.
    assert lines[0]["learning_rate"] == pytest.approx(0.01 * 3 / 4)
    assert lines[1]["learning_rate"] == pytest.approx(0.01 * (1 + np.cos(np.pi * 3 / 4)) / 2)
    results = results_of(trained.workdir)
    assert results["test"]["examples"] == 37
    assert results["test"]["top1"] == lines[-1]["test_accuracy"]
    assert results["best_test_accuracy"] == max(line["test_accuracy"] for line in lines)
    assert "estimated memory" in trained.said
    assert "nothing is run again" in run(config, trained.workdir)


EVALUATION = {
    **{
        "split": "test",
        "checkpoint": "last",
        "precision": "binary",
        "epoch": 2,
        "class_names": list("abcdef"),
        "undecodable": 0,
    },
    **dict.fromkeys(("examples", "top1", "top5", "loss", "per_class", "confusion")),
}


def test_a_trained_network_answers_for_its_checkpoint_and_for_no_other_cells(config, trained):
    file = io.StringIO()
    modes.evaluate_mode(config, trained.workdir, reporter_to(file))
    value = json.loads((trained.workdir / "train/evaluation.json").read_text())
    assert set(value) == set(EVALUATION)
    for key, expected in EVALUATION.items():
        assert expected in (None, value[key])
    assert value["examples"] == np.sum(value["confusion"]) == 37
    assert value["top1"] == results_of(trained.workdir)["test"]["top1"]
    assert value["top1"] == pytest.approx(np.trace(value["confusion"]) / 37)
    assert value["top1"] <= value["top5"] <= 1
    shares = np.diagonal(value["confusion"]) / np.sum(value["confusion"], axis=1)
    assert value["per_class"] == pytest.approx(shares)
    kept = predictions.load(trained.workdir / "train/predictions.npz")
    confusion = np.zeros((6, 6), int)
    np.add.at(confusion, (kept["labels"], kept["answers"]), 1)
    np.testing.assert_array_equal(confusion, value["confusion"])
    np.testing.assert_array_equal(kept["images"], PARTS["test"].images[kept["rows"]])
    assert (
        f"last checkpoint, after epoch 2, on the split test, 37 examples: top-1 {value['top1']:.4f}"
    ) in file.getvalue()
    assert "estimated memory of a device: " in file.getvalue()
    assert "evaluation program" in file.getvalue()
    config.genotype = "DARTS_V2"
    with pytest.raises(UserError, match="has other cells than were trained"):
        run(config, trained.workdir)
    with pytest.raises(UserError, match="has other cells than were trained"):
        modes.evaluate_mode(config, trained.workdir, reporter_to(file))


READ_ELSEWHERE = {
    "mode",
    "evaluate.checkpoint",
    *("runtime.compilation_cache", "runtime.stall_seconds"),
    *("dataset.workers", "dataset.crop_area", "dataset.central_crop"),  # of streams
}


OTHERS = ("search.", "compare.", "binarizer.", "export.", "predict.")


def test_every_key_of_a_training_is_read(trained):
    expected = {key for key in configs.RULED_KEYS if not key.startswith(OTHERS)}
    assert expected - READ_ELSEWHERE - trained.read == set()
    assert {"binarizer", "network.precision"} <= trained.read
    assert READ_ELSEWHERE - trained.read  # a record of all keys is no use of them


def logits_of(settings, state):
    """A network's answers to the test images, in one batch."""
    pixels = PARTS["train"].images / 255.0
    images = ((PARTS["test"].images / 255.0 - pixels.mean()) / pixels.std()).astype(np.float32)
    whole = jax.jit(
        lambda variables, images: Network(settings).apply(variables, images, train=False).logits,
        compiler_options=QUICK,
    )
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return np.asarray(whole(variables, images))


def loss_of(logits):
    own = logits[np.arange(37), PARTS["test"].labels]
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - own)


def test_evaluation_counts_every_example_once_with_running_averages(config):
    config.train.average_decay = 0.0
    trainer = trainer_of(config)
    state = trainer.initial_state()
    trainer.load(state)
    found = trainer.evaluate(0)
    split = PARTS["test"]
    logits = logits_of(network_settings(config, GENOTYPE, 6, binary=True), state)
    answers = logits.argmax(axis=1)
    expected = np.zeros((6, 6), int)
    np.add.at(expected, (split.labels, answers), 1)
    np.testing.assert_array_equal(found.confusion, expected)
    np.testing.assert_array_equal(found.answers, answers)
    np.testing.assert_array_equal(found.labels, split.labels)
    softmax = special.softmax(logits, axis=1)
    np.testing.assert_allclose(found.confidences, softmax.max(axis=1), rtol=1e-4)
    assert found.top1 == pytest.approx((answers == split.labels).mean())
    top5 = np.argsort(-logits, axis=1)[:, :5]
    assert found.top5 == pytest.approx((top5 == split.labels[:, None]).any(axis=1).mean())
    assert found.loss == pytest.approx(loss_of(logits), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_at_its_step(config, monkeypatch):
    """What the program tells is what the message says; `bad_step` counts from 0."""
    trainer = trainer_of(config)
    trainer.load(trainer.initial_state())
    terms = dict.fromkeys(("loss", *train_step.LOSS_TERMS, "accuracy"), np.float32(math.nan))

    def program(state, examples, call):
        del examples, call
        return state, replicate({**terms, "bad_step": np.int32(1)})

    trainer._programs["train", False] = program
    monkeypatch.setattr(trainer, "_bad_layer", lambda *place: f"looked at {place}")
    with pytest.raises(UserError) as caught:
        trainer.train(0, 0, 3, EpochSums())
    assert str(caught.value).startswith(
        "the loss, its gradient or the update is not finite in step 2 of epoch 1; looked at (0, 1)."
    )
    assert "config.train.learning_rate" in str(caught.value)


def test_a_parent_beside_the_child_is_trained_too(config):
    config.network.auxiliary = False
    config.train.update(parent_kernel=True, average_decay=0.0)
    trainer = trainer_of(config)
    before = trainer.initial_state()
    trainer.load(before)
    donated = jax.tree.leaves(trainer._state)
    sums = EpochSums()
    trainer.train(0, 0, 2, sums)
    after = trainer.host_state()
    assert all(leaf.is_deleted() for leaf in donated)
    assert sums.values["parent"] > 0
    assert sums.values["reconstruction"] > 0
    for old, new in (
        (before.params, after.params),
        (before.parent["params"], after.parent["params"]),
    ):
        kernels = [
            (a, b)
            for (path, a), b in zip(
                jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new), strict=True
            )
            if path[-1].key == "kernel"
        ]
        assert kernels
        assert all(np.any(a != b) for a, b in kernels)


def test_the_old_state_is_donated(config):
    """Weights, optimizer, averages and class means: training needs their memory once."""
    trainer = trainer_of(config)
    trainer.load(trainer.initial_state())
    donated = jax.tree.leaves(trainer._state)
    assert len(donated) > 2 * len(jax.tree.leaves(trainer._state.params))
    trainer.train(0, 0, 1, EpochSums())
    assert all(leaf.is_deleted() for leaf in donated)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(trainer._state))


def test_two_step_training_begins_with_real_weights(config):
    """Beside a training without the first part: other steps before its end, the same after it."""

    def after_each_epoch(real_epochs):
        config.train.real_weights_epochs = real_epochs
        trainer = trainer_of(config)
        start = trainer.initial_state()
        for epoch in (0, 1):
            trainer.load(start)
            trainer.train(epoch, 0, 2, EpochSums())
            yield digest(trainer.host_state())

    (first, second), (usual, same) = after_each_epoch(1), after_each_epoch(0)
    assert first != usual
    assert second == same


def test_an_evaluation_is_of_the_network_that_is_trained(config):
    """With real weights in the first part, with their signs in the second."""
    config.train.update(real_weights_epochs=1, average_decay=0.0)
    trainer = trainer_of(config)
    state = trainer.initial_state()

    trainer.load(state)
    one_bit = network_settings(config, GENOTYPE, 6, binary=True)
    operations = dataclasses.replace(one_bit.operations, binary_weights=False)
    real = dataclasses.replace(one_bit, operations=operations)
    expected = [loss_of(logits_of(network, state)) for network in (real, one_bit)]
    assert expected[0] != pytest.approx(expected[1], rel=1e-4)
    found = [trainer.evaluate(epoch).loss for epoch in (0, 1)]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("room", [1_000_000, 8_000_000])
def test_a_training_that_does_not_fit_is_refused_before_it_begins(
    config, tmp_path, monkeypatch, room
):
    """By its weights and data alone, or by what the compiled program says it needs."""
    monkeypatch.setattr(environment, "device_memory", lambda: room)
    words = r"does not fit on a device: .*lower config\.train\.batch_size, config\.network\.chan"
    with pytest.raises(UserError, match=words):
        run(config, tmp_path / "run")
    # The workdir is still free for one that fits.
    assert not (tmp_path / "run/config.json").exists()
    assert not (tmp_path / "run/results.json").exists()


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("", "genotype", "", "config.genotype is empty"),
        ("", "genotype", "nowhere.json", "nowhere.json"),
        ("train", "batch_size", 80, "config.train.batch_size is 80.*only 70 images"),
    ],
)
def test_mistakes_are_named_before_anything_is_claimed(
    config, tmp_path, section, key, value, words
):
    node = config[section] if section else config
    node[key] = value
    with pytest.raises(UserError, match=words):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run/config.json").exists()


def test_the_summary_is_written_and_told(config, tmp_path):
    file = io.StringIO()
    modes.summary_mode(config, tmp_path / "run", reporter_to(file))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert set(summary["parameters"]) == {"total", "binary", "float"}
    assert set(summary["memory_bytes"]) == {"packed", "float"}
    assert set(summary["macs"]) == {"binary", "binary_depthwise", "float"}
    assert {"ops", "compression", "parent", "layers"} <= set(summary)
    # Of CIFAR-10, whose shape is known without its files.
    binary = network_settings(config, GENOTYPE, 10, binary=True)
    assert summary == json.loads(json.dumps(summarise(binary, (32, 32, 3)).to_dict()))
    assert f"{summary['parameters']['total']:,} parameters" in file.getvalue()
    config.network.precision = "float"
    modes.summary_mode(config, tmp_path / "run", reporter_to(io.StringIO()))
    parent = json.loads((tmp_path / "run/summary_parent.json").read_text())
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary
    assert parent["parameters"]["binary"] == 0
    assert parent["parameters"]["total"] == summary["parent"]["parameters"]


def test_another_network_is_not_summarised_into_a_run(config, trained):
    before = (trained.workdir / "results.json").read_bytes()
    for key, value, words in (
        ("genotype", "DARTS_V2", "has other cells than were trained"),
        ("network", {"channels": 8}, "holds a run of another config"),
    ):
        own = config.copy_and_resolve_references()
        own.update({key: value})
        with pytest.raises(UserError, match=words):
            modes.summary_mode(own, trained.workdir, reporter_to(io.StringIO()))
    assert (trained.workdir / "results.json").read_bytes() == before
    assert not (trained.workdir / "summary.json").exists()


def test_a_search_leaves_the_choice_of_the_network(config, tmp_path):
    """What a training shares with the search must be the same; then its own keys are recorded."""
    searched = config.copy_and_resolve_references()
    searched.network.channels, searched.train.epochs = 32, 600
    path = tmp_path / "run/config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"config": config_keys.flatten(searched)}))
    config.seed = 1
    with pytest.raises(UserError, match="differing: seed") as caught:
        run(config, tmp_path / "run")
    assert "channels" not in str(caught.value)
    config.seed = 0
    run(config, tmp_path / "run")
    assert json.loads(path.read_text())["config"] == config_keys.flatten(config)
    config.network.channels = 8
    with pytest.raises(UserError, match=r"differing: network\.channels"):
        run(config, tmp_path / "run")
