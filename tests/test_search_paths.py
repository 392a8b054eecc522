"""Three paths of a round at the same time, on four groups of two devices, against one at a time."""

import dataclasses

import jax
import numpy as np
import pytest
from draws import QUICK
from path_cases import NETWORK, OPTIMIZER, random_like, sampled_matrices, sampled_tree, shapes

from cpnas_jax.architecture.sampling import all_survivors, num_paths, stage_permutations
from cpnas_jax.data.examples import Examples
from cpnas_jax.models.operations import OperationSettings
from cpnas_jax.models.space import CHILD, OPERATIONS, PARENT
from cpnas_jax.path_optimizer import PathOptimizer
from cpnas_jax.runtime.parallel import AXIS, Program, pmap_donated, pmap_kept, replicate
from cpnas_jax.runtime.shards import Shards
from cpnas_jax.search_step import (
    Call,
    ModelState,
    StepSettings,
    make_score_call,
    make_train_call,
)

DEVICES, GROUPS = 8, 4
# A reduction cell has edges of both strides.
ONE_CELL = dataclasses.replace(NETWORK, cells=1)
IDLE = np.full((2, 14), OPERATIONS.index("none"), np.int32)
PATHS = stage_permutations(0, 8, 1, all_survivors(OPERATIONS))[:3].astype(np.int32)
EPOCH = 2
SHARDS = Shards(DEVICES, groups=GROUPS)
KEY = np.asarray(jax.random.key_data(jax.random.key(3)))


def settings(shards):
    operations = OperationSettings(separable_repeats=1, statistics=shards.statistics(True))
    return StepSettings(
        supernet=dataclasses.replace(ONE_CELL, operations=operations),
        batch_size=4,
        shards=shards,
        crop_padding=1,
        flip=True,
        steps_per_epoch=3,
    )


def call_of(architecture, number, binary, active=True):
    return Call(
        architecture=architecture,
        active=np.float32(active),
        binary=np.bool_(binary),
        epoch=np.int32(EPOCH + number),
        rate_epoch=np.int32(EPOCH),
        first_step=np.int32(1),
        num_steps=np.int32(1),
        stop=np.int32(number == 2),
        passes=np.int32(1),
        key=KEY,
    )


def stacked(binary):
    """The call of each device: three groups with a path, one without."""
    calls = []
    for device in range(DEVICES):
        group = device // SHARDS.group_size
        active = group < len(PATHS)
        architecture = PATHS[group] if active else IDLE
        calls.append(call_of(architecture, group, binary, active))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *calls)


def examples():
    generator = np.random.default_rng(5)
    return Examples(
        generator.integers(0, 256, (14, 8, 8, 3)).astype(np.uint8),
        generator.integers(0, NETWORK.num_classes, 14).astype(np.int32),
        np.asarray([0.4, 0.5, 0.6], np.float32),
        np.asarray([0.2, 0.3, 0.25], np.float32),
    )


@pytest.fixture(scope="module")
def start():
    optimizer = jax.eval_shape(PathOptimizer(OPTIMIZER).init, shapes(ONE_CELL))
    return ModelState(random_like(shapes(ONE_CELL), 0, 0.3), random_like(optimizer, 1, 0.1))


@pytest.fixture(scope="module")
def step(start):
    """(state, binary) -> state and sums of every device after a step of all paths."""
    function = pmap_donated(make_train_call(settings(SHARDS), PathOptimizer(OPTIMIZER)))
    given = replicate(examples())
    program = Program(function, (replicate(start), given, stacked(True)), QUICK)
    return lambda state, binary: jax.device_get(program(replicate(state), given, stacked(binary)))


@pytest.fixture(scope="module")
def together(start, step):
    """(binary) -> what `step` makes of the start."""
    return {binary: step(start, binary) for binary in (True, False)}


def on_two_devices(function, *arguments):
    """Compile for two devices that do the same work together, for arguments like these."""
    mapped = jax.pmap(function, AXIS, devices=jax.devices()[:2])
    program = mapped.lower(*twice(arguments)).compile(QUICK)

    def run(*arguments):
        results = jax.device_get(program(*twice(arguments)))
        return jax.tree.map(lambda leaf: leaf[0], results)

    return run


def twice(tree):
    return jax.tree.map(lambda leaf: np.stack([leaf, leaf]), tree)


@pytest.fixture(scope="module")
def alone(start):
    """(binary) -> state and loss of each path after a step of its own on two devices."""
    alone_step = make_train_call(settings(Shards(2)), PathOptimizer(OPTIMIZER))
    program = on_two_devices(alone_step, start, examples(), call_of(PATHS[0], 0, True))
    found = {}
    for binary in (True, False):
        found[binary] = [
            program(start, examples(), call_of(path, number, binary))
            for number, path in enumerate(PATHS)
        ]
    return found


