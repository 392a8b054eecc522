"""Supernet programs, compiled once for this file, against a network written out by edges."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from cpnas_jax.models import binarize, layers, supernet
from cpnas_jax.models.binarize import Binarizer
from cpnas_jax.models.operations import OperationSettings, Preprocess, make_operation
from cpnas_jax.models.space import EDGES, NUM_EDGES, OPERATIONS
from cpnas_jax.models.supernet import SupernetSettings

DEVICES = 8
CLASSES = 5
QUICK = {"xla_backend_optimization_level": "0"}  # numbers are tested here, not speed
THREE_CELLS = SupernetSettings(cells=3, channels=4, reductions=(1, 2), num_classes=CLASSES)


@pytest.fixture(scope="module")
def soft():
    """Operations whose child has a smooth sign: values of two programs can be compared.

    Sums of signs often equal their mean exactly, and the rounding of a program decides the sign of
    the difference. The sign itself is tested with the operations.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(binarize.ESTIMATORS, "smooth", jnp.tanh)
        yield OperationSettings(Binarizer(activation_estimator="smooth"))


@pytest.fixture(scope="module")
def network(soft):
    """A reduction cell, then a normal one whose first input has twice its resolution."""
    return SupernetSettings(2, 4, (0,), CLASSES, soft)


@pytest.fixture(scope="module")
def cell(soft):
    """One normal cell."""
    return SupernetSettings(1, 4, (), CLASSES, soft)


def shapes_of(settings, image_shape=(8, 8, 3)):
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda key: supernet.init(key, settings, image_shape), key)


