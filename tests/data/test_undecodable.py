"""Damaged examples of sets in memory and of streams: who takes their place, who counts them."""

import functools
import logging
import multiprocessing
import shutil

import numpy as np
import photos
import pytest
import stand_in
from spoiling import spoil
from stream_cases import SIZE, STEPS, assert_same, evaluation, refusal, training

from cpnas_jax.data import datasets, records, stream, views

# One by itself, two that follow each other, and the last, whose substitute is the first.
BAD = (7, 20, 21, photos.TRAIN - 1)
SUBSTITUTES = {7: 8, 20: 22, 21: 22, photos.TRAIN - 1: 0}
BAD_VALIDATION = (3, 18)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sound")
    photos.prepare(directory, num_shards=3)
    return directory


@pytest.fixture(scope="module")
def root(sound, tmp_path_factory):
    directory = tmp_path_factory.mktemp("damaged")
    shutil.copytree(sound / "photos", directory / "photos")
    spoil(directory / "photos/1.0.0", "train", BAD)
    spoil(directory / "photos/1.0.0", "validation", BAD_VALIDATION)
    return directory


@pytest.mark.parametrize("name", ["parse_example", "_records"])
def test_a_lack_of_memory_is_no_damage(sound, monkeypatch, name):
    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr(records, name, exhausted)
    message = refusal(lambda: datasets.load_split("photos", "train", sound, SIZE, 1000))
    assert "the records of split 'train' in " in message
    assert "do not fit into memory" in message


def opened(root, split="train", limit=4):
    return stream.open_stream("photos", split, root, SIZE, limit)


@pytest.fixture(scope="module")
def labels(sound):
    """The label of every stored training example; labels tell the examples apart."""
    reader = opened(sound).reader
    box_of = functools.partial(views.central_box, fraction=1.0)
    return [reader.example(row, box_of, quick=True)[1] for row in range(photos.TRAIN)]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_next_sound_example_takes_the_place(root, sound, labels, workers):
    """Everything else is as in the sound set; the crop's draws are those of the place."""
    damaged = opened(root)
    found = list(training(damaged, epochs=2, workers=workers))
    expected = list(training(opened(sound), epochs=2))
    replaced = {labels[row]: labels[other] for row, other in SUBSTITUTES.items()}
    count = 0
    for (images, own), (whole, asked) in zip(found, expected, strict=True):
        assert own.tolist() == [replaced.get(label, label) for label in asked.tolist()]
        same = own == asked
        np.testing.assert_array_equal(images[same], whole[same])
        count += np.sum(~same)
    assert count > len(BAD)
    # Every one once, though most were met in both epochs.
    assert damaged.undecodable.rows == list(BAD)
    assert not multiprocessing.active_children()


