"""Supernet programs, compiled once for this file, against a network written out by edges."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import QUICK, random_architecture
from unrolled import (
    CLASSES,
    DIRECTION,
    THREE_CELLS,
    images_of,
    loss,
    params_of,
    reference,
    shapes_of,
)

from cpnas_jax.models import binarize, supernet
from cpnas_jax.models.binarize import Binarizer
from cpnas_jax.models.layers import StatisticsAxis
from cpnas_jax.models.operations import OperationSettings
from cpnas_jax.models.space import EDGES, NUM_EDGES, OPERATIONS
from cpnas_jax.models.supernet import SupernetSettings

DEVICES = 8


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


def uniform_architecture(name):
    return jnp.full((2, NUM_EDGES), OPERATIONS.index(name), jnp.int32)


def scanned(params, images, architecture, flag, settings):
    """((loss, logits), gradients of parameters and images)."""

    def objective(params, images):
        logits = supernet.apply(params, images, architecture, settings=settings, binary=flag)
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


def test_two_devices_that_share_statistics_are_one_with_the_whole_batch(results, network):
    """Values and gradients, through sums over the devices inside of branches and their scans.

    Rounding differs, since a mean over the batch is that of two means.
    """
    operations = dataclasses.replace(network.operations, statistics=StatisticsAxis("devices"))
    settings = dataclasses.replace(network, operations=operations)

    def on_a_device(params, images, direction, architecture, flag):
        def objective(params, images):
            logits = supernet.apply(params, images, architecture, settings=settings, binary=flag)
            return jnp.sum(jnp.sin(logits) * direction), logits

        (value, logits), (gradient, of_images) = jax.value_and_grad(
            objective, argnums=(0, 1), has_aux=True
        )(params, images)
        # The loss is a sum over the batch.
        value, gradient = jax.lax.psum((value, gradient), "devices")
        return (value, logits), (gradient, of_images)

    program = jax.pmap(on_a_device, axis_name="devices", in_axes=(None, 0, 0, None, None))
    arguments = (images_of().reshape(2, 2, 16, 16, 3), DIRECTION.reshape(2, 2, CLASSES))
    program = program.lower(params_of(network), *arguments, *POINTS[0]).compile(QUICK)
    for point, expected in list(zip(POINTS, results, strict=True))[:4]:
        found = jax.device_get(program(params_of(network), *arguments, *point))
        (value, logits), (gradient, of_images) = found
        assert value[0] == value[1]
        close(
            (
                (value[0], logits.reshape(4, CLASSES)),
                (jax.tree.map(lambda leaf: leaf[0], gradient), of_images.reshape(4, 16, 16, 3)),
            ),
            expected,
        )


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
