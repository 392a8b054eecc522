"""Parameters, initial values and shapes of the supernet; nothing is compiled but `init`."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import QUICK, random_architecture
from unrolled import CLASSES, THREE_CELLS, images_of, shapes_of

from cpnas_jax.models import supernet
from cpnas_jax.models.space import OPERATIONS
from cpnas_jax.models.supernet import SupernetSettings

ARCHITECTURE = random_architecture(0)


def test_parameter_tree_and_total_from_first_principles():
    def operations(c, stride):
        reduce = c * c if stride == 2 else 0
        return 2 * (9 + 25) * c + 4 * c * c + (9 + 25) * c + 2 * c * c + reduce

    c = THREE_CELLS.channels
    stem = 3 * c
    expected = 9 * 3 * stem + (4 * 4 * c + 1) * CLASSES
    # (channels, edges at stride 1, edges at stride 2, channels of the two inputs)
    cells = [(c, 14, 0, (stem, stem)), (2 * c, 6, 8, (stem, 4 * c)), (4 * c, 6, 8, (4 * c, 8 * c))]
    for channels, plain, strided, inputs in cells:
        expected += plain * operations(channels, 1) + strided * operations(channels, 2)
        expected += sum(inputs) * channels
    shapes = shapes_of(THREE_CELLS)
    # The classifier reads the last cell's four nodes.
    assert shapes["classifier"]["kernel"].shape == (4 * 4 * c, CLASSES)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))
    assert set(shapes) == {"stem", "cells", "classifier"}
    for cell, groups in zip(
        shapes["cells"], [{"stride1": 14}, *2 * [{"stride1": 6, "stride2": 8}]], strict=True
    ):
        assert set(cell) == {"preprocess0", "preprocess1", "edges"}
        assert set(cell["edges"]) == set(groups)
        for group, edges in groups.items():
            assert set(cell["edges"][group]) == set(OPERATIONS)
            assert {leaf.shape[0] for leaf in jax.tree.leaves(cell["edges"][group])} == {edges}


def test_init_depends_on_its_key_alone_and_draws_every_edge_apart():
    settings = dataclasses.replace(THREE_CELLS, cells=1)
    init = jax.jit(lambda key: supernet.init(key, settings, (8, 8, 3)), compiler_options=QUICK)
    # This kind of key compiles in a moment.
    key, other = (jax.random.key(seed, impl="rbg") for seed in (0, 1))
    first, second, third = init(key), init(other), init(key)
    chex.assert_trees_all_equal(first, third)
    chex.assert_trees_all_equal_shapes_and_dtypes(first, shapes_of(settings))
    np.testing.assert_array_equal(first["classifier"].pop("bias"), np.zeros(CLASSES))
    second["classifier"].pop("bias")

    def draws(tree):
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])

    # Draws repeat within a tree by chance alone, and two keys share none of their places.
    assert np.unique(draws(first)).size > 0.99 * draws(first).size
    assert np.mean(draws(first) == draws(second)) < 0.01


def test_initial_weights_follow_their_fan_in():
    """He: sqrt(2 / fan-in); a depthwise filter sums over its own taps alone."""
    settings = SupernetSettings(1, 16, (), CLASSES)
    init = jax.jit(lambda key: supernet.init(key, settings, (8, 8, 3)), compiler_options=QUICK)
    params = init(jax.random.key(0, impl="rbg"))
    (cell,) = params["cells"]
    unit = cell["edges"]["stride1"]["sep_conv_5x5"]["unit0"]
    kernels = [
        (params["stem"]["kernel"], 2 / (9 * 3)),
        (cell["preprocess0"]["conv"]["kernel"], 2 / 48),
        (unit["depthwise"]["kernel"], 2 / 25),
        (unit["pointwise"]["kernel"], 2 / 16),
        (params["classifier"]["kernel"], 1 / 64),
    ]
    for kernel, variance in kernels:
        error = 4 / np.sqrt(2 * kernel.size)
        np.testing.assert_allclose(np.std(kernel), np.sqrt(variance), rtol=error)
        assert abs(np.mean(kernel)) < 4 * np.sqrt(variance / kernel.size)


@pytest.mark.parametrize(("size", "expected"), [(8, (8, 4, 2)), (7, (7, 4, 2)), (5, (5, 3, 2))])
def test_reductions_halve_the_image_and_double_the_channels(size, expected):
    closed = jax.make_jaxpr(functools.partial(supernet.apply, settings=THREE_CELLS, binary=False))(
        shapes_of(THREE_CELLS), images_of((size, size)), ARCHITECTURE
    )
    cells = [
        equation.outvars[0].aval.shape
        for equation in closed.jaxpr.eqns
        if equation.primitive.name == "concatenate" and equation.outvars[0].aval.ndim == 4
    ]
    channels = [4 * c for c in (4, 8, 16)]
    assert cells[-1] == (4, expected[-1], expected[-1], channels[-1])
    for resolution, width in zip(expected, channels, strict=True):
        assert (4, resolution, resolution, width) in cells
    shapes = supernet.cell_shapes(THREE_CELLS)
    assert [shape.channels for shape in shapes] == [4, 8, 16]
    assert [shape.kind for shape in shapes] == ["normal", "reduce", "reduce"]
    assert [shape.reduce_first_input for shape in shapes] == [False, False, True]
    assert closed.out_avals[0].shape == (4, CLASSES)


def test_static_and_traced_models_have_the_same_output_type():
    for binary in (True, False):
        out = jax.eval_shape(
            functools.partial(supernet.apply, settings=THREE_CELLS, binary=binary),
            shapes_of(THREE_CELLS),
            images_of((7, 7)),
            ARCHITECTURE,
        )
        assert (out.shape, out.dtype) == ((4, CLASSES), jnp.float32)


@pytest.mark.parametrize(
    "architecture",
    [
        np.zeros((2, 13), np.int32),
        np.zeros((14, 2), np.int32),
        np.zeros((28,), np.int32),
        np.zeros((2, 14), np.int8),
        np.zeros((2, 14), np.float32),
    ],
)
def test_wrong_architectures_are_refused(architecture):
    with pytest.raises(AssertionError):
        jax.eval_shape(
            functools.partial(supernet.apply, settings=THREE_CELLS, binary=True),
            shapes_of(THREE_CELLS),
            images_of(),
            architecture,
        )


@pytest.mark.parametrize(
    "images", [np.zeros((8, 8, 3), np.float32), np.zeros((4, 8, 8, 3), np.uint8)]
)
def test_wrong_images_are_refused(images):
    with pytest.raises(AssertionError):
        jax.eval_shape(
            functools.partial(supernet.apply, settings=THREE_CELLS, binary=True),
            shapes_of(THREE_CELLS),
            images,
            ARCHITECTURE,
        )