def test_a_start_in_the_middle_and_several_processes_see_the_same(root):
    whole = list(training(opened(root), epochs=2))
    assert_same(training(opened(root), epoch=1, first_step=1), whole[STEPS + 1 :])
    streams = [opened(root), opened(root)]
    parts = [
        training(each, epochs=2, process_index=index, process_count=2)
        for index, each in enumerate(streams)
    ]
    joined = [
        tuple(map(np.concatenate, zip(*step, strict=True))) for step in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)
    rows = [set(each.undecodable.rows) for each in streams]
    assert set.union(*rows) == set(BAD)
    assert all(rows)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_damaged_example_is_not_evaluated(root, sound, processes):
    counted, filled = [], 0
    for index in range(processes):
        damaged = opened(root, "validation")
        share = {"process_index": index, "process_count": processes}
        for images, own, mask in evaluation(damaged, **share):
            assert images.shape == (8 // processes, SIZE, SIZE, 3)
            assert mask.dtype == np.float32
            counted += own[mask == 1].tolist()
            filled += np.sum(mask == 0)
    whole = list(evaluation(opened(sound, "validation"), batch_size=1))
    stored = [int(own[0]) for _, own, _ in whole]
    expected = [label for row, label in enumerate(stored) if row not in BAD_VALIDATION]
    assert sorted(counted) == sorted(expected)
    assert filled == 24 - len(expected)


def test_a_part_of_a_stream_is_filled_from_itself(root, labels):
    """The last of the first 22 examples is damaged, and the one before it."""
    few = opened(root).limited(22, "train.examples")
    found = {int(label) for _, own in training(few, epochs=5, batch_size=11) for label in own}
    assert found == {labels[row] for row in range(22) if row not in BAD}
    assert few.undecodable.rows == [7, 20, 21]


def test_statistics_are_of_what_takes_the_place(root, sound):
    damaged, whole = opened(root), opened(sound)
    every = [images for images, _, _ in evaluation(whole, batch_size=1, central=1.0)]
    images = [every[SUBSTITUTES.get(row, row)] for row in range(photos.TRAIN)]
    expected = datasets.channel_statistics(np.concatenate(images))
    np.testing.assert_array_equal(damaged.channel_statistics(), expected)
    assert damaged.undecodable.rows == list(BAD)


@pytest.mark.parametrize(("limit", "workers"), [(0, 0), (2, 1)])
def test_one_too_many(root, limit, workers, caplog):
    damaged = opened(root, limit=limit)
    message = refusal(lambda: list(training(damaged, epochs=2, workers=workers)))
    assert f"the data set in {root / 'photos/1.0.0'} is damaged or incomplete (example " in message
    assert "of split 'train', record " in message
    assert "of photos-train.array_record-0000" in message
    assert f"undecodable are {limit + 1}, config.dataset.max_undecodable is {limit}" in message
    assert "raise config.dataset.max_undecodable" in message
    assert len(caplog.records) == limit
    assert not multiprocessing.active_children()


def test_more_that_follow_each_other_than_may_be_skipped(sound, tmp_path):
    shutil.copytree(sound / "photos", tmp_path / "photos")
    spoil(tmp_path / "photos/1.0.0", "train", range(5, 12))
    damaged = opened(tmp_path, limit=3)
    message = refusal(lambda: list(training(damaged)))
    assert "undecodable are 4, config.dataset.max_undecodable is 3" in message
    assert opened(tmp_path, limit=7).channel_statistics()[0].shape == (3,)


def test_the_first_example_is_damaged(sound, tmp_path):
    """It is looked at when a stream is opened."""
    shutil.copytree(sound / "photos", tmp_path / "photos")
    spoil(tmp_path / "photos/1.0.0", "train", [0])
    message = refusal(lambda: opened(tmp_path, limit=0))
    assert "example 0 of split 'train', record 0 of photos-train.array_record-00000" in message
    assert opened(tmp_path, limit=1).undecodable.rows == [0]


def test_nothing_decodes(sound, tmp_path):
    shutil.copytree(sound / "photos", tmp_path / "photos")
    for file in (tmp_path / "photos/1.0.0").glob("photos-train*"):
        file.unlink()
    for load in (opened, lambda root, limit: load_photos(root, limit)):
        message = refusal(lambda load=load: load(tmp_path, limit=100))
        assert "no example of split 'train' can be decoded" in message
        message = refusal(lambda load=load: load(tmp_path, limit=10))
        assert "undecodable are 11, config.dataset.max_undecodable is 10" in message


def test_each_gets_a_warning_up_to_ten(sound, tmp_path, caplog):
    shutil.copytree(sound / "photos", tmp_path / "photos")
    spoil(tmp_path / "photos/1.0.0", "train", range(20, 33))
    damaged = opened(tmp_path, limit=20)
    damaged.channel_statistics()
    damaged.channel_statistics()
    assert len(damaged.undecodable) == 13
    assert len(caplog.records) == 10
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    first, last = caplog.messages[0], caplog.messages[-1]
    assert first.startswith("example 20 of split 'train', record 2 of photos-train.array_record-0")
    assert f"in {tmp_path / 'photos/1.0.0'} cannot be decoded and is skipped: " in first
    assert "(1 of at most 20, see config.dataset.max_undecodable)" in first
    assert "further ones of this split are only counted" in last


def test_a_failure_that_passes_changes_nothing(root, sound):
    class Failing:
        """A source that cannot be read at every first attempt."""

        def __init__(self, source):
            self.source, self.tried = source, set()

        def __len__(self):
            return len(self.source)

        def __getitem__(self, row):
            if row not in self.tried:
                self.tried.add(row)
                raise OSError("Input/output error")
            return self.source[row]

    unsteady = opened(sound, limit=0)
    object.__setattr__(unsteady.reader, "source", Failing(unsteady.reader.source))
    assert_same(training(unsteady), training(opened(sound)))


def test_what_was_met_before_counts_once(root):
    damaged = opened(root)
    damaged.undecodable.take_in([7, 20])
    list(training(damaged, epochs=3))
    assert damaged.undecodable.shared_rows() == list(BAD)
    damaged = opened(root, limit=2)
    message = refusal(lambda: damaged.undecodable.take_in(BAD))
    assert "undecodable are 4, config.dataset.max_undecodable is 2" in message


def load_photos(root, limit):
    return datasets.load_split("photos", "train", root, SIZE, limit)


def test_a_set_in_memory_leaves_them_out(root, sound, labels, caplog):
    found, whole = load_photos(root, 4), load_photos(sound, 0)
    kept = [row for row in range(photos.TRAIN) if row not in BAD]
    assert found.undecodable == BAD
    assert whole.undecodable == ()
    np.testing.assert_array_equal(found.images, whole.images[kept])
    np.testing.assert_array_equal(found.labels, np.asarray(labels)[kept])
    assert len(caplog.records) == len(BAD)
    part = datasets.limit_examples(found, 20, 0, "train.examples")
    assert part.undecodable == BAD
    message = refusal(lambda: load_photos(root, 3))
    assert "undecodable are 4, config.dataset.max_undecodable is 3" in message


def test_an_image_that_is_damaged_in_a_sound_record(sound):
    found = datasets.load_split("photos", "truncated", sound, SIZE, 1)
    assert len(found.labels) == 19
    assert 0 not in found.labels
    message = refusal(lambda: datasets.load_split("photos", "truncated", sound, SIZE))
    assert "of photos-truncated.array_record-00000-of-" in message
    assert "truncated" in message


def test_the_stand_in_can_be_spoilt(tmp_path):
    directory = stand_in.prepare(stand_in.Cifar10, tmp_path)
    spoil(directory, "train", [0, 100, 319])
    assert datasets.load_split("cifar10", "train", tmp_path, None, 3).undecodable == (0, 100, 319)
