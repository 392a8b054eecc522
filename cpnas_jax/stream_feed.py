"""Batches of a stream for final training, whose images no memory would hold."""

import contextlib
import dataclasses
import math
from collections.abc import Generator, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from cpnas_jax import evaluate
from cpnas_jax.data.examples import Examples
from cpnas_jax.data.stream import Stream, placed_ahead
from cpnas_jax.feed import CALL, Compiled, Facts, Feed, passes_of
from cpnas_jax.models.network import NetworkSettings
from cpnas_jax.runtime import processes, stall
from cpnas_jax.runtime.parallel import pmap_kept, replicate, to_host
from cpnas_jax.runtime.shards import Shards
from cpnas_jax.steps import Run
from cpnas_jax.train_step import (
    FAILED,
    BatchStep,
    StepSettings,
    TrainCall,
    TrainState,
    make_stream_call,
)

Batches = Generator[tuple[tuple[Any, ...], Exception | None], None, None]
"""Arrays of a batch, divided among the local devices; and what came instead of it, see `_lasting`.
"""

DEPTH = 2
"""Batches that are on the devices before they are asked for."""

_NONE = np.full((), -1, np.int32)
"""No step is bad."""


def _lasting(batches: Generator[tuple[Any, ...], None, None], blank: tuple[Any, ...]) -> Batches:
    """Give batches with None, and blank ones with the error after one that cannot be read.

    The other processes are on their way to the same step, and cannot be told before it. A process
    without others raises the error at once.
    """
    with contextlib.closing(batches):
        try:
            for batch in batches:
                yield batch, None
        except Exception as error:
            if not processes.several():
                raise
            failed = error
        else:
            return
    while True:
        yield blank, failed


