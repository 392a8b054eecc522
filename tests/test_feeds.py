"""Training and evaluating on a stream: every example once, resume bitwise, the same as resident."""

import functools
import io
import json

import jax
import numpy as np
import photos
import pytest
from one_cell import GENOTYPE
from rich.console import Console

from cpnas_jax import config as configs
from cpnas_jax import feeds
from cpnas_jax.data import views
from cpnas_jax.models.network import Network
from cpnas_jax.network_config import network_settings
from cpnas_jax.runtime import parallel, stall
from cpnas_jax.runtime.console import Reporter
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.train import train
from cpnas_jax.trainer import EpochSums, Trainer

SIZE = 8
BATCH = 16


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    directory = tmp_path_factory.mktemp("photos")
    photos.prepare(directory, num_shards=2)
    GENOTYPE.save(directory / "cells.json")
    return directory


@pytest.fixture
def config(root):
    config = configs.base_config()
    config.genotype = str(root / "cells.json")
    config.dataset.update(name="photos", data_dir=str(root), image_size=SIZE, stream=True)
    config.dataset.update(crop_padding=0, cutout=0, color_jitter=0.4, central_crop=1.0)
    config.network.update(cells=1, channels=4, drop_path=0.0, auxiliary=False)
    config.network.separable_repeats = 1
    config.train.update(epochs=2, batch_size=BATCH, evaluate_every=1)
    config.evaluate.update(split="validation", batch_size=BATCH)
    config.runtime.update(optimization_level=0, steps_per_call=2)
    return config


def run(config, workdir):
    file = io.StringIO()
    train(config, workdir, Reporter(Console(file=file, width=200)))
    return file.getvalue()


