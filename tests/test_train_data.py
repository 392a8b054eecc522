"""Data that a training cannot use: one line that names the directory, and nothing is begun."""

import functools
import os

import numpy as np
import pytest
import stand_in
import tensorflow_datasets as tfds
from small_training import GENOTYPE, Command, refusal

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
