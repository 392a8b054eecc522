import itertools
import multiprocessing
import os
import resource
import shutil
import time

import jax
import numpy as np
import photos
import pytest
from stream_cases import BATCH, SIZE, STEPS, assert_same, evaluation, gone, refusal, training

from cpnas_jax.data import datasets, records, stream


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    directory = tmp_path_factory.mktemp("photos")
    photos.prepare(directory, num_shards=3)
    return directory


@pytest.fixture(scope="module")
def train(root):
    return stream.open_stream("photos", "train", root, SIZE)


@pytest.fixture(scope="module")
def validation(root):
    return stream.open_stream("photos", "validation", root, SIZE)


class Watched:
    """A source that notes which records were read."""

    def __init__(self, source):
        self._source = source
        self.rows = []

    def __len__(self):
        return len(self._source)

    def __getitem__(self, row):
        self.rows.append(row)
        return self._source[row]


@pytest.fixture
def watched(monkeypatch):
    """Open a split and note its reads."""

    def open_watched(*arguments):
        opened = stream.open_stream(*arguments)
        source = Watched(opened.reader.source)
        object.__setattr__(opened.reader, "source", source)
        return opened, source

    return open_watched


def test_what_a_stream_says_of_itself(train):
    assert (train.name, train.split, train.num_examples) == ("photos", "train", photos.TRAIN)
    assert (train.num_classes, train.image_shape) == (photos.TRAIN, (SIZE, SIZE, 3))
    assert train.class_names[5] == "5"


def test_an_epoch_holds_every_example_but_the_remainder_once(train):
    epochs = [np.concatenate([n for _, n in training(train, epoch=e)]) for e in range(30)]
    for labels in epochs:
        assert len(labels) == STEPS * BATCH == len(set(labels.tolist()))
    assert len({labels.tobytes() for labels in epochs}) == 30
    # Five of 53 are left out each time, so hardly any is in all of thirty epochs.
    counts = np.bincount(np.concatenate(epochs), minlength=photos.TRAIN)
    assert counts.min() < 30
    assert np.mean(counts == 30) < 0.3


def test_a_start_in_the_middle_goes_on_alike(train):
    whole = list(training(train, epochs=3))
    assert len(whole) == 3 * STEPS
    images, labels = whole[0]
    assert images.shape == (BATCH, SIZE, SIZE, 3)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
    for epoch, first_step in [(0, 1), (0, STEPS), (1, 0), (2, 3), (2, STEPS)]:
        rest = training(train, epoch=epoch, first_step=first_step, epochs=3 - epoch)
        assert_same(rest, whole[epoch * STEPS + first_step :])


def test_one_example_is_cropped_otherwise_in_every_epoch_and_seed(train):
    seen = set()
    for seed, epoch in itertools.product(range(2), range(10)):
        for images, labels in training(train, seed=seed, epoch=epoch):
            seen |= {images[i].tobytes() for i in np.flatnonzero(labels == 8)}
    assert len(seen) > 15


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_a_batch_and_read_nothing_else(root, watched, processes):
    expected = list(training(stream.open_stream("photos", "train", root, SIZE), first_step=1))
    parts, rows = [], []
    for index in range(processes):
        opened, source = watched("photos", "train", root, SIZE)
        parts.append(
            list(training(opened, first_step=1, process_index=index, process_count=processes))
        )
        assert len(source.rows) == (STEPS - 1) * BATCH // processes
        rows += source.rows
    assert len(set(rows)) == len(rows) == (STEPS - 1) * BATCH
    assert_same(
        [
            tuple(np.concatenate(arrays) for arrays in zip(*step, strict=True))
            for step in zip(*parts, strict=True)
        ],
        expected,
    )