def history(workdir):
    lines = (workdir / "train/metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "images_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def trainer_of(config):
    feed = feeds.open_feed(config)
    settings = network_settings(config, GENOTYPE, feed.facts.num_classes, binary=True)
    return Trainer(config, settings, feed), feed


def test_a_killed_stream_goes_on_bitwise(config, tmp_path, monkeypatch):
    text = run(config, tmp_path / "whole")
    assert f"{photos.TRAIN} training and {photos.VALIDATION} validation images of 8x8x3" in text
    config.runtime.checkpoint_every = 1
    calls = []
    step = feeds.StreamFeed.train

    def killed(self, program, state, call):
        calls.append((int(call.epoch), int(call.first_step)))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(self, program, state, call)

    with monkeypatch.context() as patch:
        patch.setattr(feeds.StreamFeed, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "cut")
    assert calls[1][1] == 1, "killed in the middle of an epoch"
    assert "Resumed in epoch 1 of 2, after step 1" in run(config, tmp_path / "cut")
    whole, cut = history(tmp_path / "whole"), history(tmp_path / "cut")
    # Sums over other calls may differ in their last digit; what the weights give may not.
    assert [line["test_loss"] for line in whole] == [line["test_loss"] for line in cut]
    assert [line["test_accuracy"] for line in whole] == [line["test_accuracy"] for line in cut]


def test_every_example_of_a_stream_is_counted_once(config):
    trainer, feed = trainer_of(config)
    state = trainer.initial_state()
    trainer.load(state)
    found = trainer.evaluate(0)
    # By hand: one example after the other, in numpy but for the network itself.
    mean, std = (np.asarray(value)[0] for value in feed._statistics)
    network = Network(trainer._settings)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    answer = jax.jit(lambda image: network.apply(variables, image[None], train=False).logits[0])
    confusion = np.zeros((photos.TRAIN,) * 2, int)
    losses, stored, answers = [], [], []
    parts = feed._streams[1].evaluation_batches(
        batch_size=1, process_index=0, process_count=1, central=1.0
    )
    for images, labels, mask in parts:
        assert mask == 1
        logits = np.asarray(answer((np.float32(images[0]) / np.float32(255) - mean) / std))
        confusion[labels[0], logits.argmax()] += 1
        stored.append((images[0], labels[0]))
        answers.append(logits.argmax())
        losses.append(np.log(np.exp(logits).sum()) - logits[labels[0]])
    assert found.examples == found.confusion.sum() == photos.VALIDATION
    # A rounding error may flip a sign and with it an answer; filling counted would change rows.
    np.testing.assert_array_equal(found.confusion.sum(axis=1), confusion.sum(axis=1))
    assert np.abs(found.confusion - confusion).sum() <= 2
    np.testing.assert_allclose(found.loss, np.mean(losses), rtol=1e-2)
    # Each answer stands at its example's place, and its image is found by that.
    np.testing.assert_array_equal(found.labels, [label for _, label in stored])
    assert (found.answers != answers).sum() <= 1
    rows = np.array([photos.VALIDATION - 1, 0, 3])
    images = feed.test_images(rows)
    np.testing.assert_array_equal(images, [stored[row][0] for row in rows])


def test_the_old_state_of_a_streamed_step_is_donated(config, monkeypatch):
    named, wait = set(), stall.waiting
    monkeypatch.setattr(stall, "waiting", lambda what: named.add(what) or wait(what))
    trainer, feed = trainer_of(config)
    trainer.load(trainer.initial_state())
    donated = jax.tree.leaves(trainer._state)
    trainer.train(0, 0, 1, EpochSums())
    feed.close()
    assert all(leaf.is_deleted() for leaf in donated)
    # What it may have to wait for is known, should it wait for long.
    assert named >= {"the data to be opened", "the channels' statistics", "the compiler"}
    assert named >= {"the batch of step 1 from the reader", parallel._DEVICES}


def test_batches_are_divided_among_the_devices_in_order(config):
    _, feed = trainer_of(config)
    (images, labels), failed = next(feed._training_batches(0, 0))
    assert failed is None
    devices = jax.local_device_count()
    assert images.shape == (devices, BATCH // devices, SIZE, SIZE, 3)
    assert images.dtype == np.uint8
    again = next(
        feed._streams[0].training_batches(
            seed=0, epoch=0, first_step=0, batch_size=BATCH, process_index=0, process_count=1
        )
    )
    np.testing.assert_array_equal(np.asarray(labels).ravel(), again[1])
    feed.close()


def test_keys_that_a_stream_cannot_do_without_or_with(config):
    config.dataset.image_size = 0
    with pytest.raises(UserError, match=r"config\.dataset\.image_size is 0"):
        feeds.open_feed(config)
    config.dataset.image_size = SIZE
    for part, count in (("train", photos.TRAIN), ("evaluate", photos.VALIDATION)):
        config[part].examples = count + 1
        with pytest.raises(UserError, match=rf"{part}.examples is {count + 1}; .* only {count}"):
            feeds.open_feed(config)
        config[part].examples = 0


def test_a_part_of_a_stream(config):
    """The first stored examples and no others, in every epoch; as many are evaluated as asked."""
    config.train.examples, config.evaluate.examples = 2 * BATCH, 5
    trainer, feed = trainer_of(config)
    assert (feed.facts.num_train, feed.facts.num_test) == (2 * BATCH, 5)
    assert trainer.steps_per_epoch == 2
    batches = feed._streams[0].training_batches(
        seed=0, epoch=0, first_step=0, batch_size=BATCH, process_index=0, process_count=1, epochs=2
    )
    whole = functools.partial(views.central_box, fraction=1.0)
    reader = feed._streams[0].reader
    stored = sorted(reader.example(row, whole, quick=True)[1] for row in range(2 * BATCH))
    labels = np.concatenate([labels for _, labels in batches])
    assert sorted(labels[: 2 * BATCH]) == sorted(labels[2 * BATCH :]) == stored
    trainer.load(trainer.initial_state())
    assert trainer.evaluate(0).examples == 5
