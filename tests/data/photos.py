"""A small set of JPEGs of many sizes, whose labels tell the examples apart.

python tests/data/photos.py DIR prepares it under DIR.
"""

import io
import sys

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


def prepare(data_dir, **download_options):
    """Prepare the set; return its version directory."""
    return stand_in.prepare(Photos, data_dir, **download_options)


if __name__ == "__main__":
    print(prepare(*sys.argv[1:]))
