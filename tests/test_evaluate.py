"""Counting answers: ties, answers that are not finite."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from scipy import special

from cpnas_jax import evaluate
from cpnas_jax.data.examples import Examples
from cpnas_jax.runtime.errors import UserError


def counted(logits, labels, counts=None, places=None):
    """The evaluation of a network that answers with these logits."""
    counts = np.ones(len(labels)) if counts is None else counts
    places = np.arange(len(labels)) if places is None else places
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
        evaluate._zeros(logits.shape[1], len(labels)),
        examples,
        np.asarray(counts, np.float32),
        np.asarray(places, np.int32),
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


def test_each_example_has_its_answer_at_its_place():
    """The last example is filling: it stands for the first, which has counted already."""
    generator = np.random.default_rng(1)
    logits, labels = generator.normal(size=(6, 4)), generator.integers(0, 4, 6)
    places = np.array([3, 0, 4, 1, 2, 3])
    found = counted(logits, labels, [1, 1, 1, 1, 0, 0], places)
    softmax = special.softmax(logits.astype(np.float32), axis=1)
    for row, place in enumerate(places[:4]):
        assert found.answers[place] == logits[row].argmax()
        assert found.labels[place] == labels[row]
        assert found.confidences[place] == pytest.approx(softmax[row].max(), rel=1e-5)
    for place in (2, 5):
        assert (found.answers[place], found.labels[place]) == (-1, -1)
        assert found.confidences[place] == 0
    assert found.examples == 4


def test_answers_that_are_not_finite():
    logits = np.zeros((3, 10))
    logits[1] = np.nan
    with pytest.raises(UserError, match="answers are not finite"):
        counted(logits, [0, 1, 2])
