"""Image classification sets that are streamed from their files instead of held in memory.

The order of examples and every random crop are pure functions of (seed, epoch, step, position in
the global batch): there is no iterator state to save, a resumed run goes on with exactly the
batches it would have seen, and each process reads only its own rows of every batch. Reading and
decoding run ahead in threads or worker processes of grain.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Generator

import jax
import numpy as np
from flax import jax_utils

from cpnas_jax.data import datasets, decode, records, views
from cpnas_jax.data.order import scoring_indices
from cpnas_jax.data.reading import Batch, Part, Parts, Reader, counted, joined, read_ahead
from cpnas_jax.data.undecodable import Undecodable
from cpnas_jax.runtime.errors import UserError

# The uses of one seed are told apart by the first word of the spawn key.
_ORDER, _CROP = range(2)


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """One split of a prepared set, to be read batch by batch.

    Attributes:
        name: name of the data set.
        split: name of the split.
        num_examples: examples of the split that are used.
        num_classes: number of classes of the data set.
        class_names: their names, in the order of the labels.
        image_shape: (size, size, channels) of the images it gives.
        reader: reads single examples.
        undecodable: counts those that are damaged.
    """

    name: str
    split: str
    num_examples: int
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    reader: Reader
    undecodable: Undecodable

    def limited(self, examples: int, key: str) -> "Stream":
        """Return the stream of the first so many stored examples, which are shuffled; 0: of all.

        Args:
            examples: how many.
            key: of the config, for the error.

        Raises:
            UserError: there are fewer.
        """
        if examples > self.num_examples:
            raise UserError(
                f"config.{key} is {examples}; split {self.split!r} of {self.name} has only "
                f"{self.num_examples}; 0 uses all"
            )
        return dataclasses.replace(self, num_examples=examples) if examples else self

    def training_batches(
        self,
        *,
        seed: int,
        epoch: int,
        first_step: int,
        batch_size: int,
        process_index: int,
        process_count: int,
        epochs: int = 1,
        area: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        workers: int = 0,
    ) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
        """Give the training batches of one process, in the order of their steps.

        An epoch has `num_examples // batch_size` steps; the examples left over are other ones in
        every epoch. The processes' batches of a step, one after the other, are the batch that a
        single process would have got. The place of an example that cannot be decoded is filled as
        `Reader.examples` says.

        Args:
            seed: non-negative.
            epoch: the first epoch.
            first_step: step within that epoch to start at.
            batch_size: global, a multiple of `process_count`.
            process_index: of this process.
            process_count: how many share the batches.
            epochs: how many epochs to go through; worker processes stay for all of them.
            area: smallest and largest share of an image's area that is cut out at random.
            ratio: smallest and largest width / height of what is cut out.
            workers: processes that read ahead; 0 for threads of this one, which the interpreter
                lock holds back where there are many cores. A worker imports this package, which
                takes seconds, and the script that starts workers needs a main guard.

        Yields:
            images uint8[n, size, size, channels] and labels int32[n], n = batch_size /
            process_count.

        Raises:
            ValueError: the numbers do not fit each other.
            UserError: a damaged or unlabelled example, or a worker that died.
        """
        local = _local_batch(batch_size, process_index, process_count)
        steps = self.num_examples // batch_size
        if not steps or not 0 <= first_step <= steps:
            raise ValueError(f"first_step {first_step} of {steps} steps an epoch")
        source = _TrainingParts(
            reader=self.reader,
            local_batch=local,
            num_examples=self.num_examples,
            seed=seed,
            first_step=epoch * steps + first_step,
            num_steps=epochs * steps - first_step,
            steps_per_epoch=steps,
            batch_size=batch_size,
            first_position=process_index * local,
            area=area,
            ratio=ratio,
        )
        return _without_sound(joined(source, workers, self.undecodable))

    def evaluation_batches(
        self,
        *,
        batch_size: int,
        process_index: int,
        process_count: int,
        central: float = 0.875,
        workers: int = 0,
    ) -> Generator[tuple[np.ndarray, np.ndarray, np.ndarray], None, None]:
        """Give one process's share of batches in which every example counts exactly once.

        The last batch is filled with other examples, with mask 0 (see `order.scoring_indices`), as
        is the place of an example that cannot be decoded.

        Args:
            batch_size: global, a multiple of `process_count`.
            process_index: of this process.
            process_count: how many share the batches.
            central: share of the central square's side that is resized to `image_shape`.
            workers: as in `training_batches`.

        Yields:
            images uint8[n, size, size, channels], labels int32[n] and mask f32[n], n = batch_size /
            process_count.

        Raises:
            ValueError: the numbers do not fit each other.
            UserError: a damaged or unlabelled example, or a worker that died.
        """
        local = _local_batch(batch_size, process_index, process_count)
        indices, mask = scoring_indices(self.num_examples, batch_size)
        own = slice(process_index * local, (process_index + 1) * local)
        source = _CentralParts(self.reader, local, self.num_examples, indices[:, own], central)
        return _with_mask(joined(source, workers, self.undecodable), mask[:, own])

    def central_views(self, rows: np.ndarray, central: float = 0.875) -> np.ndarray:
        """Give some examples as `evaluation_batches` does.

        Args:
            rows: int[n], positions in the split, n at least 1.
            central: as in `evaluation_batches`.

        Returns:
            uint8[n, size, size, channels].

        Raises:
            UserError: a damaged or unlabelled example.
        """
        source = _CentralParts(self.reader, len(rows), self.num_examples, rows[None], central)
        parts = counted(read_ahead(source, 0), self.undecodable)
        return np.concatenate([images for images, _, _ in parts])

    def channel_statistics(self, examples: int = 2048) -> tuple[np.ndarray, np.ndarray]:
        """Estimate each channel's mean and standard deviation from evenly spaced examples.

        Stored examples are shuffled, so evenly spaced ones are a sample. They are the same ones in
        every process, and the sums are exact, so the result is too.

        Args:
            examples: at most so many are read.

        Returns:
            mean and std, f32[channels] each, as `datasets.channel_statistics`.

        Raises:
            UserError: a damaged or unlabelled example.
        """
        count = min(examples, self.num_examples)
        rows = np.arange(count) * self.num_examples // count
        source = _CentralParts(self.reader, count, self.num_examples, rows[None], 1.0)
        parts = counted(read_ahead(source, 0), self.undecodable)
        return datasets.statistics_of_parts(images for images, _, _ in parts)


def open_stream(
    name: str,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    max_undecodable: int = 0,
) -> Stream:
    """Open one split of a prepared set for streaming; only its metadata and one record are read.

    Args:
        name: name of the set, `name/config` for one with configurations.
        split: name of a stored split, such as `train`.
        data_dir: where tfds keeps prepared sets; None for TFDS_DATA_DIR or tfds's default.
        image_size: pixels a side of the images to give; None for the stored size where all images
            are squares of one size.
        max_undecodable: so many examples that cannot be decoded are skipped, with warnings.

    Returns:
        The stream.

    Raises:
        UserError: as `datasets.load_split`, as far as the metadata and the first record tell.
    """
    prepared = datasets.open_set(name, data_dir)
    height, width, channels = prepared.image_shape
    size = image_size
    if size is None:
        if height is None or height != width:
            raise UserError(
                f"config.dataset.image_size=None: the images of {prepared.directory} are not all "
                "squares of one size; set it to the size they shall have"
            )
        size = height
    if size < 1:
        raise UserError(f"config.dataset.image_size={size} must be at least 1, or None")
    channels = channels if channels in decode.MODES else 3
    reader = Reader(
        source=records.open_split(prepared, split),
        directory=os.fspath(prepared.directory),
        split=split,
        image_key=prepared.image_key,
        label_key=prepared.label_key,
        num_classes=len(prepared.class_names),
        mode=decode.MODES[channels],
        size=size,
        max_undecodable=max_undecodable,
    )
    undecodable = Undecodable(prepared, split, max_undecodable)
    # An unlabelled split, such as ImageNet's test, shows in any of its records.
    first = _CentralParts(reader, 1, len(reader.source), np.zeros((1, 1), np.int32), 1.0)
    next(counted([first[0]], undecodable))
    return Stream(
        name=name,
        split=split,
        num_examples=len(reader.source),
        num_classes=reader.num_classes,
        class_names=prepared.class_names,
        image_shape=(size, size, channels),
        reader=reader,
        undecodable=undecodable,
    )


def placed_ahead(
    batches: Generator[tuple[np.ndarray, ...], None, None], depth: int = 2
) -> Generator[tuple[jax.Array, ...], None, None]:
    """Place batches on the local devices before they are asked for.

    Args:
        batches: arrays with one row an example, a multiple of the local devices; closed with this
            generator.
        depth: batches to be placed at any time.

    Yields:
        The arrays as pmap takes them, [local devices, rows a device, ...], one part on each device.
    """
    devices = jax.local_device_count()

    def split() -> Generator[tuple[np.ndarray, ...], None, None]:
        for batch in batches:
            yield tuple(array.reshape(devices, -1, *array.shape[1:]) for array in batch)

    with contextlib.closing(batches):
        yield from jax_utils.prefetch_to_device(split(), depth)


@dataclasses.dataclass(frozen=True, eq=False)
class _TrainingParts(Parts):
    """Random crops of shuffled examples.

    Attributes:
        seed: of order and crops.
        first_step: counted from the start of epoch 0.
        num_steps: how many.
        steps_per_epoch: of every epoch.
        batch_size: global.
        first_position: of this process in the global batch.
        area: see `Stream.training_batches`.
        ratio: likewise.
    """

    seed: int
    first_step: int
    num_steps: int
    steps_per_epoch: int
    batch_size: int
    first_position: int
    area: tuple[float, float]
    ratio: tuple[float, float]

    def __len__(self) -> int:
        return self.num_steps * self.parts_per_batch

    def __getitem__(self, index: int) -> Part:
        batch, own = self.place(index)
        epoch, step = divmod(self.first_step + batch, self.steps_per_epoch)
        first = step * self.batch_size + self.first_position
        places = range(first + own.start, first + own.stop)
        boxes = [_random_box(self.seed, epoch, place, self.area, self.ratio) for place in places]
        order = _epoch_order(self.seed, epoch, self.num_examples)
        rows = order[places.start : places.stop]
        return self.reader.examples(rows, boxes, self.num_examples, quick=True)


@dataclasses.dataclass(frozen=True, eq=False)
class _CentralParts(Parts):
    """Central parts of given examples.

    Attributes:
        rows: int[batches, local_batch].
        fraction: see `views.central_box`.
    """

    rows: np.ndarray
    fraction: float

    def __len__(self) -> int:
        return len(self.rows) * self.parts_per_batch

    def __getitem__(self, index: int) -> Part:
        batch, own = self.place(index)
        rows = self.rows[batch, own]
        box_of = functools.partial(views.central_box, fraction=self.fraction)
        boxes = [box_of] * len(rows)
        return self.reader.examples(rows, boxes, self.num_examples, quick=False)


def _raw_bits(seed: int, key: tuple[int, ...], count: int) -> np.ndarray:
    """Return uint64[count] from a stream that numpy guarantees, unlike those of its Generator."""
    return np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)


def _random_box(
    seed: int, epoch: int, place: int, area: tuple[float, float], ratio: tuple[float, float]
) -> Callable[[int, int], views.Box]:
    """Return the random crop of the example at a place of an epoch's order."""
    raw = _raw_bits(seed, (_CROP, epoch, place), 4 * views.TRIES)
    # The usual 53 bits of a float in [0, 1).
    draws = (raw >> np.uint64(11)).reshape(-1, 4) * 2.0**-53
    return functools.partial(views.random_crop_box, area=area, ratio=ratio, draws=draws)


# Of the threads at the end of one epoch and the start of the next.
@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """Return the order of the examples in an epoch, int[num_examples]."""
    return np.argsort(_raw_bits(seed, (_ORDER, epoch), num_examples), kind="stable")


def _local_batch(batch_size: int, process_index: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count or not 0 <= process_index < process_count:
        raise ValueError(
            f"batch_size {batch_size} for process {process_index} of {process_count} processes"
        )
    return batch_size // process_count


def _without_sound(
    batches: Generator[Batch, None, None],
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
    with contextlib.closing(batches):
        for images, labels, _ in batches:
            yield images, labels


def _with_mask(
    batches: Generator[Batch, None, None], mask: np.ndarray
) -> Generator[tuple[np.ndarray, np.ndarray, np.ndarray], None, None]:
    with contextlib.closing(batches):
        for (images, labels, sound), counts in zip(batches, mask, strict=True):
            yield images, labels, counts * sound.astype(np.float32)
