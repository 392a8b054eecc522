"""Accuracy of a network over a whole split: every example counts exactly once.

The last batch is filled up with other examples that a mask leaves out, so that one compiled program
serves all batches, whatever the number of devices.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cpnas_jax.data.augment import normalise
from cpnas_jax.data.examples import Examples
from cpnas_jax.data.order import scoring_indices
from cpnas_jax.models.losses import cross_entropy_sum
from cpnas_jax.models.network import Network, NetworkSettings, Outputs
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.parallel import AXIS
from cpnas_jax.runtime.shards import Shards

TOP = 5


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a network does on a split.

    Attributes:
        examples: how many were counted.
        top1: share whose label is the first answer.
        top5: share whose label is among the first five; None with five classes or fewer.
        loss: mean cross-entropy.
        confusion: int[classes, classes], true class by answer.
        answers: int32[n], the first answer to each example of the split; -1 where not counted.
        labels: int32[n], likewise.
        confidences: f32[n], the softmax of the first answer; 0 where not counted.
    """

    examples: int
    top1: float
    top5: float | None
    loss: float
    confusion: np.ndarray
    answers: np.ndarray
    labels: np.ndarray
    confidences: np.ndarray

    def per_class(self) -> list[float | None]:
        """Return the share of each class that was answered right; None where it has no example."""
        totals = self.confusion.sum(axis=1)
        return [
            float(right / total) if total else None
            for right, total in zip(np.diagonal(self.confusion), totals, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it, without what is of single examples."""
        return {
            "examples": self.examples,
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "per_class": self.per_class(),
            "confusion": self.confusion.tolist(),
        }


OF_EXAMPLES = ("answers", "labels", "confidences")
"""Counts that have a place for each example."""


def _zeros(classes: int, examples: int) -> dict[str, jax.Array]:
    return {
        "top5": jnp.zeros((), jnp.int32),
        "loss": jnp.zeros((), jnp.float32),
        "confusion": jnp.zeros((classes, classes), jnp.int32),
        "answers": jnp.zeros(examples, jnp.int32),
        "labels": jnp.zeros(examples, jnp.int32),
        "confidences": jnp.zeros(examples, jnp.float32),
    }


def _counted(
    network: Network,
    variables: Any,
    sums: dict[str, jax.Array],
    batch: Examples,
    counts: jax.Array,
    places: jax.Array,
) -> dict[str, jax.Array]:
    """Add a batch's answers to the sums.

    Args:
        network: is asked.
        variables: of the network.
        sums: so far.
        batch: n examples.
        counts: f32[n], 1 for the examples that count.
        places: int32[n], of each example in what `OF_EXAMPLES` names.
    """
    images = normalise(batch.images, batch.mean, batch.std)
    labels = batch.labels
    logits = cast(Outputs, network.apply(variables, images, train=False)).logits
    answers = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    weights = counts.astype(jnp.int32)
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    # Of equal logits the first class is answered first, as by argmax.
    classes = jnp.arange(logits.shape[1], dtype=labels.dtype)[None]
    before = (logits > own) | ((logits == own) & (classes < labels[:, None]))
    better = jnp.sum(before.astype(jnp.int32), axis=1)
    confidences = jnp.max(jax.nn.softmax(logits), axis=-1)
    # An example counts once, so that the sum over batches and devices is its own value; one more
    # than the class, so that 0 is left for those that do not count.
    return {
        "top5": sums["top5"] + jnp.sum((better < TOP).astype(jnp.int32) * weights),
        "loss": sums["loss"] + cross_entropy_sum(logits, labels, counts),
        "confusion": sums["confusion"].at[labels, answers].add(weights),
        "answers": sums["answers"].at[places].add((answers + 1) * weights),
        "labels": sums["labels"].at[places].add((labels + 1) * weights),
        "confidences": sums["confidences"].at[places].add(confidences * counts),
    }


def make_evaluation_call(
    settings: NetworkSettings, num_examples: int, batch_size: int, shards: Shards
) -> Callable[[Any, Examples, jax.Array], dict[str, jax.Array]]:
    """Return the function of one device that counts answers over a split; to be pmapped.

    It takes {"params", "batch_stats"}, the split, and the passes of `Shards.combine`; it returns
    counts over all devices: `top5` int32[], `loss` f32[] (a sum), `confusion`
    int32[classes, classes], and of each example `answers` and `labels` int32[num_examples], one
    more than the class, and `confidences` f32[num_examples]; 0 where it does not count.
    """
    indices, mask = scoring_indices(num_examples, batch_size)
    rows_of = indices.reshape(-1, shards.count, batch_size // shards.count)
    mask_of = mask.reshape(rows_of.shape)
    network = Network(settings)

    def evaluation_call(
        variables: Any, examples: Examples, passes: jax.Array
    ) -> dict[str, jax.Array]:
        def batch(sums: dict[str, jax.Array], part: tuple[jax.Array, jax.Array]) -> Any:
            row, counts = part
            own = dataclasses.replace(
                examples, images=examples.images[row], labels=examples.labels[row]
            )
            return _counted(network, variables, sums, own, counts, row), None

        def of_shard(shard: jax.Array) -> tuple[None, dict[str, jax.Array]]:
            parts = jnp.asarray(rows_of)[:, shard], jnp.asarray(mask_of)[:, shard]
            sums, _ = lax.scan(batch, _zeros(settings.num_classes, num_examples), parts)
            return None, sums

        _, sums = shards.combine(of_shard, passes)
        return sums

    return evaluation_call


def make_batch_evaluation_call(
    settings: NetworkSettings, shards: Shards
) -> Callable[[Any, Examples, jax.Array, jax.Array], dict[str, jax.Array]]:
    """Return the function of one device that counts its answers on a batch; to be pmapped.

    It takes {"params", "batch_stats"}, the device's part of the batch, a mask f32[n], and the
    passes of `Shards.combine`; it returns the counts of `make_evaluation_call`, of this batch.
    """
    network = Network(settings)

    def batch_call(
        variables: Any, batch: Examples, counts: jax.Array, passes: jax.Array
    ) -> dict[str, jax.Array]:
        size = batch.labels.shape[0]
        first = lax.axis_index(AXIS).astype(jnp.int32) * size
        places = first + jnp.arange(size, dtype=jnp.int32)

        def of_shard(shard: jax.Array) -> tuple[None, dict[str, jax.Array]]:
            images, labels, own_counts, own_places = shards.local_rows(
                (batch.images, batch.labels, counts, places), shard
            )
            own = dataclasses.replace(batch, images=images, labels=labels)
            zeros = _zeros(settings.num_classes, size * shards.num_devices)
            return None, _counted(network, variables, zeros, own, own_counts, own_places)

        _, sums = shards.combine(of_shard, passes)
        return sums

    return batch_call


def evaluation(counts: dict[str, np.ndarray]) -> Evaluation:
    """Turn the counts of a call into shares of the examples that it counted.

    Raises:
        UserError: the network's answers are not finite.
    """
    if not np.isfinite(counts["loss"]):
        raise UserError(
            "the network's answers are not finite numbers; its checkpoints are kept. Try a smaller "
            "learning rate in a new workdir"
        )
    confusion = np.asarray(counts["confusion"])
    num_examples = int(confusion.sum())
    classes = len(confusion)
    return Evaluation(
        examples=num_examples,
        top1=float(np.trace(confusion) / num_examples),
        top5=float(counts["top5"] / num_examples) if classes > TOP else None,
        loss=float(counts["loss"] / num_examples),
        confusion=confusion,
        answers=counts["answers"] - 1,
        labels=counts["labels"] - 1,
        confidences=counts["confidences"],
    )


def table(found: Evaluation, class_names: tuple[str, ...], most: int = 20) -> str:
    """Return accuracy by class as text; with many classes only the worst."""
    lines = [f"{found.examples} examples: top-1 {found.top1:.4f}"]
    if found.top5 is not None:
        lines[0] += f", top-5 {found.top5:.4f}"
    lines[0] += f", loss {found.loss:.4f}"
    scored = [
        (share, name, int(row.argmax()), int(row.max()), int(row.sum()))
        for share, name, row in zip(
            found.per_class(), class_names, _without_right(found.confusion), strict=True
        )
        if share is not None
    ]
    scored.sort(key=lambda entry: entry[0])
    if len(scored) > most:
        lines.append(f"The {most} worst of {len(scored)} classes:")
    width = max((len(name) for _, name, *_ in scored), default=0)
    for share, name, wrong, times, mistakes in scored[:most]:
        line = f"  {name:<{width}}  {share:.4f}"
        if mistakes:
            line += f"  most often taken for {class_names[wrong]} ({times})"
        lines.append(line)
    return "\n".join(lines)


def _without_right(confusion: np.ndarray) -> np.ndarray:
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    return wrong
