"""Whole trainings of a small network on eight devices: files, resume, variants, mistakes."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reads import note_reads
from rich.console import Console

from cpnas_jax import config as configs
from cpnas_jax import modes, train_step
from cpnas_jax import train as train_module
from cpnas_jax.architecture.genotype import Edge, Genotype
from cpnas_jax.data.datasets import Split
from cpnas_jax.models.network import Network
from cpnas_jax.runtime.checkpoints import Checkpoints, digest
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.train import train
from cpnas_jax.trainer import EpochSums, Trainer, network_settings

CELL = (
    *((0, 2, "max_pool_3x3"), (1, 2, "skip_connect")),
    *((0, 3, "avg_pool_3x3"), (2, 3, "skip_connect")),
    *((0, 4, "max_pool_3x3"), (3, 4, "skip_connect")),
    *((0, 5, "dil_conv_3x3"), (4, 5, "skip_connect")),
)
EDGES = tuple(Edge(target=target, source=source, operation=name) for source, target, name in CELL)
GENOTYPE = Genotype(normal=EDGES, reduce=EDGES, edge_policy="top2")


def part(n, seed):
    """Classes that differ in their brightness."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.int32) % 6
    images = generator.integers(0, 60, (n, 8, 8, 1)) + 38 * labels[:, None, None, None]
    return Split(images.astype(np.uint8), labels, 6, tuple("abcdef"), "greys")


@pytest.fixture(autouse=True)
def data(monkeypatch):
    """70 training images, four steps an epoch; 37 test images, no multiple of anything."""
    parts = {"train": part(70, 0), "test": part(37, 1)}
    monkeypatch.setattr(train_module, "load_split", lambda _, split, *__: parts[split])


