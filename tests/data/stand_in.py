"""Small synthetic CIFAR-10 and CIFAR-100 in the layout of the prepared tfds sets.

    python tests/data/stand_in.py DIR

prepares both under DIR, so that whatever reads `cifar10` or `cifar100` runs where the real data is
absent. Names, versions, features and files are those of the stock sets; the images are noise over
the colour and the stripes of their class: random, but learnable.
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from cpnas_jax.data.mnist5k import OfflineInfo

SPLITS = {"train": 320, "test": 80}
SIZE = 32


def draw(num_classes, split):
    """Return images uint8[n, 32, 32, 3] and labels int64[n] of one split, classes in turn."""
    palette = np.random.default_rng(num_classes).uniform(40, 215, (num_classes, 3))
    rng = np.random.default_rng([num_classes, len(split)])
    labels = np.arange(SPLITS[split]) % num_classes
    frequency = (1 + labels % 5)[:, None, None, None]
    stripes = 30 * np.sin(2 * np.pi * frequency * np.arange(SIZE)[None, :, None, None] / SIZE)
    noise = rng.normal(0, 25, (len(labels), SIZE, SIZE, 3))
    images = palette[labels][:, None, None, :] + stripes + noise
    return np.clip(images, 0, 255).astype(np.uint8), labels


def encode(image, file_format="PNG"):
    """Return an image as an open file, which tfds stores as it is, without TensorFlow."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, file_format)
    file.seek(0)
    return file


def prepare(builder_class, data_dir, **download_options):
    """Prepare a builder as array_record, quietly and offline; return its version directory."""
    tfds.disable_progress_bar()
    with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
        builder = builder_class(data_dir=data_dir)
        builder.download_and_prepare(
            download_dir=downloads,
            download_config=tfds.download.DownloadConfig(
                try_download_gcs=False, **download_options
            ),
            file_format="array_record",
        )
    return Path(builder.data_dir)


class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """CIFAR-10's stand-in."""

    name = "cifar10"
    VERSION = tfds.core.Version("3.0.2")
    NUM_CLASSES = 10
    COARSE = 0

    def _info(self):
        labels = {"label": self._class_label("class", self.NUM_CLASSES)}
        if self.COARSE:
            labels["coarse_label"] = self._class_label("coarse", self.COARSE)
        return OfflineInfo(
            builder=self,
            description="Synthetic stand-in.",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 3)),
                    **labels,
                }
            ),
            supervised_keys=("image", "label"),
        )

    @staticmethod
    def _class_label(prefix, count):
        return tfds.features.ClassLabel(names=[f"{prefix}_{index:02d}" for index in range(count)])

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split):
        for index, (image, label) in enumerate(zip(*draw(self.NUM_CLASSES, split), strict=True)):
            example = {"id": f"{split}_{index:05d}", "image": encode(image), "label": int(label)}
            if self.COARSE:
                example["coarse_label"] = int(label) % self.COARSE
            yield index, example


class Cifar100(Cifar10, skip_registration=True):
    """CIFAR-100's stand-in, with its two label features."""

    name = "cifar100"
    NUM_CLASSES = 100
    COARSE = 20


def main(arguments):
    """Prepare both sets under the directory that the only argument names."""
    if len(arguments) != 1:
        print("usage: python tests/data/stand_in.py DIR", file=sys.stderr)
        return 2
    for builder_class in (Cifar10, Cifar100):
        print(prepare(builder_class, arguments[0]))
    return 0


def overwrite(directory):
    """Damage the train split of a prepared cifar10 in many places."""
    (file,) = directory.glob("cifar10-train*")
    content = bytearray(file.read_bytes())
    for start in range(1000, len(content) - 200, 20000):
        content[start : start + 100] = bytes(100)
    file.write_bytes(content)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
