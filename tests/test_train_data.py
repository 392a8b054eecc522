"""Data that a training cannot use: one line that names the directory, and nothing is begun.

Or, up to a limit, warnings, and a training without what cannot be decoded.
"""

import functools
import json
import os

import numpy as np
import photos
import pytest
import stand_in
import tensorflow_datasets as tfds
from command_line import call_main
from small_training import GENOTYPE, Command, refusal
from spoiling import spoil

from cpnas_jax.data.mnist5k import OfflineInfo


@pytest.fixture
def refused(monkeypatch, tmp_path, capsys):
    GENOTYPE.save(tmp_path / "cells.json")
    return functools.partial(refusal, Command(monkeypatch, tmp_path), capsys)


def any_size(builder):
    """Return the info of a set whose images may have any size."""
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": builder._class_label("class", builder.NUM_CLASSES),
    }
    return OfflineInfo(
        builder=builder,
        features=tfds.features.FeaturesDict(features),
        supervised_keys=("image", "label"),
    )


class Unlabelled(stand_in.Cifar10, skip_registration=True):
    """A test split without labels, which tfds stores as -1."""

    name = "unlabelled"

    def _generate_examples(self, split):
        for index, example in super()._generate_examples(split):
            yield index, {**example, "label": -1 if split == "test" else example["label"]}


class Smaller(stand_in.Cifar10, skip_registration=True):
    """The test images are smaller than the training images."""

    name = "smaller"

    def _info(self):
        return any_size(self)

    def _generate_examples(self, split):
        side = 6 if split == "test" else 8
        for index in range(16):
            image = np.full((side, side, 3), index, np.uint8)
            yield index, {"image": stand_in.encode(image), "label": index % self.NUM_CLASSES}


class Sizes(stand_in.Cifar10, skip_registration=True):
    """One image is larger than all others."""

    name = "sizes"

    def _info(self):
        return any_size(self)

    def _generate_examples(self, split):
        for index in range(16):
            image = np.full((9 if index == 5 else 8, 8, 3), index, np.uint8)
            yield index, {"image": stand_in.encode(image), "label": index % self.NUM_CLASSES}


def cut(directory):
    (file,) = directory.glob("cifar10-test*")
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("damage", [cut, stand_in.overwrite])
def test_damaged_data(refused, tmp_path, damage):
    directory = stand_in.prepare(stand_in.Cifar10, tmp_path / "data")
    damage(directory)
    error = refused("train", tmp_path / "run")
    assert f"{directory} is damaged" in error
    assert "prepare" in error
    assert not (tmp_path / "run/config.json").exists()


def test_a_label_outside_the_classes(refused, tmp_path):
    """As many names as classes, but fewer than the labels need."""
    directory = stand_in.prepare(stand_in.Cifar10, tmp_path / "data")
    path = directory / "features.json"
    path.write_text(path.read_text().replace('"numClasses": "10"', '"numClasses": "7"'))
    names = directory / "label.labels.txt"
    names.write_text("".join(names.read_text().splitlines(keepends=True)[:7]))
    error = refused("train", tmp_path / "run")
    assert f"split 'train' in {directory} has labels outside 0..6: 9, for one" in error
    assert not (tmp_path / "run/config.json").exists()


@pytest.mark.parametrize(
    ("builder", "arguments", "words"),
    [
        (Unlabelled, (), "split 'test' in {} has labels outside 0..9: it is unlabelled"),
        (Sizes, ("--config.dataset.image_size=0",), "the images of {} differ in size"),
        (
            Smaller,
            ("--config.dataset.image_size=0",),
            "images of smaller are of 8x8x3, those to evaluate of 6x6x3; set",
        ),
    ],
)
def test_data_that_cannot_be_trained_with(refused, tmp_path, builder, arguments, words):
    directory = stand_in.prepare(builder, tmp_path / "data")
    name = f"--config.dataset.name={builder.name}"
    error = refused("train", tmp_path / "run", name, "--config.train.batch_size=8", *arguments)
    assert words.format(directory) in error
    assert not (tmp_path / "run/config.json").exists()


STREAMED = (
    *("--config.dataset.name=photos", "--config.dataset.stream=True", "--config.seed=1"),
    *("--config.dataset.crop_padding=0", "--config.dataset.cutout=0"),
    *("--config.train.batch_size=8", "--config.evaluate.split=validation"),
    *("--config.runtime.checkpoint_every=1", "--config.evaluate.batch_size=16"),
    "--config.train.epochs=1",
)


