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
    """

    examples: int
    top1: float
    top5: float | None
    loss: float
    confusion: np.ndarray

    def per_class(self) -> list[float | None]:
        """Return the share of each class that was answered right; None where it has no example."""
        totals = self.confusion.sum(axis=1)
        return [
            float(right / total) if total else None
            for right, total in zip(np.diagonal(self.confusion), totals, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return {
            "examples": self.examples,
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "per_class": self.per_class(),
            "confusion": self.confusion.tolist(),
        }


def _zeros(classes: int) -> dict[str, jax.Array]:
    return {
        "top5": jnp.zeros((), jnp.int32),
        "loss": jnp.zeros((), jnp.float32),
        "confusion": jnp.zeros((classes, classes), jnp.int32),
    }


def _counted(
    network: Network,
    variables: Any,
    sums: dict[str, jax.Array],
    batch: Examples,
    counts: jax.Array,
) -> dict[str, jax.Array]:
    """Add a batch's answers to the sums: counts f32[n], 1 for the examples that count."""
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
    return {
        "top5": sums["top5"] + jnp.sum((better < TOP).astype(jnp.int32) * weights),
        "loss": sums["loss"] + cross_entropy_sum(logits, labels, counts),
        "confusion": sums["confusion"].at[labels, answers].add(weights),
    }


def make_evaluation_call(
    settings: NetworkSettings, num_examples: int, batch_size: int, shards: Shards
) -> Callable[[Any, Examples, jax.Array], dict[str, jax.Array]]:
    """Return the function of one device that counts answers over a split; to be pmapped.

    It takes {"params", "batch_stats"}, the split, and the passes of `Shards.combine`; it returns
    counts over all devices: `top5` int32[], `loss` f32[] (a sum), `confusion`
    int32[classes, classes].
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
            return _counted(network, variables, sums, own, counts), None

        def of_shard(shard: jax.Array) -> tuple[None, dict[str, jax.Array]]:
            parts = jnp.asarray(rows_of)[:, shard], jnp.asarray(mask_of)[:, shard]
            sums, _ = lax.scan(batch, _zeros(settings.num_classes), parts)
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
        def of_shard(shard: jax.Array) -> tuple[None, dict[str, jax.Array]]:
            images, labels, own_counts = shards.local_rows(
                (batch.images, batch.labels, counts), shard
            )
            own = dataclasses.replace(batch, images=images, labels=labels)
            zeros = _zeros(settings.num_classes)
            return None, _counted(network, variables, zeros, own, own_counts)

        _, sums = shards.combine(of_shard, passes)
        return sums

    return batch_call


def evaluation(counts: dict[str, np.ndarray], num_examples: int) -> Evaluation:
    """Turn the counts of a call into shares.

    Raises:
        UserError: the network's answers are not finite.
    """
    if not np.isfinite(counts["loss"]):
        raise UserError(
            "the network's answers are not finite numbers; its checkpoints are kept. Try a smaller "
            "learning rate in a new workdir"
        )
    confusion = np.asarray(counts["confusion"])
    classes = len(confusion)
    return Evaluation(
        examples=num_examples,
        top1=float(np.trace(confusion) / num_examples),
        top5=float(counts["top5"] / num_examples) if classes > TOP else None,
        loss=float(counts["loss"] / num_examples),
        confusion=confusion,
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
