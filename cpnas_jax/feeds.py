"""Where final training takes its images from: data that lives on the devices, or a stream.

A feed gives one device's functions to compile, their arguments, and runs them; what is trained is
not its business. Order and augmentation are functions of (seed, epoch, step) in both, so that a
feed has no state that a checkpoint would have to hold.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from cpnas_jax import evaluate
from cpnas_jax.data.datasets import Split, channel_statistics, limit_examples, load_split
from cpnas_jax.data.examples import Examples
from cpnas_jax.data.stream import open_stream
from cpnas_jax.data.undecodable import refuse_other
from cpnas_jax.feed import CALL, Compiled, Facts, Feed, passes_of
from cpnas_jax.models.network import NetworkSettings
from cpnas_jax.runtime import processes, stall
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.parallel import (
    pmap_kept,
    replicate,
    to_host,
)
from cpnas_jax.runtime.shards import Shards
from cpnas_jax.steps import Run
from cpnas_jax.stream_feed import StreamFeed
from cpnas_jax.train_step import (
    BatchStep,
    StepSettings,
    TrainCall,
    TrainState,
    make_resident_call,
)


def open_feed(config: config_dict.ConfigDict) -> Feed:
    """Return the feed of a config: the splits `train` and `evaluate.split` of its data set.

    Raises:
        UserError: see the errors of the data; a stream without `dataset.image_size`.
    """
    # The first process may have to prepare what the others read.
    with stall.waiting("the data to be opened"):
        return processes.first_before_others(lambda: _opened(config))


def _opened(config: config_dict.ConfigDict) -> Feed:
    dataset, split = config.dataset, config.evaluate.split
    shards = Shards(jax.device_count(), config.runtime.deterministic)
    if dataset.stream:
        if not dataset.image_size:
            raise UserError(
                "config.dataset.image_size is 0; with config.dataset.stream it must be the side "
                "of the network's images, such as 224"
            )
        options = (dataset.data_dir or None, dataset.image_size, dataset.max_undecodable)
        streams = [
            open_stream(dataset.name, name, *options).limited(config[part].examples, key)
            for name, part, key in (
                ("train", "train", "train.examples"),
                (split, "evaluate", "evaluate.examples"),
            )
        ]
        return StreamFeed(streams[0], streams[1], config, shards)
    options = (dataset.data_dir or None, dataset.image_size or None, dataset.max_undecodable)
    train, test = (load_split(dataset.name, name, *options) for name in ("train", split))
    return ResidentFeed(
        limit_examples(train, config.train.examples, config.seed, "train.examples"),
        limit_examples(test, config.evaluate.examples, config.seed, "evaluate.examples"),
        split,
        shards,
    )


class ResidentFeed(Feed):
    """Both splits as uint8 in the memory of every device; many steps run in one call."""

    def __init__(self, train: Split, test: Split, test_name: str, shards: Shards) -> None:
        height, width, channels = train.images.shape[1:]
        if test.images.shape[1:] != train.images.shape[1:]:
            sizes = ["x".join(map(str, split.images.shape[1:])) for split in (train, test)]
            raise UserError(
                f"the training images of {train.name} are of {sizes[0]}, those to evaluate of "
                f"{sizes[1]}; set config.dataset.image_size"
            )
        self.facts = Facts(
            train.name,
            (height, width, channels),
            len(train.labels),
            len(test.labels),
            train.class_names,
        )
        self._splits, self._names = (train, test), ("train", test_name)
        self._shards = shards
        self._train: Examples
        self._test: Examples

    def device_bytes(self) -> int:
        """Return the size of both splits."""
        return sum(split.images.nbytes + split.labels.nbytes for split in self._splits)

    def place(self) -> None:
        """Put both splits on every device."""
        processes.require_agreement("reading the data", undecodable=self.undecodable())
        mean, std = channel_statistics(self._splits[0].images)
        self._train, self._test = (
            replicate(Examples(split.images, split.labels, mean, std)) for split in self._splits
        )

    def training_call(self, settings: StepSettings, step: BatchStep, run: Run) -> Any:
        """Return the function of any number of steps."""
        return make_resident_call(settings, step, run)

    def like(self, batch_size: int) -> tuple[Any, ...]:
        """Return the training examples and a call."""
        del batch_size
        return self._train, replicate(CALL)

    def train(
        self, program: Any, state: TrainState, call: TrainCall
    ) -> tuple[TrainState, dict[str, Any]]:
        """Run the steps of a call in one go."""
        state, found = program(state, self._train, replicate(call))
        return state, to_host(found)

    def counting_program(
        self, compiled: Compiled, settings: NetworkSettings, batch_size: int, variables: Any
    ) -> Any:
        """Return the compiled program of the whole test split."""
        return compiled(
            ("evaluate", settings),
            lambda: pmap_kept(
                evaluate.make_evaluation_call(
                    settings, self.facts.num_test, batch_size, self._shards
                )
            ),
            variables,
            self._test,
            passes_of(self._shards),
        )

    def count(self, program: Any, batch_size: int, variables: Any) -> dict[str, np.ndarray]:
        """Count the answers over the test split in one go."""
        del batch_size
        return to_host(program(variables, self._test, passes_of(self._shards)))

    def test_images(self, rows: np.ndarray) -> np.ndarray:
        """Return some test examples."""
        return self._splits[1].images[rows]

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Return those of the training split."""
        return channel_statistics(self._splits[0].images)

    def test_batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Return the test split in pieces."""
        images, labels = self._splits[1].images, self._splits[1].labels
        for first in range(0, len(labels), batch_size):
            rows = slice(first, first + batch_size)
            yield images[rows], labels[rows]

    def undecodable(self) -> dict[str, list[int]]:
        """Return split -> examples that were left out when it was loaded."""
        pairs = zip(self._names, self._splits, strict=True)
        return {name: list(split.undecodable) for name, split in pairs}

    def met_before(self, undecodable: dict[str, list[int]]) -> None:
        """Compare with what was left out here; see `undecodable.refuse_other`."""
        for name, rows in self.undecodable().items():
            refuse_other(name, undecodable.get(name, ()), rows)

    def close(self) -> None:
        """Nothing reads ahead here."""