def contents(workdir):
    """The results and the log, without durations."""
    results = json.loads((workdir / "results.json").read_text())["train"]
    lines = map(json.loads, (workdir / "train/metrics.jsonl").read_text().splitlines())
    timed = ("seconds", "images_per_second")
    return [{k: v for k, v in entry.items() if k not in timed} for entry in (results, *lines)]


def test_a_stream_goes_on_under_a_higher_limit(monkeypatch, tmp_path, capsys):
    """It stops in its first epoch, and then ends as one that was never stopped."""
    directory = photos.prepare(tmp_path / "data")
    spoil(directory, "train", range(0, 40, 8))
    spoil(directory, "validation", [3])
    GENOTYPE.save(tmp_path / "cells.json")
    command = Command(monkeypatch, tmp_path)
    # The channels' statistics, which look at all examples, would meet the damage at once.
    error = refusal(command, capsys, "train", tmp_path / "run", *STREAMED)
    assert f"the data set in {directory} is damaged or incomplete (example 0 of split 't" in error
    assert "record 0 of photos-train.array_record-00000-of-00001: " in error
    assert "undecodable are 1, config.dataset.max_undecodable is 0" in error
    limit = "--config.dataset.max_undecodable="
    monkeypatch.setattr("cpnas_jax.data.stream.Stream.channel_statistics", halves)
    capsys.readouterr()
    assert command("train", tmp_path / "run", *STREAMED, f"{limit}3") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "undecodable are 4, config.dataset.max_undecodable is 3" in error
    assert any((tmp_path / "run/train/checkpoints").iterdir())
    # One of the five is left out of this epoch.
    assert command("train", tmp_path / "run", *STREAMED, f"{limit}5") == 0
    said = capsys.readouterr().out
    assert "Resumed in epoch 1 of 1, after step " in said
    sentence = "Examples skipped because they cannot be decoded: 4 of split 'train', 1 of split"
    assert sentence in said
    assert command("train", tmp_path / "whole", *STREAMED, f"{limit}100") == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    results = contents(tmp_path / "run")[0]
    assert results["undecodable"] == {"train": 4, "validation": 1}
    assert results["test"]["examples"] == photos.VALIDATION - 1
    assert command("evaluate", tmp_path / "run", *STREAMED, f"{limit}5") == 0
    found = json.loads((tmp_path / "run/train/evaluation.json").read_text())
    assert (found["examples"], found["undecodable"]) == (photos.VALIDATION - 1, 1)
    assert np.sum(found["confusion"]) == photos.VALIDATION - 1
    assert f"{photos.VALIDATION - 1} examples: top-1 {found['top1']:.4f}" in capsys.readouterr().out
    assert found["top1"] == results["test"]["top1"]


def halves(_):
    return np.full(3, 0.5, np.float32), np.full(3, 0.5, np.float32)


def test_a_set_in_memory_is_trained_on_without_them(monkeypatch, tmp_path, capsys, caplog):
    directory = stand_in.prepare(stand_in.Cifar10, tmp_path / "data")
    spoil(directory, "train", [5, 6])
    spoil(directory, "test", [79])
    GENOTYPE.save(tmp_path / "cells.json")
    command = Command(monkeypatch, tmp_path)
    error = refusal(command, capsys, "train", tmp_path / "run")
    assert "example 5 of split 'train', record 5 of cifar10-train.array_record-00000-of" in error
    assert not (tmp_path / "run/config.json").exists()
    assert command("train", tmp_path / "run", "--config.dataset.max_undecodable=2") == 0
    said = capsys.readouterr().out
    assert "Training a 1-bit child on cifar10: 318 training and 79 test images" in said
    assert "cannot be decoded: 2 of split 'train', 1 of split 'test'." in said
    assert len(caplog.records) == 3
    results = json.loads((tmp_path / "run/results.json").read_text())["train"]
    assert results["undecodable"] == {"train": 2, "test": 1}
    assert results["test"]["examples"] == 79


def test_a_search_names_what_it_cannot_decode(monkeypatch, tmp_path, capsys):
    directory = stand_in.prepare(stand_in.Cifar10, tmp_path / "data")
    spoil(directory, "train", [5, 6])
    arguments = (
        f"--config.dataset.data_dir={tmp_path / 'data'}",
        *("--config.dataset.max_undecodable=1", f"--workdir={tmp_path / 'run'}"),
    )
    assert call_main(monkeypatch, "--config=configs/cifar10.py:search,smoke", *arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: the data set in {directory} is damaged or incomplete (example")
    assert "example 6 of split 'train', record 6 of cifar10-train.array_record-00000-of-0" in error
    assert "undecodable are 2, config.dataset.max_undecodable is 1" in error
