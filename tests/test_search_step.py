"""Training steps, scoring and the optimizer of a path, against plain loops and numpy."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cpnas_jax import path_optimizer
from cpnas_jax.data.augment import normalise, random_crop_flip
from cpnas_jax.data.order import step_key
from cpnas_jax.models import supernet
from cpnas_jax.models.edges import EDGE_GROUPS
from cpnas_jax.models.operations import OperationSettings
from cpnas_jax.models.space import CELL_TYPES, NUM_EDGES, OPERATIONS
from cpnas_jax.models.supernet import SupernetSettings
from cpnas_jax.path_optimizer import CHILD, PARENT, OptimizerSettings, PathOptimizer
from cpnas_jax.runtime.parallel import pmap_donated, pmap_kept, replicate, to_host
from cpnas_jax.search_step import (
    Call,
    Examples,
    ModelState,
    StepSettings,
    make_score_call,
    make_train_call,
)

DEVICES = 8
CLASSES = 5
BATCH = 16
TRAINING = 50  # three steps an epoch, two examples left over
QUICK = {"xla_backend_optimization_level": "0"}  # numbers are tested here, not speed
NETWORK = SupernetSettings(2, 4, (0,), CLASSES, OperationSettings(separable_repeats=1))
OPTIMIZER = OptimizerSettings(
    learning_rate=0.1,
    child_learning_rate=0.02,
    child_optimizer="adam",
    momentum=0.9,
    weight_decay=0.01,
    gradient_clip=5.0,
    total_steps=12,
)
KEY = np.asarray(jax.random.key_data(jax.random.key(3)))


@functools.cache
def shapes():
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda key: supernet.init(key, NETWORK, (8, 8, 3)), key)


def random_like(tree, seed, scale=1.0):
    """Normal floats, positive counts and positive second moments."""
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        if np.issubdtype(leaf.dtype, np.integer):
            return generator.integers(1, 5, leaf.shape).astype(leaf.dtype)
        values = generator.normal(size=leaf.shape).astype(leaf.dtype) * np.float32(scale)
        return np.abs(values) if "nu" in jax.tree_util.keystr(path) else values

    return jax.tree_util.tree_map_with_path(draw, tree)


def random_architecture(seed):
    """Of 28 edges, each operation on at least three."""
    operations = np.arange(2 * NUM_EDGES) % len(OPERATIONS)
    shuffled = np.random.default_rng(seed).permutation(operations)
    return shuffled.reshape(2, NUM_EDGES).astype(np.int32)


def random_examples(n, seed):
    generator = np.random.default_rng(seed)
    return Examples(
        generator.integers(0, 256, (n, 8, 8, 3)).astype(np.uint8),
        generator.integers(0, CLASSES, n).astype(np.int32),
        np.asarray([0.4, 0.5, 0.6], np.float32),
        np.asarray([0.2, 0.3, 0.25], np.float32),
    )


def call_of(architecture, binary=False, epoch=0, first_step=0, num_steps=1, key=KEY):
    return Call(
        np.asarray(architecture, np.int32),
        np.asarray(binary),
        np.asarray(epoch, np.int32),
        np.asarray(first_step, np.int32),
        np.asarray(num_steps, np.int32),
        key,
    )


def sampled_tree(params, architecture):
    """A boolean for every weight: whether its operation was sampled; True for what is shared."""
    tree = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params)
    for cell in tree["cells"]:
        kind = "reduce" if len(cell["edges"]) == 2 else "normal"
        for name, operations in cell["edges"].items():
            edges = EDGE_GROUPS[kind][name].edges
            for operation, leaves in operations.items():
                for leaf in jax.tree.leaves(leaves):
                    for row, edge in enumerate(edges):
                        chosen = architecture[CELL_TYPES.index(kind), edge]
                        leaf[row] = OPERATIONS[chosen] == operation
    return tree


def sampled_matrices(params, architecture):
    """The same in the layout of the optimizer's state of the edges."""
    tree = sampled_tree(params, architecture)
    _, groups = path_optimizer._split(jax.tree.map(lambda leaf: leaf.astype(np.float32), tree))
    return [np.asarray(group.values, bool) for group in groups]


class NumpyOptimizer:
    """Clip, weight decay, momentum or Adam, and the cosine, leaf by leaf in float64."""

    def __init__(self, params):
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
            if binary:
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


@functools.cache
def compiled_update():
    optimizer = PathOptimizer(OPTIMIZER)

    def update(gradients, state, params, architecture, binary, step):
        return optimizer.update(
            gradients, state, params, architecture=architecture, binary=binary, step=step
        )

    arguments = (shapes(), jax.eval_shape(optimizer.init, shapes()), shapes())
    scalars = (call_of(random_architecture(0)).architecture, np.asarray(True), np.int32(0))
    return jax.jit(update).lower(*arguments, *scalars).compile(QUICK)