class StreamFeed(Feed):
    """Batches that are read, decoded and cropped on the host while the devices work."""

    def __init__(
        self, train: Stream, test: Stream, config: config_dict.ConfigDict, shards: Shards
    ) -> None:
        self._streams, self._config, self._shards = (train, test), config, shards
        self.facts = Facts(
            train.name,
            train.image_shape,
            train.num_examples,
            test.num_examples,
            train.class_names,
        )
        self._statistics: tuple[jax.Array, jax.Array]
        # Gives the batches from step `_next` = (epoch, step) on.
        self._batches: Batches | None = None
        self._next = (0, 0)

    def device_bytes(self) -> int:
        """Return the size of the batches that wait on a device, beside the one in use."""
        pixels = math.prod(self.facts.image_shape)
        return (DEPTH + 1) * pixels * self._config.train.batch_size // jax.device_count()

    def place(self) -> None:
        """Estimate the channels' statistics; images follow batch by batch."""
        with stall.waiting("the channels' statistics"):
            mean, std = processes.together(self._streams[0].channel_statistics)
        self._statistics = replicate(mean), replicate(std)

    def training_call(self, settings: StepSettings, step: BatchStep, run: Run) -> Any:
        """Return the function of one step."""
        return make_stream_call(settings, step, run)

    def like(self, batch_size: int) -> tuple[Any, ...]:
        """Return a batch, a call and that no step is bad."""
        return self._blank(batch_size), replicate(CALL), replicate(_NONE)

    def _blank(self, batch_size: int) -> Examples:
        """Return what a batch looks like, to compile for it."""
        shape = (jax.local_device_count(), batch_size // jax.device_count())
        images = np.zeros((*shape, *self.facts.image_shape), np.uint8)
        return Examples(images, np.zeros(shape, np.int32), *self._statistics)

    def _training_batches(self, epoch: int, step: int) -> Batches:
        if self._batches is None or self._next != (epoch, step):
            self.close()
            dataset = self._config.dataset
            found = self._streams[0].training_batches(
                seed=self._config.seed,
                epoch=epoch,
                first_step=step,
                batch_size=self._config.train.batch_size,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                epochs=self._config.train.epochs - epoch,
                area=(dataset.crop_area, 1.0),
                workers=dataset.workers,
            )
            blank = self._blank(self._config.train.batch_size)
            self._batches = _lasting(placed_ahead(found, DEPTH), (blank.images, blank.labels))
        return self._batches

    def undecodable(self) -> dict[str, list[int]]:
        """Return split -> examples that were met and skipped so far, in any process."""
        found: dict[str, set[int]] = {}
        for stream in self._streams:
            found.setdefault(stream.split, set()).update(stream.undecodable.shared_rows())
        return {name: sorted(rows) for name, rows in found.items()}

    def met_before(self, undecodable: dict[str, list[int]]) -> None:
        """Count examples that were skipped before a resumption."""
        for stream in self._streams:
            stream.undecodable.take_in(undecodable.get(stream.split, ()))

    def close(self) -> None:
        """End what reads ahead."""
        if self._batches is not None:
            self._batches.close()
        self._batches = None

    def train(
        self, program: Any, state: TrainState, call: TrainCall
    ) -> tuple[TrainState, dict[str, Any]]:
        """Run the steps of a call, each on a batch of its own."""
        epoch, first, count = (int(n) for n in (call.epoch, call.first_step, call.num_steps))
        batches = self._training_batches(epoch, first)
        found = []
        # From step to step on the devices: looking at it here would hold up what follows.
        bad = replicate(_NONE)
        for step in range(first, first + count):
            with stall.waiting(f"the batch of step {step + 1} from the reader"):
                (images, labels), failed = next(batches)
            number = dataclasses.replace(
                call,
                first_step=np.asarray(step, np.int32),
                stop=np.asarray(FAILED, np.int32) if failed else call.stop,
            )
            batch = Examples(images, labels, *self._statistics)
            state, metrics = program(state, batch, replicate(number), bad)
            bad = metrics["bad_step"]
            found.append(metrics)
            if jax.default_backend() == "cpu":
                # Queued collectives of several CPU devices can wait for each other for ever.
                jax.block_until_ready(metrics)
        whole_epoch = first + count == self.facts.num_train // self._config.train.batch_size
        self._next = (epoch + 1, 0) if whole_epoch else (epoch, first + count)
        hosts = [to_host(metrics) for metrics in found]
        if any(host["stop"] == FAILED for host in hosts):
            processes.share_error(failed)
        sums = {name: sum(float(host[name]) for host in hosts) for name in hosts[0]}
        bad = [int(host["bad_step"]) for host in hosts if host["bad_step"] >= 0]
        return state, {**sums, "bad_step": min(bad, default=-1)}

    def counting_program(
        self, compiled: Compiled, settings: NetworkSettings, batch_size: int, variables: Any
    ) -> Any:
        """Return the compiled program of one batch."""
        blank = self._blank(batch_size)
        return compiled(
            ("evaluate", settings),
            lambda: pmap_kept(evaluate.make_batch_evaluation_call(settings, self._shards)),
            variables,
            blank,
            np.zeros(blank.labels.shape, np.float32),
            passes_of(self._shards),
        )

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the estimate that `place` made."""
        mean, std = (to_host(own) for own in self._statistics)
        return mean, std

    def test_batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Return the test split as it is read."""
        for images, labels, mask in self._evaluation_batches(batch_size, 0, 1):
            yield images[mask > 0], labels[mask > 0]

    def _evaluation_batches(
        self, batch_size: int, process_index: int, process_count: int
    ) -> Generator[tuple[Any, ...], None, None]:
        return self._streams[1].evaluation_batches(
            batch_size=batch_size,
            process_index=process_index,
            process_count=process_count,
            central=self._config.dataset.central_crop,
            workers=self._config.dataset.workers,
        )

    def count(self, program: Any, batch_size: int, variables: Any) -> dict[str, np.ndarray]:
        """Count the answers over the test split, batch by batch."""
        num = self.facts.num_test
        num_batches = -(-num // batch_size)
        blank = self._blank(batch_size)
        batches = self._evaluation_batches(batch_size, jax.process_index(), jax.process_count())
        counts: list[dict[str, np.ndarray]] = []
        passes = passes_of(self._shards)
        failed: Exception | None = None
        nothing = (blank.images, blank.labels, np.zeros(blank.labels.shape, np.float32))
        with contextlib.closing(_lasting(placed_ahead(batches, DEPTH), nothing)) as read:
            for number in range(num_batches):
                with stall.waiting(f"batch {number + 1} of {num_batches} to evaluate"):
                    (images, labels, mask), failed = next(read)
                examples = Examples(images, labels, *self._statistics)
                counts.append(to_host(program(variables, examples, mask, passes)))
        processes.share_error(failed)
        found = {}
        for name in counts[0]:
            parts = [batch[name] for batch in counts]
            one_each = name in evaluate.OF_EXAMPLES
            found[name] = np.concatenate(parts)[:num] if one_each else sum(parts[1:], parts[0])
        return found

    def test_images(self, rows: np.ndarray) -> np.ndarray:
        """Read and decode some test examples again."""
        central = self._config.dataset.central_crop
        return processes.from_first(lambda: self._streams[1].central_views(rows, central))
