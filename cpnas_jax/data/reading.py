"""Reading single examples of a split, and running ahead of the consumer with grain.

grain takes almost a second to import and is therefore imported inside the function that uses it.
"""

import abc
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from cpnas_jax.data import records, views
from cpnas_jax.data.undecodable import Undecodable, nothing_decodes
from cpnas_jax.runtime.errors import UserError

# Reading waits for the disk, and Pillow's codecs and filters run without the interpreter lock. With
# one core 16 threads were as fast as 1 or 4.
_THREADS = 16
_THREADS_OF_A_WORKER = 2

# Images that one thread reads and hands on together.
_PART = 16

# Batches that are being read before they are asked for.
_BATCHES_AHEAD = 2

# A failure of the storage that passes must not change a batch.
_ATTEMPTS = 2

Failures = tuple[tuple[int, int, str], ...]
"""What could not be decoded: position in the part, number of the example, reason."""

Part = tuple[np.ndarray, np.ndarray, Failures]
"""Images uint8[m, size, size, channels], labels int32[m], and what is not as it was asked for."""


Batch = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Images, labels, and bool[n]: whether each is the example that was asked for."""


class CannotDecode(Exception):
    """An example is damaged; what it is told by is the reason."""


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """Reads, checks and decodes examples of one split; can be pickled and shared by threads.

    Attributes:
        source: serialised examples by row, of `records.open_split`.
        directory: version directory of the set, for messages.
        split: name of the split, for messages.
        image_key: name of the image feature.
        label_key: name of the class label feature.
        num_classes: labels are below.
        mode: Pillow's mode of the images.
        size: pixels a side of what is returned.
        max_undecodable: failures that `undecodable.Undecodable` lets pass.
    """

    source: Any
    directory: str
    split: str
    image_key: str
    label_key: str
    num_classes: int
    mode: str
    size: int
    max_undecodable: int

    def example(
        self, row: int, box_of: Callable[[int, int], views.Box], *, quick: bool
    ) -> tuple[np.ndarray, int]:
        """Return a part of one image, uint8[size, size, channels], and its label.

        Args:
            row: in stored order.
            box_of: see `views.read_view`.
            quick: likewise.

        Raises:
            CannotDecode: the example is damaged.
            UserError: its label is no class, or it does not fit into memory.
        """
        for attempt in range(_ATTEMPTS):
            try:
                encoded, label = records.parse_example(
                    self.source[row], self.image_key, self.label_key
                )
                pixels = views.read_view(encoded, self.mode, self.size, box_of, quick=quick)
                break
            except MemoryError as error:
                raise UserError(
                    f"example {row} of split {self.split!r} in {self.directory} does not fit into "
                    "memory; lower the batch size or the number of workers"
                ) from error
            # array_record, protobuf and Pillow each have their own ways of failing.
            except Exception as error:
                if attempt == _ATTEMPTS - 1:
                    raise CannotDecode(records.one_line(error)) from error
        if not 0 <= label < self.num_classes:
            raise records.no_class(self.directory, self.split, self.num_classes, label)
        return pixels, label

    def examples(
        self,
        rows: np.ndarray,
        boxes: Sequence[Callable[[int, int], views.Box]],
        num_examples: int,
        *,
        quick: bool,
    ) -> Part:
        """Return `example` of several rows, and of another one in place of each that is damaged.

        The other one is the next stored example, after the last the first, that can be decoded: a
        function of the data and the row alone.

        Args:
            rows: int[n].
            boxes: of each row's image, or of what takes its place.
            num_examples: so many stored examples are used, the first ones.
            quick: see `views.read_view`.

        Raises:
            UserError: as `example`; not one example can be decoded.
        """
        read, failures = [], list[tuple[int, int, str]]()
        for position, (row, box_of) in enumerate(zip(rows.tolist(), boxes, strict=True)):
            found, failed = self._next(row, box_of, num_examples, quick)
            failures += [(position, candidate, reason) for candidate, reason in failed]
            if found is None:
                # Whoever counts the failures refuses the part.
                return np.empty((0, 0, 0, 0), np.uint8), np.empty(0, np.int32), tuple(failures)
            read.append(found)
        images = np.stack([pixels for pixels, _ in read])
        return images, np.array([n for _, n in read], np.int32), tuple(failures)

    def _next(
        self, row: int, box_of: Callable[[int, int], views.Box], num_examples: int, quick: bool
    ) -> tuple[tuple[np.ndarray, int] | None, list[tuple[int, str]]]:
        """Return the first of the examples from a row on that decodes, and what failed before it.

        It is None after more failures than there may be.
        """
        failed = list[tuple[int, str]]()
        for candidate in itertools.chain(range(row, num_examples), range(row)):
            try:
                return self.example(candidate, box_of, quick=quick), failed
            except CannotDecode as error:
                failed.append((candidate, str(error)))
            if len(failed) > self.max_undecodable:
                return None, failed
        raise nothing_decodes(self.directory, self.split)


@dataclasses.dataclass(frozen=True, eq=False)
class Parts(abc.ABC):
    """The batches of one process, in parts of some images each.

    A part can be read by itself, by any thread or process.

    Attributes:
        reader: reads single examples.
        local_batch: examples of this process in a batch.
        num_examples: of the split that are used.
    """

    reader: Reader
    local_batch: int
    num_examples: int

    @abc.abstractmethod
    def __len__(self) -> int:
        """Return the number of parts of all batches."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Part:
        """Return a part."""

    @property
    def parts_per_batch(self) -> int:
        """How many parts, one after the other, are a batch."""
        return -(-self.local_batch // _PART)

    def place(self, index: int) -> tuple[int, slice]:
        """Return the batch of a part, and the part's positions in the process's share of it."""
        batch, part = divmod(index, self.parts_per_batch)
        return batch, slice(part * _PART, min((part + 1) * _PART, self.local_batch))


def read_ahead(parts: Parts, workers: int) -> Generator[Part, None, None]:
    """Give the parts in order, while later ones are read in the background.

    Args:
        parts: what to read.
        workers: processes that read, 0 for threads of this one.

    Yields:
        The parts. When the generator is closed, so are the threads and processes.

    Raises:
        UserError: raised in the background, or a worker died.
    """
    import grain

    ahead = _BATCHES_AHEAD * parts.parts_per_batch
    threads = _THREADS_OF_A_WORKER if workers else _THREADS
    dataset = grain.MapDataset.source(parts).to_iter_dataset(
        grain.ReadOptions(
            num_threads=threads,
            prefetch_buffer_size=threads if workers else max(threads, ahead),
        )
    )
    if workers:
        if not flags.FLAGS.is_parsed():
            # grain reads a flag of its own, also where no command line was parsed.
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=workers, per_worker_buffer_size=-(-ahead // workers)
            ),
            worker_init_fn=_start_worker,
        )
    iterator = iter(dataset)
    try:
        yield from iterator
    except RuntimeError as error:
        if not workers:
            raise
        raise UserError(
            f"a process that reads {parts.reader.directory} ahead died "
            f"({records.one_line(error)}); if it ran out of memory (code -9) or of shared memory "
            "in /dev/shm (code -7), lower the number of workers"
        ) from error
    finally:
        iterator.close()


