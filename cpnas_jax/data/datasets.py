"""Image classification sets in memory: loading a split, dividing it, its channel statistics."""

import dataclasses
import os
from collections.abc import Iterable
from fractions import Fraction

import numpy as np

from cpnas_jax.data import decode, records
from cpnas_jax.data.undecodable import Undecodable, nothing_decodes
from cpnas_jax.runtime.errors import UserError

# Images summed at once in `channel_statistics`; bounds its temporary memory.
_STATISTICS_CHUNK = 2048


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """The examples of a split, decoded.

    Attributes:
        images: uint8[n, height, width, channels]; grayscale has one channel.
        labels: int32[n], each in [0, num_classes).
        num_classes: number of classes of the data set, present in this split or not.
        class_names: their names, in the order of the labels.
        name: name of the data set.
        undecodable: numbers of the stored examples that are left out.
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    class_names: tuple[str, ...]
    name: str
    undecodable: tuple[int, ...] = ()


def open_set(name: str, data_dir: str | os.PathLike[str] | None) -> records.PreparedSet:
    """Open a prepared set; `mnist5k` is prepared on its first use.

    Raises:
        UserError: see `records.open_prepared` and `mnist5k.prepare`.
    """
    if name == "mnist5k":
        # Imported here: defining the builder needs tfds, which takes half a second to import.
        from cpnas_jax.data import mnist5k

        mnist5k.prepare(data_dir)
    return records.open_prepared(name, data_dir)


def load_split(
    name: str,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    max_undecodable: int = 0,
) -> Split:
    """Load one split of a prepared tfds set into memory; no other split's file is opened.

    `mnist5k` is prepared on its first use. Any other set must have been prepared as array_record;
    its newest version is read. Nothing here uses the network or TensorFlow.

    Args:
        name: name of the set, `name/config` for one with configurations.
        split: name of a stored split, such as `train`.
        data_dir: where tfds keeps prepared sets; None for TFDS_DATA_DIR or tfds's default.
        image_size: pixels a side to which the central square of each image is resized (see
            `decode.decode_images`); None keeps the stored size.
        max_undecodable: so many examples that cannot be decoded are left out, with warnings.

    Returns:
        The split, in stored order (tfds stores shuffled examples).

    Raises:
        UserError: the set is not prepared, not as array_record, damaged, not of labelled images,
            has no such split, or its images differ in size and no `image_size` was given.
    """
    if image_size is not None and image_size < 1:
        raise UserError(f"config.dataset.image_size={image_size} must be at least 1, or None")
    prepared = open_set(name, data_dir)
    undecodable = Undecodable(prepared, split, max_undecodable)
    try:
        encoded, labels, rows = records.read_examples(prepared, split, undecodable.note)
    except MemoryError as error:
        raise UserError(
            f"the records of split {split!r} in {prepared.directory} do not fit into memory; a "
            "training reads them by and by with config.dataset.stream=True"
        ) from error

    def failed(position: int, error: Exception) -> None:
        undecodable.note(rows[position], records.one_line(error))

    try:
        images = decode.decode_images(encoded, prepared.image_shape, image_size, failed)
    except decode.ImageSizesDiffer as error:
        raise UserError(
            f"the images of {prepared.directory} differ in size ({error}); "
            "set config.dataset.image_size to the size they shall have"
        ) from error
    except (MemoryError, OverflowError) as error:
        raise UserError(
            f"{len(encoded)} images of {prepared.directory} do not fit into memory; lower "
            "config.dataset.image_size"
        ) from error
    except decode.NothingDecoded as error:
        raise nothing_decodes(prepared.directory, split) from error
    left = [n for row, n in zip(rows, labels, strict=True) if row not in undecodable]
    return Split(
        images=images,
        labels=np.asarray(left, np.int32),
        num_classes=len(prepared.class_names),
        class_names=prepared.class_names,
        name=name,
        undecodable=tuple(undecodable.rows),
    )


_KNOWN: dict[str, tuple[tuple[int | None, int | None, int | None], int]] = {
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "imagenet2012": ((None, None, 3), 1000),
    "mnist5k": ((28, 28, 1), 10),
}


def describe(
    name: str, data_dir: str | os.PathLike[str] | None = None, image_size: int | None = None
) -> tuple[tuple[int, int, int], int]:
    """Return the shape of a set's images, as `load_split` gives them, and its number of classes.

    Nothing but metadata is read, and for the sets of the configs not even that.

    Raises:
        UserError: the set is not prepared, or its images differ in size and no `image_size` was
            given.
    """
    if name in _KNOWN:
        shape, classes = _KNOWN[name]
    else:
        prepared = records.open_prepared(name, data_dir)
        shape, classes = prepared.image_shape, len(prepared.class_names)
    height, width = (image_size or extent for extent in shape[:2])
    if height is None or width is None:
        raise UserError(
            f"the images of {name} differ in size; set config.dataset.image_size to the size they "
            "shall have"
        )
    return (height, width, shape[2] or 3), classes


def train_validation_parts(
    split: Split, validation_fraction: float, seed: int
) -> tuple[Split, Split]:
    """Divide a split at random into a training and a validation part, stratified by class.

    Stratifying is our choice: the accuracies of the two networks are compared on few images, and
    equal class shares take one source of noise away. Each class's share of the validation part is
    exact where the fraction allows it, else within one example. Both parts are in shuffled order,
    because scoring with a batch's own statistics needs batches of mixed classes.

    Args:
        split: what to divide.
        validation_fraction: the validation part's share of the examples, in (0, 1).
        seed: non-negative; the same seed gives the same parts, also under another numpy version.

    Returns:
        The training part and the validation part: disjoint, together the whole split.

    Raises:
        UserError: the fraction leaves one of the parts empty.
    """
    size = len(split.labels)
    # As a fraction: 0.29 * 100 is 28.999999999999996.
    validation_size = round(Fraction(str(float(validation_fraction))) * size)
    if not 0 < validation_size < size:
        raise UserError(
            f"config.search.validation_fraction={validation_fraction} leaves an empty part of "
            f"{size} images; it must be above 0 and below 1, with an image in either part"
        )
    # Sorting raw bits, whose stream numpy guarantees; that of `permutation` it does not.
    order = np.argsort(np.random.PCG64(seed).random_raw(size), kind="stable")
    by_class = order[np.argsort(split.labels[order], kind="stable")]
    # Evenly spaced picks from the examples sorted by class give each class its share.
    picks = by_class[(2 * np.arange(validation_size) + 1) * size // (2 * validation_size)]
    in_validation = np.zeros(size, bool)
    in_validation[picks] = True
    chosen = in_validation[order]
    return _subset(split, order[~chosen]), _subset(split, order[chosen])


def limit_examples(split: Split, examples: int, seed: int, key: str) -> Split:
    """Return so many examples of a split, drawn by the seed with equal shares a class.

    Args:
        split: what to draw from.
        examples: how many; 0 for all.
        seed: non-negative.
        key: of the config, for the error.

    Raises:
        UserError: the split has fewer.
    """
    size = len(split.labels)
    if examples in (0, size):
        return split
    if examples > size:
        raise UserError(
            f"config.{key}={examples} is more than the {size} of {split.name}; 0 uses all"
        )
    return train_validation_parts(split, examples / size, seed)[1]


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute each channel's mean and standard deviation over all pixels of all images.

    Args:
        images: uint8[n, height, width, channels].

    Returns:
        mean and std, f32[channels] each, in units where white is 1. The standard deviation is at
        least one grey level, 1/255, so that a constant channel cannot divide by zero. The sums are
        of integers: exact, whatever the order.
    """
    starts = range(0, len(images), _STATISTICS_CHUNK)
    return statistics_of_parts(images[start : start + _STATISTICS_CHUNK] for start in starts)


def statistics_of_parts(parts: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Compute `channel_statistics` of images that come in parts, which are summed one by one.

    Args:
        parts: uint8[any, height, width, channels] each; at least one image.

    Returns:
        As `channel_statistics`.
    """
    total = squares = np.zeros((), np.int64)
    count = 0
    for images in parts:
        width, channels = images.shape[-2:]
        # Whole pixel rows are summed first: rows of one to three channels would be ten times
        # slower.
        pixels = images.reshape(-1, width * channels)
        sums = pixels.sum(axis=0, dtype=np.int64)
        squared = np.square(pixels, dtype=np.uint16).sum(axis=0, dtype=np.int64)
        total = total + sums.reshape(width, channels).sum(axis=0)
        squares = squares + squared.reshape(width, channels).sum(axis=0)
        count += images.size // channels
    mean = total / count
    variance = np.maximum(squares / count - np.square(mean), 0.0)
    std = np.maximum(np.sqrt(variance), 1.0)
    return (mean / 255).astype(np.float32), (std / 255).astype(np.float32)


def _subset(split: Split, rows: np.ndarray) -> Split:
    return dataclasses.replace(split, images=split.images[rows], labels=split.labels[rows])