def test_order_and_crops_are_pinned():
    """A run that was started under one numpy goes on alike under another."""
    assert stream._epoch_order(7, 2, 12).tolist() == [7, 10, 8, 1, 4, 11, 0, 9, 2, 6, 3, 5]
    box_of = stream._random_box(7, 2, 13, (0.08, 1.0), (3 / 4, 4 / 3))
    assert box_of(500, 375) == (123, 55, 278, 300)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_evaluation_counts_every_example_once(root, watched, processes):
    counted = []
    for index in range(processes):
        opened, source = watched("photos", "validation", root, SIZE)
        batches = list(evaluation(opened, process_index=index, process_count=processes))
        assert len(batches) == 3
        for images, labels, mask in batches:
            assert images.shape == (8 // processes, SIZE, SIZE, 3)
            assert (images.dtype, labels.dtype, mask.dtype) == (np.uint8, np.int32, np.float32)
            counted += labels[mask == 1].tolist()
        assert len(source.rows) == 24 // processes
    assert sorted(counted) == list(range(photos.VALIDATION))


def test_stored_pixels_come_back_where_nothing_is_resized(tmp_path):
    whole = datasets.load_split("mnist5k", "test", tmp_path)
    opened = stream.open_stream("mnist5k", "test", tmp_path)
    assert opened.image_shape == (28, 28, 1)
    batches = list(evaluation(opened, batch_size=500, central=1.0))
    assert_same(
        batches,
        [
            (whole.images[rows], whole.labels[rows], np.ones(500, np.float32))
            for rows in (slice(0, 500), slice(500, 1000))
        ],
    )


def test_channel_statistics(train, root):
    found = train.channel_statistics()
    images = np.concatenate(
        [images[mask == 1] for images, _, mask in evaluation(train, central=1.0)]
    )
    np.testing.assert_array_equal(found, datasets.channel_statistics(images))
    few = train.channel_statistics(10)
    rows = [0, 5, 10, 15, 21, 26, 31, 37, 42, 47]
    np.testing.assert_array_equal(few, datasets.channel_statistics(images[rows]))


@pytest.mark.parametrize(
    "wrong",
    [{"first_step": STEPS + 1}, {"batch_size": 54}, {"process_count": 5}, {"process_index": 1}],
)
def test_numbers_that_do_not_fit(train, wrong):
    with pytest.raises(ValueError, match=r"first_step|batch_size"):
        next(training(train, **wrong))


def test_sizes_that_cannot_be(root):
    message = refusal(lambda: stream.open_stream("photos", "train", root))
    assert "config.dataset.image_size" in message
    assert str(root) in message
    message = refusal(lambda: stream.open_stream("photos", "train", root, 0))
    assert "config.dataset.image_size=0" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image(root, workers):
    opened = stream.open_stream("photos", "truncated", root, SIZE)
    message = refusal(lambda: list(training(opened, batch_size=20, workers=workers)))
    assert str(root / "photos" / "1.0.0") in message
    assert "truncated" in message
    assert "damaged" in message
    assert not multiprocessing.active_children()


def test_unlabelled_split_is_refused_at_once(root):
    message = refusal(lambda: stream.open_stream("photos", "unlabelled", root, SIZE))
    assert "unlabelled" in message
    assert str(root) in message


def test_single_label_that_is_no_class(root):
    opened = stream.open_stream("photos", "partly", root, SIZE)
    message = refusal(lambda: list(evaluation(opened)))
    assert "labels outside 0..52" in message


def test_damaged_and_missing_files(root, tmp_path):
    shutil.copytree(root / "photos", tmp_path / "photos")
    opened = stream.open_stream("photos", "train", tmp_path, SIZE)
    second = next((tmp_path / "photos" / "1.0.0").glob("photos-train*-00001-of-00003"))
    content = bytearray(second.read_bytes())
    content[2000:-2000] = bytes(len(content) - 4000)
    second.write_bytes(content)
    assert "damaged" in refusal(lambda: list(training(opened)))
    second.unlink()
    opened = stream.open_stream("photos", "train", tmp_path, SIZE)
    assert str(tmp_path) in refusal(lambda: list(training(opened)))


@pytest.mark.parametrize("name", ["imagenet2012", "imagenet2012_real"])
def test_set_that_has_to_be_downloaded_by_hand(tmp_path, name):
    stream.open_stream("mnist5k", "train", tmp_path)  # everything is imported
    start = time.perf_counter()
    message = refusal(lambda: stream.open_stream(name, "train", tmp_path, SIZE))
    assert time.perf_counter() - start < 1
    assert f"data.prepare {name} --data_dir={tmp_path} --manual_dir=DIR" in message
    assert "ILSVRC2012_img_val.tar" in message
    if name == "imagenet2012":
        assert "ILSVRC2012_img_train.tar" in message


def test_batches_are_read_before_they_are_asked_for(root, watched):
    opened, source = watched("photos", "train", root, SIZE)
    batches = training(opened)
    next(batches)
    assert gone(lambda: len(source.rows) < 3 * BATCH)
    batches.close()


def test_more_files_than_a_process_may_have_open(tmp_path):
    photos.prepare(tmp_path, num_shards=20)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened_now = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened_now + 10, limits[1]))
        opened = stream.open_stream("photos", "train", tmp_path, SIZE)
        assert len(list(training(opened))) == STEPS
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_limit_of_open_files_that_cannot_be_raised(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 128))
    message = refusal(lambda: records.allow_open_files(1000))
    assert "1000 files" in message
    assert "128" in message
    assert "ulimit -n 2024" in message


def test_batches_are_placed_ahead_on_the_devices_of_a_pmap(train):
    expected = list(training(train, batch_size=16, epochs=2))
    made = []

    def batches():
        try:
            for batch in expected:
                made.append(batch)
                yield batch
        finally:
            made.append("closed")

    step = jax.pmap(lambda images, labels: (images + np.uint8(1), labels))
    placed = stream.placed_ahead(batches(), depth=2)
    for number, (images, labels) in enumerate(placed, 1):
        assert len(made) == min(number + 1, len(expected)) + (number == len(expected))
        assert images.sharding.device_set == set(jax.local_devices())
        with jax.transfer_guard("disallow"):
            found = step(images, labels)
        one, other = (np.asarray(a).reshape(-1, *a.shape[2:]) for a in found)
        assert_same([(one - np.uint8(1), other)], [expected[number - 1]])
    assert made[-1] == "closed"

    made.clear()
    source = batches()
    placed = stream.placed_ahead(source)
    next(placed)
    placed.close()
    assert made[-1] == "closed"