@pytest.mark.parametrize("binary", [True, False], ids=[CHILD, PARENT])
def test_each_path_updates_its_operations_as_alone(start, together, alone, binary):
    state, _ = together[binary]
    owners = [sampled_tree(start.params, path) for path in PATHS]
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    before = jax.tree.leaves(start.params)
    singles = [jax.tree.leaves(own.params) for own, _ in alone[binary]]
    masks = [jax.tree.leaves(owner) for owner in owners]
    moved = 0
    for number, (path, leaf) in enumerate(leaves):
        # All devices hold the same.
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
        if "edges" not in jax.tree_util.keystr(path):
            continue
        owned = np.zeros(leaf.shape[1:], bool)
        for single, mask in zip(singles, masks, strict=True):
            use = mask[number]
            np.testing.assert_array_equal(leaf[0][use], single[number][use])
            assert not (owned & use).any()
            owned |= use
            moved += int((leaf[0][use] != before[number][use]).sum())
        np.testing.assert_array_equal(leaf[0][~owned], before[number][~owned])
    assert moved > 500


def test_what_all_paths_use_moves_by_the_mean_of_their_gradients(together, alone):
    """An update by SGD is linear in the gradient: the mean of the paths' own updates."""
    state, sums = together[False]
    for name in ("stem", "classifier"):
        mean = jax.tree.map(
            lambda *leaves: sum(leaves) / len(leaves), *(s.params[name] for s, _ in alone[False])
        )
        jax.tree.map(
            lambda found, expected: np.testing.assert_allclose(
                found[0], expected, rtol=1e-5, atol=1e-6
            ),
            state.params[name],
            mean,
        )
        assert leaf_differs(state.params[name], alone[False][0][0].params[name])
    losses = [float(own["loss"]) for _, own in alone[False]]
    np.testing.assert_allclose(sums["loss"], np.mean(losses), rtol=1e-5)
    assert (sums["bad_step"] == -1).all()
    # Whoever was asked to stop, all learn it.
    assert (sums["stop"] == 1).all()


def leaf_differs(stacked_leaves, leaves):
    pairs = zip(jax.tree.leaves(stacked_leaves), jax.tree.leaves(leaves), strict=True)
    return any(np.abs(a[0] - b).max() > 1e-4 for a, b in pairs)


def test_optimizers_keep_each_path_to_itself(start, together, alone):
    for binary, rule in ((True, CHILD), (False, PARENT)):
        found = together[binary][0].optimizer[rule]["edges"]
        for number, path in enumerate(PATHS):
            single = alone[binary][number][0].optimizer[rule]["edges"]
            matrices = sampled_matrices(start.params, path)
            for a, b, use in zip(found, single, matrices, strict=True):
                jax.tree.map(
                    lambda x, y, use=use: np.testing.assert_allclose(
                        x[0][use], y[use], rtol=1e-4, atol=1e-6
                    ),
                    a,
                    b,
                )


def test_what_one_path_alone_spoils_stops_all(start, step):
    """Its other devices must not wait for a group that has stopped."""
    first = sampled_tree(start.params, PATHS[1])
    shared = sampled_tree(start.params, IDLE)
    spoilt = jax.tree_util.tree_map_with_path(
        lambda path, leaf, own, other: (
            np.where(own & ~other, np.float32(np.nan), leaf)
            if "edges" in jax.tree_util.keystr(path)
            else leaf
        ),
        start.params,
        first,
        shared,
    )
    state, sums = step(ModelState(spoilt, start.optimizer), False)
    assert (sums["bad_step"] == 1).all()
    jax.tree.map(
        lambda found, given: np.testing.assert_array_equal(
            found, np.broadcast_to(given, found.shape)
        ),
        state.params,
        spoilt,
    )


def test_each_group_scores_its_own_path(start):
    shards, single = SHARDS, Shards(2)
    given = examples()

    def score_of(own):
        return make_score_call(settings(own).supernet, 14, 4, own)

    arguments = (replicate(start.params), replicate(given), stacked(False))
    program = Program(pmap_kept(score_of(shards)), arguments, QUICK)
    found = jax.device_get(program(*arguments))
    assert {name: rows.shape for name, rows in found.items()} == {
        "correct": (DEVICES, GROUPS),
        "log_likelihood": (DEVICES, GROUPS),
    }
    alone = on_two_devices(score_of(single), start.params, given, call_of(PATHS[0], 0, False))
    expected = [
        alone(start.params, given, call_of(path, number, False))
        for number, path in enumerate(PATHS)
    ]
    correct = [int(sums["correct"][0]) for sums in expected]
    likelihoods = [float(sums["log_likelihood"][0]) for sums in expected]
    assert len(set(correct)) > 1
    for row in found["correct"]:
        np.testing.assert_array_equal(row[: len(PATHS)], correct)
    for row in found["log_likelihood"]:
        np.testing.assert_allclose(row[: len(PATHS)], likelihoods, rtol=1e-5)


def test_groups_are_equal_and_no_more_than_operations():
    found = {devices: num_paths(devices, 8) for devices in (1, 2, 3, 4, 6, 8, 12, 16, 32, 7, 11)}
    assert found == {1: 1, 2: 2, 3: 3, 4: 4, 6: 6, 8: 8, 12: 6, 16: 8, 32: 8, 7: 7, 11: 1}
    assert num_paths(8, 4) == 4
