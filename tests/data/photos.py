"""Small sets of JPEGs of many sizes: `photos`, whose labels tell examples apart, and ImageNet's.

python tests/data/photos.py DIR prepares the stand-in of ImageNet under DIR.
"""

import io
import sys
from typing import ClassVar

import numpy as np
import stand_in
import tensorflow_datasets as tfds
from PIL import Image

from cpnas_jax.data.mnist5k import OfflineInfo

TRAIN = 53
VALIDATION = 22


def photo(index):
    """Return an example's pixels, uint8[h, w, 3] or, of every seventh, uint8[h, w]."""
    rng = np.random.default_rng(index)
    width, height = rng.integers(30, 90, 2).tolist()
    coarse = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return pixels[..., 0] if index % 7 == 3 else pixels


def encoded(index):
    """Return an example as a file: JPEG, every ninth PNG."""
    return stand_in.encode(photo(index), "PNG" if index % 9 == 4 else "JPEG")


class Photos(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """One class an example; splits of sound, damaged and unlabelled examples."""

    name = "photos"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=TRAIN),
        }
        return OfflineInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(TRAIN),
            "validation": self._generate_examples(VALIDATION),
            "truncated": self._generate_examples(20, truncated=1),
            "unlabelled": self._generate_examples(20, unlabelled=20),
            "partly": self._generate_examples(20, unlabelled=1),
        }

    def _generate_examples(self, count, truncated=0, unlabelled=0):
        for index in range(count):
            image = encoded(index)
            if index < truncated:
                image = io.BytesIO(image.getvalue()[:200])
            yield index, {"image": image, "label": -1 if index < unlabelled else index}


class Imagenet2012(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A stand-in under the name, version and features of the stock set.

    It has as many examples as `smoke` reads of the original.
    """

    name = "imagenet2012"
    VERSION = tfds.core.Version("5.1.0")
    SPLITS: ClassVar = {"train": 1024, "validation": 512}

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=1000),
            "file_name": tfds.features.Text(),
        }
        return OfflineInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.SPLITS}

    def _generate_examples(self, split):
        for index in range(self.SPLITS[split]):
            name = f"{split}_{index:08d}.JPEG"
            image = stand_in.encode(photo(index), "JPEG")
            yield name, {"image": image, "label": index % 1000, "file_name": name}


def prepare(data_dir, **download_options):
    """Prepare `photos`; return its version directory."""
    return stand_in.prepare(Photos, data_dir, **download_options)


if __name__ == "__main__":
    print(stand_in.prepare(Imagenet2012, *sys.argv[1:]))