@pytest.mark.parametrize("binary", [True, False], ids=[CHILD, PARENT])
@pytest.mark.parametrize("scale", [1e-3, 1.0], ids=["below the clip", "clipped"])
def test_updates_are_those_written_out_in_numpy(binary, scale):
    params = random_like(shapes(), 0)
    state = jax.tree.map(np.asarray, jax.jit(PathOptimizer(OPTIMIZER).init)(params))
    oracle = NumpyOptimizer(params)
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
        params, state = compiled_update()(
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


STEP = StepSettings(
    supernet=NETWORK,
    batch_size=BATCH,
    num_devices=DEVICES,
    crop_padding=1,
    flip=True,
    steps_per_epoch=TRAINING // BATCH,
    total_steps=OPTIMIZER.total_steps,
)


@pytest.fixture(scope="module")
def start():
    """A state in the middle of training: no moment and no count is zero."""
    params = random_like(shapes(), 0, 0.3)
    optimizer = jax.eval_shape(PathOptimizer(OPTIMIZER).init, shapes())
    return ModelState(params, random_like(optimizer, 1, 0.1))


@pytest.fixture(scope="module")
def train(start):
    """The training program on eight devices: (state, call) -> state and sums of the host."""
    examples = replicate(random_examples(TRAINING, 7))
    function = pmap_donated(make_train_call(STEP, PathOptimizer(OPTIMIZER)))
    call = replicate(call_of(random_architecture(0)))
    program = function.lower(replicate(start), examples, call).compile(QUICK)

    def run(state, call, keep_devices=False):
        replicated = replicate(state)
        new, sums = program(replicated, examples, replicate(call))
        if keep_devices:
            return replicated, new, sums
        return to_host(new), to_host(sums)

    return run


def leaves_differ(a, b):
    return [
        not np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]


@pytest.mark.parametrize("binary", [True, False], ids=[CHILD, PARENT])
def test_what_was_not_sampled_is_bitwise_untouched(train, start, binary):
    architecture = random_architecture(11)
    new, _ = train(start, call_of(architecture, binary))
    sampled = sampled_tree(start.params, architecture)
    counts = {True: 0, False: 0}
    triples = zip(*map(jax.tree.leaves, (new.params, start.params, sampled)), strict=True)
    for after, before, use in triples:
        np.testing.assert_array_equal(after[~use], before[~use])
        if use.any():
            # Decay and momentum move even a weight whose gradient is 0.
            assert (after[use] != before[use]).mean() > 0.9
        counts[True] += use.sum()
        counts[False] += (~use).sum()
    assert min(counts.values()) > 500
    rule, other = (CHILD, PARENT) if binary else (PARENT, CHILD)
    assert not any(leaves_differ(new.optimizer[other], start.optimizer[other]))
    matrices = sampled_matrices(start.params, architecture)
    edges = zip(new.optimizer[rule]["edges"], start.optimizer[rule]["edges"], strict=True)
    for (after, before), use in zip(edges, matrices, strict=True):
        pairs = list(zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True))
        assert len(pairs) == (3 if binary else 1)  # count and two moments, or momentum
        for a, b in pairs:
            np.testing.assert_array_equal(a[~use], b[~use])
            if a.dtype == np.int32:
                np.testing.assert_array_equal(a[use], b[use] + 1)
            else:
                assert (a[use] != b[use]).mean() > 0.9


@functools.cache
def plain_gradient():
    """Loss, hits and gradient of one device's images; what the step must average."""

    def loss_of(params, images, labels, architecture):
        logits = supernet.apply(params, images, architecture, settings=NETWORK, binary=False)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
        return -jnp.mean(picked), jnp.argmax(logits, axis=1) == labels

    per_device = BATCH // DEVICES
    return (
        jax.jit(jax.value_and_grad(loss_of, has_aux=True))
        .lower(
            shapes(),
            np.zeros((per_device, 8, 8, 3), np.float32),
            np.zeros(per_device, np.int32),
            random_architecture(0),
        )
        .compile(QUICK)
    )


def step_by_hand(state, architecture, epoch, step):
    """One device after the other, then the mean: what eight of them must do together."""
    examples, key = random_examples(TRAINING, 7), jax.random.wrap_key_data(KEY)
    folded = jax.random.fold_in(jax.random.fold_in(key, 0), epoch)
    order = np.asarray(jax.random.permutation(folded, TRAINING))
    losses, hits, gradients = [], 0, []
    per_device = BATCH // DEVICES
    for device in range(DEVICES):
        first = step * BATCH + device * per_device
        rows = order[first : first + per_device]
        images = random_crop_flip(
            step_key(key, epoch, step, device), jnp.asarray(examples.images[rows]), 1, True
        )
        (loss, hit), gradient = plain_gradient()(
            state.params,
            normalise(images, examples.mean, examples.std),
            examples.labels[rows],
            architecture,
        )
        losses.append(float(loss))
        hits += int(np.sum(hit))
        gradients.append(gradient)
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *gradients)
    params, optimizer = compiled_update()(
        mean,
        state.optimizer,
        state.params,
        architecture,
        np.asarray(False),
        np.int32(epoch * STEP.steps_per_epoch + step),
    )
    return ModelState(params, optimizer), np.mean(losses), hits