def counted(parts: Iterable[Part], undecodable: Undecodable) -> Iterator[Part]:
    """Give parts on, once what could not be decoded in them is counted.

    Raises:
        UserError: it is too much.
    """
    for part in parts:
        for _, row, reason in part[2]:
            undecodable.note(row, reason)
        yield part


def joined(parts: Parts, workers: int, undecodable: Undecodable) -> Generator[Batch, None, None]:
    """Give whole batches out of their parts."""
    with contextlib.closing(read_ahead(parts, workers)) as read:
        sound = counted(read, undecodable)
        for _ in range(len(parts) // parts.parts_per_batch):
            yield _concatenated(itertools.islice(sound, parts.parts_per_batch))


def _concatenated(parts: Iterable[Part]) -> Batch:
    """Return parts as one; in a function, because a part may hold shared memory while it lives."""
    images, labels, sound = [], [], []
    for own_images, own_labels, failures in parts:
        images.append(own_images)
        labels.append(own_labels)
        sound.append(np.ones(len(own_labels), bool))
        sound[-1][[position for position, _, _ in failures]] = False
    return np.concatenate(images), np.concatenate(labels), np.concatenate(sound)


def _start_worker(_index: int, _count: int) -> None:
    """Leave Ctrl-C to the parent, end with it however it ends, and import what reading needs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    # Here, before threads read: two that first import it at once block each other for ever.
    from tensorflow_datasets.proto import tf_example_pb2  # noqa: F401