@pytest.fixture(autouse=True, scope="module")
def compiled_once(tmp_path_factory):
    """Each trainer compiles its own programs; equal ones come from a cache of this file."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "cells.json"
    GENOTYPE.save(path)
    config = configs.base_config()
    config.genotype = str(path)
    config.dataset.update(crop_padding=1, cutout=2)
    config.network.update(cells=3, channels=4, drop_path=0.1)
    config.train.update(epochs=2, batch_size=16, evaluate_every=1, learning_rate=0.01)
    config.train.update(label_smoothing=0.1, average_decay=0.5, warmup_epochs=1)
    config.evaluate.batch_size = 16
    config.runtime.update(optimization_level=0, steps_per_call=3)
    return config


def run(config, workdir):
    file = io.StringIO()
    train(config, workdir, Reporter(Console(file=file, width=200)))
    return file.getvalue()


def lines_of(workdir):
    text = (workdir / "train/metrics.jsonl").read_text()
    timed = ("seconds", "images_per_second")
    return [
        {k: v for k, v in json.loads(line).items() if k not in timed} for line in text.splitlines()
    ]


def trainer_of(config, binary=True):
    settings = network_settings(config, GENOTYPE, 6, binary=binary)
    return Trainer(config, settings, part(70, 0), part(37, 1))


def final_state(config, workdir):
    with Checkpoints(workdir / "train/checkpoints", 2) as checkpoints:
        return checkpoints.restore_newest(trainer_of(config).initial_state())


class Killed(Exception):
    pass


def test_a_training_its_files_and_its_resume_in_the_middle_of_an_epoch(
    config, tmp_path, monkeypatch
):
    said = run(config, tmp_path / "whole")
    lines = lines_of(tmp_path / "whole")
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
    results = json.loads((tmp_path / "whole/results.json").read_text())["train"]
    assert results["test"]["examples"] == 37
    assert results["test"]["top1"] == lines[-1]["test_accuracy"]
    assert results["best_test_accuracy"] == max(line["test_accuracy"] for line in lines)
    assert "estimated memory" in said
    assert "nothing is run again" in run(config, tmp_path / "whole")

    # Killed after the first checkpoint inside the second epoch, in other portions of steps.
    config.runtime.update(checkpoint_every=1, steps_per_call=2)
    original = Trainer.train

    def killed(self, epoch, first_step, num_steps, sums):
        if (epoch, first_step) == (1, 2):
            raise Killed
        original(self, epoch, first_step, num_steps, sums)

    monkeypatch.setattr(Trainer, "train", killed)
    with pytest.raises(Killed):
        run(config, tmp_path / "killed")
    monkeypatch.setattr(Trainer, "train", original)
    assert "Resumed in epoch 2 of 2, after step 2" in run(config, tmp_path / "killed")
    expected, found = (final_state(config, tmp_path / name) for name in ("whole", "killed"))
    assert digest(found.state) == digest(expected.state)
    for a, b in zip(lines_of(tmp_path / "killed"), lines, strict=True):
        assert a.pop("event") == b.pop("event")
        # Sums of three steps and one, or of single steps, may differ in the last digit.
        assert a == pytest.approx(b, rel=1e-6)

    # The same workdir answers for its checkpoint, and for no other cells.
    file = io.StringIO()
    modes.evaluate_mode(config, tmp_path / "whole", Reporter(Console(file=file, width=200)))
    value = json.loads((tmp_path / "whole/evaluation.json").read_text())
    assert value["top1"] == results["test"]["top1"]
    assert np.sum(value["confusion"]) == 37
    assert value["class_names"] == list("abcdef")
    assert f"37 examples: top-1 {value['top1']:.4f}" in file.getvalue()
    config.genotype = "DARTS_V2"
    with pytest.raises(UserError, match="differing: genotype"):
        run(config, tmp_path / "whole")


READ_ELSEWHERE = {
    "mode",
    "evaluate.checkpoint",
    "runtime.compilation_cache",
    "dataset.validation_fraction",
}


def test_every_key_of_a_training_is_read(config, tmp_path, monkeypatch):
    config.train.epochs = 1
    # Records look at every key.
    for name in ("deciding_keys", "flatten"):
        monkeypatch.setattr(train_module, name, lambda *_: {})
    read = note_reads(monkeypatch, config)
    run(config, tmp_path)
    expected = {key for key in configs.RULED_KEYS if not key.startswith(("search.", "binarizer."))}
    assert expected - READ_ELSEWHERE - read == set()
    assert {"binarizer", "network.precision"} <= read


def test_evaluation_counts_every_example_once_with_running_averages(config):
    config.train.average_decay = 0.0
    trainer = trainer_of(config)
    state = trainer.initial_state()
    trainer.load(state)
    found = trainer.evaluate()
    split, train_split = part(37, 1), part(70, 0)
    pixels = train_split.images / 255.0
    images = ((split.images / 255.0 - pixels.mean()) / pixels.std()).astype(np.float32)
    settings = network_settings(config, GENOTYPE, 6, binary=True)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = np.asarray(Network(settings).apply(variables, images, train=False).logits)
    answers = logits.argmax(axis=1)
    expected = np.zeros((6, 6), int)
    np.add.at(expected, (split.labels, answers), 1)
    np.testing.assert_array_equal(found.confusion, expected)
    assert found.top1 == pytest.approx((answers == split.labels).mean())
    top5 = np.argsort(-logits, axis=1)[:, :5]
    assert found.top5 == pytest.approx((top5 == split.labels[:, None]).any(axis=1).mean())
    own = logits[np.arange(37), split.labels]
    loss = np.mean(np.log(np.exp(logits).sum(axis=1)) - own)
    assert found.loss == pytest.approx(loss, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_at_its_step(config, tmp_path, monkeypatch):
    """From the second step on, when the class means have moved."""

    def broken(features, labels, means):
        del features, labels
        return jnp.where(jnp.any(means != 0), jnp.float32(jnp.nan), jnp.float32(0))

    monkeypatch.setattr(train_step.losses, "center", broken)
    with pytest.raises(UserError) as caught:
        run(config, tmp_path / "run")
    assert str(caught.value).startswith("the loss is not finite in step 2 of epoch 1;")
    assert "config.train.learning_rate" in str(caught.value)


def test_a_parent_beside_the_child_is_trained_too(config):
    config.train.update(parent_kernel=True, average_decay=0.0)
    trainer = trainer_of(config)
    before = trainer.initial_state()
    trainer.load(before)
    sums = EpochSums()
    trainer.train(0, 0, 2, sums)
    after = trainer.host_state()
    assert sums.values["parent"] > 0
    assert sums.values["reconstruction"] > 0
    for old, new in ((before.params, after.params), (before.parent, after.parent)):
        assert any(
            not np.array_equal(a, b)
            for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
        )


def test_two_step_training_begins_with_real_weights(config):
    config.train.update(real_weights_epochs=1, reconstruction_weight=0.0, average_decay=0.0)
    config.train.update(warmup_epochs=0)
    trainer = trainer_of(config)
    start = trainer.initial_state()

    def after(epoch):
        trainer.load(start)
        trainer.train(epoch, 0, 1, EpochSums())
        return trainer.host_state()

    assert trainer._step_settings(True).network.operations.binary_weights is False
    real, binary = after(0), after(1)
    assert digest(real) != digest(binary)
    assert len(trainer._programs) == 2


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("", "genotype", "", "config.genotype is empty"),
        ("", "genotype", "nowhere.json", "nowhere.json"),
        ("train", "batch_size", 80, "config.train.batch_size is 80.*only 70 images"),
        ("network", "cells", 1, None),
    ],
)
def test_mistakes_are_named_before_anything_is_claimed(
    config, tmp_path, section, key, value, words
):
    node = config[section] if section else config
    node[key] = value
    if words is None:
        assert dataclasses.is_dataclass(network_settings(config, GENOTYPE, 6, binary=True))
        return
    with pytest.raises(UserError, match=words):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run/config.json").exists()


def test_evaluating_what_was_never_trained(config, tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint; run the same command with the mode"):
        modes.evaluate_mode(config, tmp_path / "run", Reporter(Console(file=io.StringIO())))


def test_the_summary_is_written_and_told(config, tmp_path):
    file = io.StringIO()
    modes.summary_mode(config, tmp_path / "run", Reporter(Console(file=file, width=200)))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert set(summary["parameters"]) == {"total", "binary", "float"}
    assert set(summary["memory_bytes"]) == {"packed", "float"}
    assert set(summary["macs"]) == {"binary", "binary_depthwise", "float"}
    macs = summary["macs"]
    assert summary["ops"] == macs["float"] + (macs["binary"] + macs["binary_depthwise"]) / 64
    assert f"{summary['parameters']['total']:,} parameters" in file.getvalue()
