"""Discrete networks: structure, scans, drop path, running averages."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import QUICK
from published import settings_of

from cpnas_jax.models import network
from cpnas_jax.models.blocks import Levers, OperationSettings
from cpnas_jax.models.network import (
    DropPath,
    Network,
    NetworkSettings,
    cell_places,
    stretches,
)

# Cheap to compile: pools, identities and one convolution.
PLAIN = (
    *((0, 2, "max_pool_3x3"), (1, 2, "skip_connect")),
    *((0, 3, "avg_pool_3x3"), (2, 3, "skip_connect")),
    *((0, 4, "max_pool_3x3"), (3, 4, "skip_connect")),
    *((0, 5, "dil_conv_3x3"), (4, 5, "skip_connect")),
)
SMALL = NetworkSettings(PLAIN, PLAIN, 3, 4, 5)
# With fewer edges, where it has to be deep: the least with cells that are scanned. Convolutions
# are before the edges.
CHAIN = (
    *((0, 2, "max_pool_3x3"), (1, 3, "skip_connect")),
    *((2, 4, "skip_connect"), (4, 5, "avg_pool_3x3")),
)
DEEP = NetworkSettings(CHAIN, CHAIN, 10, 4, 5)


def shapes_of(settings, image_shape=(8, 8, 3)):
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda key: network.init(key, settings, image_shape), key)


@functools.cache
def variables_of(settings, image_shape=(8, 8, 3)):
    """Random weights, by numpy; running averages as they begin."""
    generator = np.random.default_rng(3)
    shapes = shapes_of(settings, image_shape)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(generator.normal(size=leaf.shape) * 0.5, leaf.dtype),
        shapes["params"],
    )
    stats = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full(leaf.shape, float(path[-1].key == "var"), leaf.dtype),
        shapes["batch_stats"],
    )
    return {"params": params, "batch_stats": stats}


def images_of(n=4, size=8, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, size, size, 3)), jnp.float32)


@functools.cache
def trained(settings, drop_path):
    def run(variables, images, rate, key):
        return Network(settings).apply(
            variables,
            images,
            train=True,
            drop_path=DropPath(rate, jnp.arange(len(images))) if drop_path else None,
            rngs={"drop_path": key},
            mutable=["batch_stats"],
        )

    return jax.jit(run, compiler_options=QUICK)


@functools.cache
def applied(settings):
    def run(variables, images):
        return Network(settings).apply(variables, images, train=False)

    return jax.jit(run, compiler_options=QUICK)


def test_reductions_channels_and_stretches():
    settings = settings_of("DARTS_V2", cells=20, channels=36)
    places = cell_places(settings)
    assert [i for i, place in enumerate(places) if place.kind == "reduce"] == [6, 13]
    assert [place.channels for place in places] == [36] * 6 + [72] * 7 + [144] * 7
    assert [i for i, place in enumerate(places) if place.reduce_first_input] == [7, 14]
    # The cell with the auxiliary classifier ends its stretch.
    assert settings.auxiliary_cell() == 13
    covered = [(s.first, s.length) for s in stretches(settings)]
    assert covered == [(0, 1), (1, 1), (2, 4), (6, 1), (7, 1), (8, 5), (13, 1), (14, 1), (15, 5)]


@pytest.mark.parametrize("binary", [True, False])
def test_scanned_cells_are_the_cells_one_after_the_other(monkeypatch, binary):
    """The same weights, unstacked, in a network without scans."""
    settings = dataclasses.replace(DEEP, binary=binary, auxiliary=False)
    scanned = [s for s in stretches(settings) if s.length > 1]
    assert scanned
    variables = variables_of(settings)
    flat = {kind: {name: value for name, value in tree.items()} for kind, tree in variables.items()}
    for stretch in scanned:
        for tree in flat.values():
            stacked = tree.pop(f"cells{stretch.first}")
            for i in range(stretch.length):
                tree[f"cells{stretch.first + i}"] = jax.tree.map(lambda x, i=i: x[i], stacked)
    images = images_of()
    expected = applied(settings)(variables, images).logits
    single = tuple(network.Stretch(place, i, 1) for i, place in enumerate(cell_places(settings)))
    monkeypatch.setattr(network, "stretches", lambda _: single)
    # Not `applied`, which remembers the network of these settings.
    run = jax.jit(functools.partial(Network(settings).apply, train=False), compiler_options=QUICK)
    found = run(flat, images).logits
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_last_map_is_the_feature_and_the_auxiliary_head_is_for_training():
    images, key = images_of(), jax.random.key(0)
    outputs, changed = trained(SMALL, False)(variables_of(SMALL), images, 0.0, key)
    assert outputs.auxiliary.shape == outputs.logits.shape == (4, 5)
    assert outputs.features.shape == (4, 2, 2, 4 * 16)
    assert applied(SMALL)(variables_of(SMALL), images).auxiliary is None
    pooled = jnp.mean(outputs.features, axis=(1, 2))
    classifier = variables_of(SMALL)["params"]["classifier"]
    logits = pooled @ classifier["kernel"] + classifier["bias"][None]
    np.testing.assert_allclose(outputs.logits, logits, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_equal_shapes(changed["batch_stats"], shapes_of(SMALL)["batch_stats"])


def test_running_averages_move_by_a_tenth_and_are_what_evaluation_uses():
    images, key = images_of(), jax.random.key(0)
    variables = variables_of(SMALL)
    _, changed = trained(SMALL, False)(variables, images, 0.0, key)
    stem = changed["batch_stats"]["stem"]["conv0_norm"]["affine"]
    kernel = variables["params"]["stem"]["conv0"]["kernel"]
    y = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(stem["mean"], 0.1 * y.mean((0, 1, 2)), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(stem["var"], 0.9 + 0.1 * y.var((0, 1, 2)), rtol=1e-3)
    # One image alone gives what it gives among others: no statistics of the batch.
    whole = applied(SMALL)(variables, images).logits
    again = applied(SMALL)(variables, jnp.concatenate([images[:1]] * 4)).logits
    np.testing.assert_allclose(again, jnp.broadcast_to(whole[:1], (4, 5)), rtol=1e-4, atol=1e-4)


def test_drop_path_leaves_out_images_and_never_an_identity():
    settings = dataclasses.replace(SMALL, cells=1, auxiliary=False, reduce=PLAIN)
    images, key = images_of(64), jax.random.key(1)
    run = trained(settings, True)
    kept, _ = run(variables_of(settings), images, 0.0, key)
    plain, _ = trained(settings, False)(variables_of(settings), images, 0.0, key)
    np.testing.assert_allclose(kept.logits, plain.logits, rtol=1e-4, atol=1e-4)
    x, rate = jnp.ones((4000, 2, 2, 3)), jnp.float32(0.3)
    dropped = np.asarray(network._dropped(x, rate, jax.random.uniform(key, (4000,))))
    values = np.unique(dropped)
    np.testing.assert_allclose(values, [0, 1 / 0.7], rtol=1e-6)
    # A whole image or nothing of it; the mean is kept.
    assert {len(np.unique(image)) for image in dropped} == {1}
    assert dropped.mean() == pytest.approx(1, abs=0.05)


IDENTITIES = tuple((0, target, "skip_connect") for target in range(2, 6))


def cell_of(kind, edges):
    """(images, rate) -> output of a cell, whose edges are dropped at the rate unless it is None."""
    cell = network.Cell(edges, network.CellPlace(kind, 4, False), False, OperationSettings())
    x = images_of(32)
    params = cell.init({"params": jax.random.key(0)}, (x, x), None)

    def run(rate, positions=range(32)):
        drop_path = None if rate is None else DropPath(rate, jnp.asarray(positions))
        (_, out), _ = cell.apply(params, (x, x), drop_path, rngs={"drop_path": jax.random.key(1)})
        return np.asarray(out)

    return run


def test_what_is_dropped_goes_with_the_position():
    """The images are normalised together in any order."""
    run = cell_of("normal", tuple((0, target, "max_pool_3x3") for target in range(2, 6)))

    def dropped(positions):
        return np.all(run(jnp.float32(0.5), positions) == 0, axis=(1, 2))

    first, last = dropped(range(32)), dropped(range(31, -1, -1))
    assert 0 < first.sum() < first.size
    np.testing.assert_array_equal(last, first[::-1])
    assert (dropped(range(32, 64)) != first).any()


def test_identities_are_not_dropped():
    run = cell_of("normal", IDENTITIES)
    np.testing.assert_array_equal(run(jnp.float32(0.9)), run(None))


def test_every_other_edge_is_dropped_on_its_own():
    """A factorized reduce, both pools, and an identity of the first."""
    edges = (
        *((0, 2, "skip_connect"), (0, 3, "max_pool_3x3")),
        *((1, 4, "avg_pool_3x3"), (2, 5, "skip_connect")),
    )
    run = cell_of("reduce", edges)
    plain, dropped = (np.split(run(rate), 4, axis=-1) for rate in (None, jnp.float32(0.5)))
    masks = set()
    for node, whole in zip(dropped, plain, strict=True):
        kept = np.any(node != 0, axis=(1, 2, 3))
        assert 0 < kept.sum() < 32
        np.testing.assert_allclose(node[kept], 2 * whole[kept], rtol=1e-5)
        masks.add(tuple(kept))
    np.testing.assert_array_equal(dropped[3], dropped[0])
    assert len(masks) == 3


@pytest.mark.parametrize("lever", [field.name for field in dataclasses.fields(Levers)])
def test_levers_are_of_the_child_alone(lever):
    parent = dataclasses.replace(SMALL, binary=False)
    levered = dataclasses.replace(
        parent, operations=OperationSettings(levers=Levers(**{lever: True}))
    )
    chex.assert_trees_all_equal_shapes(shapes_of(levered), shapes_of(parent))
    found, expected = (
        jax.make_jaxpr(functools.partial(Network(own).apply, train=False))(
            variables_of(parent), images_of()
        )
        for own in (levered, parent)
    )
    assert str(found) == str(expected)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(dataclasses.replace(SMALL, cells=1), id="a 1-bit cell"),
        # With convolutions, which are what recomputing saves the memory of.
        pytest.param(
            dataclasses.replace(
                DEEP, normal=((0, 2, "sep_conv_3x3"), *CHAIN[1:]), reduce=CHAIN, binary=False
            ),
            id="scanned cells",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_recomputing_changes_no_number(settings):
    settings = dataclasses.replace(settings, auxiliary=False)
    variables, images = variables_of(settings), images_of()

    def gradients(settings):
        def loss(params):
            outputs, changed = Network(settings).apply(
                {**variables, "params": params},
                images,
                train=True,
                drop_path=None,
                mutable=["batch_stats"],
            )
            return jnp.sum(jnp.square(outputs.logits)), changed

        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        program = run.lower(variables["params"]).compile(QUICK)
        return program(variables["params"]), program.memory_analysis().temp_size_in_bytes

    (expected, needed), (found, recomputing_needs) = (
        gradients(dataclasses.replace(settings, recompute=recompute)) for recompute in (False, True)
    )
    assert recomputing_needs < needed
    (value, changed), gradient = expected
    (own_value, own_changed), own_gradient = found
    np.testing.assert_allclose(own_value, value, rtol=1e-5)
    chex.assert_trees_all_close(own_changed, changed, rtol=1e-5, atol=1e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    chex.assert_trees_all_close(own_gradient, gradient, rtol=1e-4, atol=1e-5 * largest)


def test_initial_kernels_have_their_standard_deviation_in_scans_too():
    settings = dataclasses.replace(DEEP, channels=8)
    init = jax.jit(lambda key: network.init(key, settings, (8, 8, 3)), compiler_options=QUICK)
    params = init(jax.random.key(0, impl="rbg"))["params"]
    first = next(s for s in stretches(settings) if s.length > 1).first
    cell = params[f"cells{first}"]
    for kernel, variance in (
        (params["stem"]["conv0"]["kernel"], 2 / 27),
        (cell["preprocess1"]["conv"]["kernel"], 2 / cell["preprocess1"]["conv"]["kernel"].shape[1]),
        (params["auxiliary"]["conv1"]["kernel"], 2 / (4 * 128)),
    ):
        np.testing.assert_allclose(
            np.std(kernel), np.sqrt(variance), rtol=4 / np.sqrt(2 * kernel.size)
        )
    affine = params["stem"]["conv0_norm"]["affine"]
    np.testing.assert_array_equal(affine["scale"], np.ones(24))
    np.testing.assert_array_equal(affine["bias"], np.zeros(24))


def test_the_imagenet_stem_divides_by_eight():
    settings = dataclasses.replace(SMALL, stem="imagenet")
    outputs = jax.eval_shape(
        lambda v, x: Network(settings).apply(v, x, train=False),
        shapes_of(settings, (64, 64, 3)),
        jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32),
    )
    # 64 / 8 in the stem, two reduction cells.
    assert outputs.features.shape == (2, 2, 2, 4 * 16)


def test_mistakes_in_a_network_are_named():
    with pytest.raises(ValueError, match="node 5 of the normal cell has no input"):
        NetworkSettings(PLAIN[:6], PLAIN, 3, 4, 5)
    with pytest.raises(ValueError, match="stem is 'mnist'"):
        dataclasses.replace(SMALL, stem="mnist")
    with pytest.raises(ValueError, match="cells is 0"):
        dataclasses.replace(SMALL, cells=0)
    with pytest.raises(ValueError, match="no edge 5->2"):
        NetworkSettings((*PLAIN, (5, 2, "skip_connect")), PLAIN, 3, 4, 5)
    with pytest.raises(ValueError, match="an edge twice"):
        NetworkSettings((*PLAIN, PLAIN[0]), PLAIN, 3, 4, 5)
