"""Reading single examples of a split, and running ahead of the consumer with grain.

grain takes almost a second to import and is therefore imported inside the function that uses it.
"""

import abc
import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
from absl import flags

from cpnas_jax.data import records, views
from cpnas_jax.runtime.errors import UserError

# Reading waits for the disk, and Pillow's codecs and filters run without the interpreter lock. With
# one core 16 threads were as fast as 1 or 4.
_THREADS = 16
_THREADS_OF_A_WORKER = 2

# Images that one thread reads and hands on together.
_PART = 16

# Batches that are being read before they are asked for.
_BATCHES_AHEAD = 2


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
    """

    source: Any
    directory: str
    split: str
    image_key: str
    label_key: str
    num_classes: int
    mode: str
    size: int

    def example(
        self, row: int, box_of: Callable[[int, int], views.Box], *, quick: bool
    ) -> tuple[np.ndarray, int]:
        """Return a part of one image, uint8[size, size, channels], and its label.

        Args:
            row: in stored order.
            box_of: see `views.read_view`.
            quick: likewise.

        Raises:
            UserError: the example is damaged or its label is no class.
        """
        try:
            encoded, label = records.parse_example(self.source[row], self.image_key, self.label_key)
            pixels = views.read_view(encoded, self.mode, self.size, box_of, quick=quick)
        except MemoryError as error:
            raise UserError(
                f"example {row} of split {self.split!r} in {self.directory} does not fit into "
                "memory; lower the batch size or the number of workers"
            ) from error
        # array_record, protobuf and Pillow each have their own ways of failing on a broken file.
        except Exception as error:
            reason = f"example {row} of split {self.split!r}: {records.one_line(error)}"
            raise records.damaged(self.directory, reason) from error
        if not 0 <= label < self.num_classes:
            raise records.no_class(self.directory, self.split, self.num_classes, label)
        return pixels, label

    def examples(
        self, rows: np.ndarray, boxes: list[Callable[[int, int], views.Box]], *, quick: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return `example` of several rows: uint8[n, size, size, channels] and int32[n]."""
        read = [
            self.example(row, box_of, quick=quick)
            for row, box_of in zip(rows.tolist(), boxes, strict=True)
        ]
        return np.stack([pixels for pixels, _ in read]), np.array([n for _, n in read], np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Parts(abc.ABC):
    """The batches of one process, in parts of some images each.

    A part can be read by itself, by any thread or process.

    Attributes:
        reader: reads single examples.
        local_batch: examples of this process in a batch.
    """

    reader: Reader
    local_batch: int

    @abc.abstractmethod
    def __len__(self) -> int:
        """Return the number of parts of all batches."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return images uint8[m, size, size, channels] and labels int32[m] of a part."""

    @property
    def parts_per_batch(self) -> int:
        """How many parts, one after the other, are a batch."""
        return -(-self.local_batch // _PART)

    def place(self, index: int) -> tuple[int, slice]:
        """Return the batch of a part, and the part's positions in the process's share of it."""
        batch, part = divmod(index, self.parts_per_batch)
        return batch, slice(part * _PART, min((part + 1) * _PART, self.local_batch))


def read_ahead(parts: Parts, workers: int) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
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
