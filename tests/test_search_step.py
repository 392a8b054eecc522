"""Training steps, scoring and the optimizer of a path, against plain loops and numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import QUICK, random_architecture
from path_cases import (
    CLASSES,
    NETWORK,
    OPTIMIZER,
    compiled_update,
    random_like,
    sampled_matrices,
    sampled_tree,
    shapes,
)

from cpnas_jax.data.augment import CROP_DRAWS, normalise, random_crop_flip
from cpnas_jax.data.examples import Examples
from cpnas_jax.data.order import step_key
from cpnas_jax.models import supernet
from cpnas_jax.models.draws import position_draws
from cpnas_jax.models.space import CHILD, PARENT
from cpnas_jax.path_optimizer import PathOptimizer
from cpnas_jax.runtime.parallel import pmap_donated, pmap_kept, replicate, to_host
from cpnas_jax.runtime.shards import Shards
from cpnas_jax.search_step import (
    Call,
    ModelState,
    StepSettings,
    make_score_call,
    make_train_call,
)

DEVICES = 8
BATCH = 16
TRAINING = 50  # three steps an epoch, two examples left over
KEY = np.asarray(jax.random.key_data(jax.random.key(3)))


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
        architecture=np.asarray(architecture, np.int32),
        active=np.asarray(1, np.float32),
        binary=np.asarray(binary),
        epoch=np.asarray(epoch, np.int32),
        rate_epoch=np.asarray(epoch, np.int32),
        first_step=np.asarray(first_step, np.int32),
        num_steps=np.asarray(num_steps, np.int32),
        stop=np.asarray(0, np.int32),
        passes=np.asarray(1, np.int32),
        key=key,
    )


STEP = StepSettings(
    supernet=NETWORK,
    batch_size=BATCH,
    shards=Shards(DEVICES),
    crop_padding=1,
    flip=True,
    steps_per_epoch=TRAINING // BATCH,
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
        positions = jnp.arange(device * per_device, (device + 1) * per_device, dtype=jnp.int32)
        draws = position_draws(step_key(key, epoch, step), positions, CROP_DRAWS)
        images = random_crop_flip(draws, jnp.asarray(examples.images[rows]), 1, True)
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
    """(labels) -> scores of the parent with one architecture over SCORED examples, on 8 devices."""
    examples = random_examples(SCORED, 9)
    params, architecture = random_like(shapes(), 3, 0.3), random_architecture(2)
    function = pmap_kept(make_score_call(NETWORK, SCORED, BATCH, Shards(DEVICES)))
    operands = [replicate(params), replicate(examples), replicate(call_of(architecture))]
    program = function.lower(*operands).compile(QUICK)

    def run(labels):
        labelled = dataclasses.replace(examples, labels=labels.astype(np.int32))
        return jax.device_get(program(operands[0], replicate(labelled), operands[2]))

    return run


@pytest.fixture(scope="module")
def logits():
    """The network's logits for every example, each device's batch for itself."""
    examples = random_examples(SCORED, 9)
    params, architecture = random_like(shapes(), 3, 0.3), random_architecture(2)
    per_device = BATCH // DEVICES

    def logits_of(params, architecture, images):
        return supernet.apply(params, images, architecture, settings=NETWORK, binary=False)

    shape = jax.ShapeDtypeStruct((per_device, 8, 8, 3), np.float32)
    program = jax.jit(logits_of).lower(params, architecture, shape).compile(QUICK)
    given = np.full((SCORED, CLASSES), np.nan)
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
                given[position] = row
    assert len(set(given.argmax(axis=1))) > 1
    return given


def test_scoring_counts_every_example_once(score, logits):
    answers = logits.argmax(axis=1)
    assert (score(answers)["correct"] == SCORED).all()
    assert (score((answers + 1) % CLASSES)["correct"] == 0).all()
    for example in (0, 3, 15, 16, 35, 36):
        wrong = (answers + 1) % CLASSES
        wrong[example] = answers[example]
        assert (score(wrong)["correct"] == 1).all(), example


def test_scores_are_right_answers_and_the_logarithm_of_their_probability(score, logits):
    labels = random_examples(SCORED, 9).labels
    found = score(labels)
    assert (found["correct"] == (logits.argmax(axis=1) == labels).sum()).all()
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = np.log(probabilities[np.arange(SCORED), labels]).sum()
    np.testing.assert_allclose(found["log_likelihood"], expected, rtol=1e-5)
