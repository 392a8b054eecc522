"""The optimizer of a path against numpy."""

import dataclasses
import math

import jax
import numpy as np
import optax
import pytest
from draws import random_architecture
from path_cases import OPTIMIZER, compiled_update, random_like, sampled_tree, shapes

from cpnas_jax.models.space import CHILD, PARENT
from cpnas_jax.path_optimizer import PathOptimizer


class NumpyOptimizer:
    """Clip, weight decay, momentum or Adam, and the cosine, leaf by leaf in float64."""

    def __init__(self, params, child_optimizer):
        self.child_optimizer = child_optimizer
        self.params = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params)]
        zeros = [np.zeros_like(leaf) for leaf in self.params]
        names = ("momentum", "first", "second", "count")
        self.slots = {name: [zero.copy() for zero in zeros] for name in names}

    def update(self, gradients, sampled, binary, step):
        gradients = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradients)]
        norm = math.sqrt(sum((leaf**2).sum() for leaf in gradients))
        factor = min(1.0, OPTIMIZER.gradient_clip / norm)
        cosine = 0.5 * (1 + math.cos(math.pi * step / OPTIMIZER.total_steps))
        base = OPTIMIZER.child_learning_rate if binary else OPTIMIZER.learning_rate
        for i, (gradient, use) in enumerate(zip(gradients, jax.tree.leaves(sampled), strict=True)):
            slot = {name: values[i] for name, values in self.slots.items()}
            g = (gradient * factor)[use]
            if binary and self.child_optimizer == "adam":
                slot["count"][use] += 1
                slot["first"][use] = 0.9 * slot["first"][use] + 0.1 * g
                slot["second"][use] = 0.999 * slot["second"][use] + 0.001 * g**2
                first = slot["first"][use] / (1 - 0.9 ** slot["count"][use])
                second = slot["second"][use] / (1 - 0.999 ** slot["count"][use])
                change = first / (np.sqrt(second) + 1e-8)
            else:
                g = g + OPTIMIZER.weight_decay * self.params[i][use]
                slot["momentum"][use] = OPTIMIZER.momentum * slot["momentum"][use] + g
                change = slot["momentum"][use]
            self.params[i][use] -= base * cosine * change


@pytest.mark.parametrize("binary", [True, False], ids=[CHILD, PARENT])
@pytest.mark.parametrize("scale", [1e-3, 1.0], ids=["below the clip", "clipped"])
@pytest.mark.parametrize("child_optimizer", ["adam", "sgd"])
def test_updates_are_those_written_out_in_numpy(binary, scale, child_optimizer):
    settings = dataclasses.replace(OPTIMIZER, child_optimizer=child_optimizer)
    params = random_like(shapes(), 0)
    state = jax.tree.map(np.asarray, jax.jit(PathOptimizer(settings).init)(params))
    oracle = NumpyOptimizer(params, child_optimizer)
    for step in range(4):
        architecture = random_architecture(step)
        sampled = sampled_tree(params, architecture)
        # As the supernet gives them: zeros where an operation was not sampled.
        gradients = jax.tree.map(
            lambda g, s: g * s.astype(np.float32),
            random_like(shapes(), 100 + step, scale),
            sampled,
        )
        norm = float(optax.tree.norm(gradients))
        assert (norm > OPTIMIZER.gradient_clip) == (scale == 1.0)
        # Far steps of the cosine too.
        position = np.int32(3 * step)
        params, state = compiled_update(settings)(
            gradients, state, params, architecture, np.asarray(binary), position
        )
        oracle.update(gradients, sampled, binary, 3 * step)
    for leaf, expected in zip(jax.tree.leaves(params), oracle.params, strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=2e-5, atol=2e-6)


def test_the_rate_ends_at_zero():
    params = random_like(shapes(), 0)
    state = random_like(jax.eval_shape(PathOptimizer(OPTIMIZER).init, shapes()), 1)
    after, _ = compiled_update()(
        random_like(shapes(), 2),
        state,
        params,
        random_architecture(0),
        np.asarray(False),
        np.int32(OPTIMIZER.total_steps),
    )
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(new, old)