@functools.cache
def params_of(settings, seed=0):
    """Random parameters of the supernet's shapes; drawn by numpy, which compiles nothing."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(generator.normal(size=leaf.shape) * 0.6, leaf.dtype),
        shapes_of(settings),
    )


def images_of(size=(16, 16), batch=4, seed=5):
    generator = np.random.default_rng(seed)
    return jnp.asarray(generator.normal(size=(batch, *size, 3)), jnp.float32)


def random_architecture(seed):
    """Of 28 edges, each operation on at least three."""
    operations = np.arange(2 * NUM_EDGES) % len(OPERATIONS)
    shuffled = np.random.default_rng(seed).permutation(operations)
    return jnp.asarray(shuffled.reshape(2, NUM_EDGES), jnp.int32)


def uniform_architecture(name):
    return jnp.full((2, NUM_EDGES), OPERATIONS.index(name), jnp.int32)


# In place of labels: a fixed random direction of the logits.
DIRECTION = np.random.default_rng(11).normal(size=(4, CLASSES)).astype(np.float32)


def loss(logits):
    return jnp.sum(jnp.sin(logits) * DIRECTION)


def scanned(params, images, architecture, flag, settings):
    """((loss, logits), gradients of parameters and images)."""

    def objective(params, images):
        logits = supernet.apply(params, images, architecture, settings=settings, binary=flag)
        return loss(logits), logits

    return jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(params, images)


# The reference: the cells of DARTS edge by edge, plain autodiff, library convolutions.


def edge_params(cell, edge, reduction, name):
    """The slice of the stacked parameters that belongs to one edge of `EDGES`."""
    inputs = [e for e, (source, _) in enumerate(EDGES) if source < 2]
    others = [e for e in range(NUM_EDGES) if e not in inputs]
    if not reduction:
        group, position = "stride1", edge
    elif edge in inputs:
        group, position = "stride2", inputs.index(edge)
    else:
        group, position = "stride1", others.index(edge)
    return jax.tree.map(lambda leaf: leaf[position], cell["edges"][group][name])


def reference_network(params, images, architecture, flag, settings):
    """Logits of a network whose architecture is known before it is traced."""
    architecture = np.asarray(architecture)
    operations = settings.operations
    if operations.formulation == "auto":
        operations = dataclasses.replace(operations, formulation="native")
    stem = layers.normalize(
        lax.conv_general_dilated(
            images,
            params["stem"]["kernel"],
            (1, 1),
            [(1, 1), (1, 1)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
    )
    outputs, channels, larger = [stem, stem], settings.channels, False
    for position, cell in enumerate(params["cells"]):
        reduction = position in settings.reductions
        channels = 2 * channels if reduction else channels
        nodes = [
            Preprocess(channels, i == 0 and larger, operations).apply(
                {"params": cell[f"preprocess{i}"]}, outputs[i - 2], flag
            )
            for i in (0, 1)
        ]
        for target in (2, 3, 4, 5):
            total = 0.0
            for edge, (source, into) in enumerate(EDGES):
                if into != target:
                    continue
                name = OPERATIONS[architecture[int(reduction), edge]]
                stride = 2 if reduction and source < 2 else 1
                if name == "none":
                    pixels = nodes[source][:, ::stride, ::stride]
                    total = total + jnp.zeros_like(pixels)
                    continue
                weights = {"params": edge_params(cell, edge, reduction, name)}
                operation = make_operation(name, channels, stride, operations)
                total = total + operation.apply(weights, nodes[source], flag)
            nodes.append(total)
        outputs.append(jnp.concatenate(nodes[2:], axis=-1))
        larger = reduction
    features = jnp.mean(outputs[-1], (1, 2))
    return features @ params["classifier"]["kernel"] + params["classifier"]["bias"][None, :]


def reference(params, images, architecture, flag, settings):
    def objective(params, images):
        logits = reference_network(params, images, architecture, flag, settings)
        return loss(logits), logits

    return jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(params, images)


def close(got, expected):
    """Equal up to float32 rounding, relative to the largest entry of each leaf."""

    def leaf(a, b):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=2e-4 * max(1.0, np.abs(b).max()))

    jax.tree.map(leaf, got, expected)


# Three architectures, each as child and as parent.
ARCHITECTURES = [random_architecture(seed) for seed in range(3)]
POINTS = [(a, flag) for a in ARCHITECTURES for flag in (True, False)]


def compiled_gradient(settings, images=None):
    """The compiled gradient: an executable, so nothing can be traced again."""
    images = images_of() if images is None else images
    arguments = (shapes_of(settings), images, ARCHITECTURES[0], jnp.asarray(True))
    gradient = jax.jit(functools.partial(scanned, settings=settings), compiler_options=QUICK)
    return gradient.lower(*arguments).compile()


def run(program, params, architecture, flag):
    return jax.device_get(program(params, images_of(), architecture, jnp.asarray(flag)))


@pytest.fixture(scope="module")
def program(network):
    return compiled_gradient(network)


@pytest.fixture(scope="module")
def results(program, network):
    """The gradient at each of `POINTS`."""
    return [run(program, params_of(network), *point) for point in POINTS]


def compiled_reference(settings, architecture, flag, images=None):
    gradient = functools.partial(reference, architecture=architecture, flag=flag, settings=settings)
    arguments = (shapes_of(settings), images_of() if images is None else images)
    return jax.jit(gradient, compiler_options=QUICK).lower(*arguments).compile()


def temporary_bytes(program):
    return program.memory_analysis().temp_size_in_bytes


# The child of one architecture and the parent of the next; every point below.
@pytest.mark.parametrize("point", [0, 3])
def test_logits_and_all_gradients_are_those_of_the_unrolled_network(
    program, results, network, point
):
    unrolled = compiled_reference(network, *POINTS[point])
    close(results[point], unrolled(params_of(network), images_of()))
    assert temporary_bytes(program) < temporary_bytes(unrolled)


@pytest.mark.slow
def test_all_points_of_two_reductions_against_the_unrolled_network(soft):
    settings = dataclasses.replace(THREE_CELLS, operations=soft)
    program, params = compiled_gradient(settings), params_of(settings)
    for point in POINTS:
        expected = reference(params, images_of(), *point, settings)
        close(run(program, params, *point), expected)


@pytest.mark.slow
def test_memory_is_less_than_half_where_images_outweigh_kernels(network):
    """The scan keeps nodes; autodiff keeps what every operation computes inside."""
    images = images_of((32, 32))
    architecture = uniform_architecture("sep_conv_3x3")
    scan = compiled_gradient(network, images)
    unrolled = compiled_reference(network, architecture, True, images)
    assert temporary_bytes(scan) < 0.5 * temporary_bytes(unrolled)


@pytest.mark.slow
def test_signs_against_the_unrolled_network():
    """The child as it is. Both programs must round alike, so both use one formulation."""
    operations = OperationSettings(formulation="shifted")
    settings = dataclasses.replace(THREE_CELLS, operations=operations)
    program, params = compiled_gradient(settings), params_of(settings)
    for architecture in ARCHITECTURES:
        unrolled = compiled_reference(settings, architecture, True)
        close(run(program, params, architecture, True), unrolled(params, images_of()))


def test_architectures_and_models_differ(results):
    logits = [value[0][1] for value in results]
    for i in range(len(POINTS)):
        for j in range(i):
            assert np.max(np.abs(logits[i] - logits[j])) > 1e-3


def sampled_mask(params, architecture, settings):
    """For every entry of the parameters, whether the architecture uses it."""
    architecture = np.asarray(architecture)
    inputs = [e for e, (source, _) in enumerate(EDGES) if source < 2]
    others = [e for e in range(NUM_EDGES) if e not in inputs]
    members = [
        {"stride1": list(range(NUM_EDGES))},
        {"stride2": inputs, "stride1": others},
    ]
    mask = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params)
    for position, cell_mask in enumerate(mask["cells"]):
        kind = int(position in settings.reductions)
        for group, operations in cell_mask["edges"].items():
            chosen = architecture[kind, members[kind][group]]
            for index, name in enumerate(OPERATIONS):
                for leaf in jax.tree.leaves(operations[name]):
                    leaf[chosen != index] = False
    return mask


def test_sampled_operations_and_no_others_have_gradients(results, network):
    """Exactly zero where not sampled; no sampled kernel without gradient, as every node is read."""
    for (architecture, _), (_, (gradients, _)) in zip(POINTS, results, strict=True):
        mask = sampled_mask(gradients, architecture, network)
        for gradient, used in zip(jax.tree.leaves(gradients), jax.tree.leaves(mask), strict=True):
            np.testing.assert_array_equal(gradient[~used], 0)
        edges = [cell["edges"] for cell in gradients["cells"]]
        used_edges = [cell["edges"] for cell in mask["cells"]]
        for gradient, used in zip(jax.tree.leaves(edges), jax.tree.leaves(used_edges), strict=True):
            for edge in range(gradient.shape[0]):
                assert np.any(gradient[edge]) == np.all(used[edge])


def poisoned(params, keep):
    """The parameters with NaN wherever `keep` is False."""
    return jax.tree.map(lambda p, kept: np.where(kept, p, np.float32(np.nan)), params, keep)


def test_only_the_sampled_operations_are_read(program, results, network):
    """NaN in every other parameter of the supernet changes neither logits nor any gradient."""
    params = params_of(network)
    for (architecture, flag), expected in zip(POINTS, results, strict=True):
        without = poisoned(params, sampled_mask(params, architecture, network))
        assert sum(int(np.isnan(leaf).sum()) for leaf in jax.tree.leaves(without)) > 1000
        got = run(program, without, architecture, flag)
        jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("flag", [True, False])
def test_poison_in_a_sampled_operation_is_seen(program, network, flag):
    """So that the test above can fail."""
    params = params_of(network)
    keep = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params)
    first = keep["cells"][0]["edges"]["stride2"]
    first["dil_conv_3x3"] = jax.tree.map(np.zeros_like, first["dil_conv_3x3"])
    architecture = uniform_architecture("dil_conv_3x3")
    (_, logits), (gradients, _) = run(program, poisoned(params, keep), architecture, flag)
    assert np.all(np.isnan(logits))
    assert np.all(np.isnan(gradients["stem"]["kernel"]))


# A smaller network: one normal cell, values alone.


@pytest.fixture(scope="module")
def small(cell):
    """(params, jitted logits that may be traced once)."""

    def logits(params, images, architecture, flag):
        return supernet.apply(params, images, architecture, settings=cell, binary=flag)

    chex.clear_trace_counter()
    return params_of(cell), jax.jit(chex.assert_max_traces(logits, n=1), compiler_options=QUICK)


def test_one_trace_serves_every_architecture_and_both_models(small):
    params, logits = small
    images = images_of((4, 4))
    seen = set()
    for seed in range(10):
        for flag in (True, False):
            out = logits(params, images, random_architecture(seed), jnp.asarray(flag))
            seen.add(np.asarray(out).tobytes())
    for name in OPERATIONS:
        out = logits(params, images, uniform_architecture(name), jnp.asarray(True))
        assert np.all(np.isfinite(out))
    assert len(seen) == 20


def test_network_of_nothing_but_none_gives_the_bias(small):
    params, logits = small
    out = logits(params, images_of((4, 4)), uniform_architecture("none"), jnp.asarray(False))
    bias = np.broadcast_to(params["classifier"]["bias"], (4, CLASSES))
    np.testing.assert_array_equal(out, bias)


def test_batch_statistics_are_those_of_the_batch_alone(small):
    """No running state: the order of the images is all that a permutation changes."""
    params, logits = small
    images, order = images_of((4, 4)), np.array([2, 0, 3, 1])
    architecture = random_architecture(3)
    for flag in (True, False):
        out = logits(params, images, architecture, jnp.asarray(flag))
        again = logits(params, images[order], architecture, jnp.asarray(flag))
        np.testing.assert_allclose(again, out[order], atol=1e-4)


def test_vmap_over_architectures(small, cell):
    params, logits = small
    images = images_of((4, 4))
    architectures = jnp.stack([random_architecture(seed) for seed in range(3)])

    def mapped(params, images, architectures):
        return jax.vmap(lambda a: supernet.apply(params, images, a, settings=cell, binary=False))(
            architectures
        )

    got = jax.jit(mapped, compiler_options=QUICK)(params, images, architectures)
    for out, architecture in zip(got, architectures, strict=True):
        close(out, logits(params, images, architecture, jnp.asarray(False)))


def test_pmap_with_an_architecture_and_a_model_on_every_device(small, cell):
    params, logits = small
    images = images_of((4, 4))
    assert jax.local_device_count() == DEVICES
    architectures = jnp.stack([random_architecture(seed) for seed in range(DEVICES)])
    flags = jnp.arange(DEVICES) % 2 == 0

    def one(params, images, architecture, flag):
        return supernet.apply(params, images, architecture, settings=cell, binary=flag)

    mapped = jax.pmap(one, in_axes=(None, None, 0, 0))
    arguments = (params, images, architectures, flags)
    got = mapped.lower(*arguments).compile(compiler_options=QUICK)(*arguments)
    for device in range(DEVICES):
        close(got[device], logits(params, images, architectures[device], flags[device]))


@pytest.mark.slow
def test_gradients_under_pmap_and_vmap(results, network):
    """A point on each device, and several points on one."""
    params, images = params_of(network), images_of()
    architectures = jnp.stack([a for a, _ in POINTS])
    flags = jnp.asarray([flag for _, flag in POINTS])
    gradient = functools.partial(scanned, settings=network)
    axes = (None, None, 0, 0)
    for mapped in (
        jax.pmap(gradient, in_axes=axes),
        jax.jit(jax.vmap(gradient, in_axes=axes), compiler_options=QUICK),
    ):
        got = mapped(params, images, architectures, flags)
        for i, expected in enumerate(results):
            close(jax.tree.map(lambda leaf, i=i: leaf[i], got), expected)


# Structure


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


@pytest.mark.parametrize(("size", "expected"), [(8, (8, 4, 2)), (7, (7, 4, 2)), (5, (5, 3, 2))])
def test_reductions_halve_the_image_and_double_the_channels(size, expected):
    closed = jax.make_jaxpr(functools.partial(supernet.apply, settings=THREE_CELLS, binary=False))(
        shapes_of(THREE_CELLS), images_of((size, size)), ARCHITECTURES[0]
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
            ARCHITECTURES[0],
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
            ARCHITECTURES[0],
        )


def test_gradient_step_lowers_for_tpu():
    operations = OperationSettings(formulation="native")
    settings = SupernetSettings(2, 4, (1,), CLASSES, operations)
    step = jax.jit(functools.partial(scanned, settings=settings))
    arguments = (
        shapes_of(settings),
        jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.float32),
        jax.ShapeDtypeStruct((2, NUM_EDGES), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.bool_),
    )
    exported = export.export(step, platforms=["tpu"])(*arguments)
    assert exported.platforms == ("tpu",)
    assert "stablehlo.case" in exported.mlir_module()  # the choice is left to the device
