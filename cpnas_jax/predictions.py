"""What a trained network answered to each example of a split, in a file of its own.

`predictions.npz` also holds a few of the images, so that they can be shown without the data set.
"""

import io
import os
import zipfile
import zlib

import numpy as np

from cpnas_jax.evaluate import Evaluation
from cpnas_jax.feed import Feed
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.paths import user_path

NAME = "predictions.npz"
MOST_SHOWN = 12
"""Images that are kept of the right and of the wrong answers."""

_OF_EXAMPLES = {"labels": np.int32, "answers": np.int32, "confidences": np.float32}


def rows_to_show(found: Evaluation, most: int = MOST_SHOWN) -> np.ndarray:
    """Choose which examples are kept as images.

    Args:
        found: of a split.
        most: of right and of wrong ones.

    Returns:
        int[n], first the wrong answers, the surest of them first; then right ones, from every
        class in turn, in the order of the split.
    """
    wrong = np.flatnonzero((found.answers != found.labels) & (found.labels >= 0))
    surest = wrong[np.argsort(-found.confidences[wrong], kind="stable")]
    right = np.flatnonzero((found.answers == found.labels) & (found.labels >= 0))
    turns, met = np.zeros(len(right), np.int64), dict[int, int]()
    for place, label in enumerate(found.labels[right].tolist()):
        turns[place] = met[label] = met.get(label, -1) + 1
    in_turn = right[np.lexsort((found.labels[right], turns))]
    return np.concatenate([surest[:most], in_turn[:most]])


def encoded(found: Evaluation, feed: Feed) -> bytes:
    """Return the content of `predictions.npz`; to be called by all processes.

    It has `labels`, `answers` int32[n] and `confidences` f32[n] as `Evaluation` has them, and
    `images` uint8[k, height, width, channels] of the examples `rows` int[k].
    """
    rows = rows_to_show(found)
    images = feed.test_images(rows)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        labels=found.labels,
        answers=found.answers,
        confidences=found.confidences,
        rows=rows,
        images=images,
    )
    return buffer.getvalue()


def load(path: str | os.PathLike[str]) -> dict[str, np.ndarray] | None:
    """Read `predictions.npz`; None where it is absent.

    Raises:
        UserError: it is damaged.
    """
    file = user_path("predictions", path)
    if not file.exists():
        return None
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as stored:
            found = {name: stored[name] for name in (*_OF_EXAMPLES, "rows", "images")}
        _check(found)
    # What a damaged archive raises differs with the damage.
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(
            f"{file} is damaged ({' '.join(str(e).split())}); delete it, then run the same command "
            "with the mode `evaluate`"
        ) from e
    return found


def _check(found: dict[str, np.ndarray]) -> None:
    size = found["labels"].size
    for name, dtype in _OF_EXAMPLES.items():
        if found[name].shape != (size,) or found[name].dtype != dtype:
            raise ValueError(f"{name} is {found[name].dtype}{list(found[name].shape)}")
    rows, images = found["rows"], found["images"]
    if rows.ndim != 1 or rows.dtype.kind != "i" or not ((rows >= 0) & (rows < size)).all():
        raise ValueError(f"rows must be positions below {size}")
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(rows):
        raise ValueError(f"images is {images.dtype}{list(images.shape)}")
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"images have {images.shape[-1]} channels; it must be 1 or 3")