def test_eight_devices_step_as_a_loop_over_them(train, start):
    architecture = random_architecture(4)
    new, sums = train(start, call_of(architecture, epoch=2, first_step=1, num_steps=2))
    state, losses, hits = start, 0.0, 0
    for step in (1, 2):
        state, loss, hit = step_by_hand(state, architecture, 2, step)
        losses += loss
        hits += hit
    np.testing.assert_allclose(sums["loss"], losses, rtol=1e-4)
    assert sums["correct"] == hits
    for leaf, expected in zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-3, atol=1e-4)


def test_several_steps_of_a_call_are_single_steps_bitwise(train, start):
    architecture = random_architecture(5)
    for binary in (True, False):
        at_once, _ = train(start, call_of(architecture, binary, epoch=1, num_steps=3))
        one_by_one = start
        for step in range(3):
            one_by_one, _ = train(one_by_one, call_of(architecture, binary, 1, step))
        assert not any(leaves_differ(at_once, one_by_one))


def test_the_batch_is_a_function_of_seed_epoch_and_step(train, start):
    architecture = random_architecture(6)

    def loss(**changes):
        return float(train(start, call_of(architecture, **changes))[1]["loss"])

    other_key = np.asarray(jax.random.key_data(jax.random.key(4)))
    variants = [
        {"epoch": epoch, "first_step": step, "key": key}
        for epoch in (0, 1)
        for step in (0, 1)
        for key in (KEY, other_key)
    ]
    losses = [loss(**variant) for variant in variants]
    assert len(set(losses)) == len(variants)
    assert [loss(**variant) for variant in variants[::-1]] == losses[::-1]


def test_the_old_state_is_donated_and_all_devices_agree(train, start):
    old, new, _ = train(start, call_of(random_architecture(8), num_steps=2), keep_devices=True)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    for leaf in jax.tree.leaves(new):
        copies = np.asarray(leaf)
        assert copies.shape[0] == DEVICES
        np.testing.assert_array_equal(copies, np.broadcast_to(copies[:1], copies.shape))


SCORED = 37  # two whole batches of 16 and five examples


@pytest.fixture(scope="module")
def score():
    """(labels) -> hits of the parent with one architecture over SCORED examples, on 8 devices."""
    examples = random_examples(SCORED, 9)
    params, architecture = random_like(shapes(), 3, 0.3), random_architecture(2)
    function = pmap_kept(make_score_call(NETWORK, SCORED, BATCH, DEVICES))
    operands = [replicate(params), replicate(examples), replicate(call_of(architecture))]
    program = function.lower(*operands).compile(QUICK)

    def run(labels):
        labelled = dataclasses.replace(examples, labels=labels.astype(np.int32))
        return np.asarray(program(operands[0], replicate(labelled), operands[2]))

    return run


@pytest.fixture(scope="module")
def answers():
    """The network's answer for every example, each device's batch for itself."""
    examples = random_examples(SCORED, 9)
    params, architecture = random_like(shapes(), 3, 0.3), random_architecture(2)
    per_device = BATCH // DEVICES

    def logits_of(params, architecture, images):
        return supernet.apply(params, images, architecture, settings=NETWORK, binary=False)

    shape = jax.ShapeDtypeStruct((per_device, 8, 8, 3), np.float32)
    program = jax.jit(logits_of).lower(params, architecture, shape).compile(QUICK)
    given = np.full(SCORED, -1)
    for first in range(0, 48, per_device):
        positions = np.arange(first, first + per_device)
        # Filled up with examples from the start, which do not count a second time.
        images = normalise(
            jnp.asarray(examples.images[positions % SCORED]), examples.mean, examples.std
        )
        for position, row in zip(
            positions, np.asarray(program(params, architecture, images)), strict=True
        ):
            if position < SCORED:
                given[position] = row.argmax()
    assert len(set(given)) > 1
    return given


def test_scoring_counts_every_example_once(score, answers):
    assert (score(answers) == SCORED).all()
    assert (score((answers + 1) % CLASSES) == 0).all()
    for example in (0, 3, 15, 16, 35, 36):
        wrong = (answers + 1) % CLASSES
        wrong[example] = answers[example]
        assert (score(wrong) == 1).all(), example


def test_scoring_is_a_count_of_right_answers(score, answers):
    labels = random_examples(SCORED, 9).labels
    assert (score(labels) == (answers == labels).sum()).all()
