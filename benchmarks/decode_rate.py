"""How many images of ImageNet's size a core decodes, crops and resizes in a second.

The package's own reading of a training image (`data/views.py`): a JPEG of 500x375 pixels and about
110 KB, ImageNet's means, made here of smooth colours and noise; a random resized crop to 224x224.
In one thread, with the image in memory.

    python benchmarks/decode_rate.py --repeats 7

One JSON object as the last line.
"""

import argparse
import functools
import io
import json
import time

import numpy as np
from harness import spread
from PIL import Image

from cpnas_jax.data.views import TRIES, random_crop_box, read_view

WIDTH, HEIGHT, SIZE = 500, 375, 224
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def photo(seed: int) -> bytes:
    """Return a JPEG whose size in bytes is about that of a photo."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float64)
    noisy = np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=94)
    return file.getvalue()


def main() -> None:
    """Time blocks of images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--images", type=int, default=100, help="of a block")
    flags = parser.parse_args()
    photos = [photo(seed) for seed in range(20)]
    rng = np.random.default_rng(0)
    rates, busy = [], []
    for _ in range(flags.repeats):
        start, used = time.perf_counter(), time.process_time()
        for number in range(flags.images):
            draws = rng.random((TRIES, 4))
            box = functools.partial(random_crop_box, area=AREA, ratio=RATIO, draws=draws)
            read_view(photos[number % len(photos)], "RGB", SIZE, box, quick=True)
        rates.append(flags.images / (time.perf_counter() - start))
        busy.append(flags.images / (time.process_time() - used))
    found = {
        "benchmark": "decode_rate",
        "mean_bytes": round(np.mean([len(data) for data in photos])),
        "images_per_second": spread(rates),
        "images_per_core_second": spread(busy),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
