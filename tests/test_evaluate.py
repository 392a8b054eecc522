"""Counting answers: ties, answers that are not finite."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from cpnas_jax import evaluate
from cpnas_jax.data.examples import Examples
from cpnas_jax.runtime.errors import UserError


def counted(logits, labels):
    """The evaluation of a network that answers with these logits."""
    logits, labels = np.asarray(logits, np.float32), np.asarray(labels, np.int32)
    examples = Examples(
        np.zeros((len(labels), 1, 1, 1), np.uint8),
        labels,
        np.zeros(1, np.float32),
        np.ones(1, np.float32),
    )
    network = SimpleNamespace(
        apply=lambda *_, **__: SimpleNamespace(logits=jax.numpy.asarray(logits))
    )
    sums = evaluate._counted(
        network,
        {},
        evaluate._zeros(logits.shape[1]),
        examples,
        np.ones(len(labels), np.float32),
    )
    return evaluate.evaluation(jax.device_get(sums))


def test_ties_are_broken_by_the_order_of_the_classes():
    """A network that answers the same to everything: its first answers are classes 0 to 4."""
    found = counted(np.zeros((10, 10)), np.arange(10))
    assert found.top1 == 0.1
    assert found.top5 == 0.5


def test_answers_against_a_stable_sort():
    generator = np.random.default_rng(0)
    logits, labels = generator.integers(0, 4, (200, 12)), generator.integers(0, 12, 200)
    order = np.argsort(-logits, axis=1, kind="stable")
    found = counted(logits, labels)
    assert found.top1 == pytest.approx((order[:, 0] == labels).mean())
    assert found.top5 == pytest.approx((order[:, :5] == labels[:, None]).any(axis=1).mean())


def test_answers_that_are_not_finite():
    logits = np.zeros((3, 10))
    logits[1] = np.nan
    with pytest.raises(UserError, match="answers are not finite"):
        counted(logits, [0, 1, 2])
