"""The mixture of all operations against sums written out, and against the supernet's paths."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import QUICK, random_architecture
from unrolled import (
    CLASSES,
    images_of,
    loss,
    operation_of,
    params_of,
    reference_network,
    written_out,
)

from cpnas_jax.architecture.gradient import derived
from cpnas_jax.models import binarize, mixture, supernet
from cpnas_jax.models.binarize import Binarizer
from cpnas_jax.models.mixture import MixtureSettings
from cpnas_jax.models.operations import OperationSettings
from cpnas_jax.models.space import CELL_TYPES, EDGE_PARAMETERS, EDGES, OPERATIONS
from cpnas_jax.models.supernet import SupernetSettings


@pytest.fixture(scope="module")
def network():
    """A reduction cell, then a normal one; the child's sign is smooth (see test_supernet)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(binarize.ESTIMATORS, "smooth", jnp.tanh)
        operations = OperationSettings(
            Binarizer(activation_estimator="smooth"), separable_repeats=1
        )
        yield SupernetSettings(2, 4, (0,), CLASSES, operations)


@pytest.fixture(scope="module")
def cell(network):
    """The reduction cell alone: edges of both strides, of inputs and of nodes."""
    return dataclasses.replace(network, cells=1)


@functools.cache
def alpha_of(edges, seed=3):
    generator = np.random.default_rng(seed)
    return {
        name: generator.normal(size=shape).astype(np.float32)
        for name, shape in mixture.alpha_shapes(edges).items()
    }


def softmax(values):
    shifted = jnp.exp(values - jnp.max(values))
    return shifted / jnp.sum(shifted)


def mixture_written_out(params, images, alpha, settings, flag):
    """Every edge as the sum of its operations."""
    k = settings.partial

    def edge_of(reduction, cell, edge, stride, x, operations):
        kind = CELL_TYPES[int(reduction)]
        channels = x.shape[-1] // k
        seen, rest = x[..., :channels], x[..., channels:]
        places = [OPERATIONS.index(name) for name in settings.operations]
        weights = softmax(jnp.stack([alpha[kind][edge, place] for place in places]))
        part = sum(
            weight * operation_of(name, reduction, cell, edge, stride, seen, flag, operations)
            for weight, name in zip(weights, settings.operations, strict=True)
        )
        if k > 1:
            if stride == 2:
                n, height, width, c = rest.shape
                rest = rest.reshape(n, height // 2, 2, width // 2, 2, c).max(axis=(2, 4))
            joined = jnp.concatenate([part, rest], axis=-1)
            # The shuffle: channel j * K + i of the result is channel i * C / K + j.
            order = [i * channels + j for j in range(channels) for i in range(k)]
            part = joined[..., np.asarray(order)]
        if not settings.edge_normalisation:
            return part
        entering = [e for e, (_, end) in enumerate(EDGES) if end == EDGES[edge][1]]
        shares = softmax(jnp.stack([alpha[EDGE_PARAMETERS[kind]][e] for e in entering]))
        return shares[entering.index(edge)] * part

    return written_out(params, images, flag, settings.network, edge_of)


def params_for(settings):
    shapes = jax.eval_shape(
        lambda key: mixture.init(key, settings, (8, 8, 3)),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (generator.normal(size=leaf.shape) * 0.6).astype(leaf.dtype), shapes
    )


def gradients_of(logits_of):
    """(params, images, alpha, flag) -> logits, and gradients of params, images and alpha."""

    def objective(params, images, alpha, flag):
        logits = logits_of(params, images, alpha, flag)
        return loss(logits), logits

    return jax.grad(objective, argnums=(0, 1, 2), has_aux=True)


def close(got, expected):
    def leaf(a, b):
        np.testing.assert_allclose(a, b, atol=2e-4 * max(1.0, np.abs(np.asarray(b)).max()))

    jax.tree.map(leaf, got, expected)


SOME = ("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_5x5")
# The others; the weights of one-hot mixtures are tried with all.
OTHERS = tuple(name for name in OPERATIONS if name not in SOME[1:])
CASES = {"darts child": (1, False, OTHERS), "pc_darts parent": (2, True, SOME)}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_the_sum_written_out(cell, case):
    settings = MixtureSettings(cell, *CASES[case])
    params, alpha = params_for(settings), alpha_of(settings.edge_normalisation)

    @gradients_of
    def scanned(params, images, alpha, flag):
        return mixture.apply(params, images, alpha, settings=settings, binary=flag)

    arguments = (params, images_of((8, 8)), alpha)
    flag = case.endswith("child")
    found = jax.jit(scanned, compiler_options=QUICK)(*arguments, jnp.asarray(flag))

    @gradients_of
    def expected(params, images, alpha, flag):
        return mixture_written_out(params, images, alpha, settings, flag)

    # As one program it would take minutes to compile.
    close(found, expected(*arguments, flag))
    (_, _, alpha_gradient), _ = found
    offered = [OPERATIONS.index(name) for name in settings.operations]
    assert np.all(np.delete(alpha_gradient["reduce"], offered, axis=1) == 0)
    assert np.all(alpha_gradient["reduce"][:, offered] != 0)
    if settings.edge_normalisation:
        assert np.all(alpha_gradient["reduce_edges"] != 0)


def test_one_hot_weights_give_the_path_of_the_supernet(network):
    """Also where alpha would have another operation, but the survivors leave no choice."""
    params = params_of(network)
    alpha = alpha_of(False)
    settings = MixtureSettings(network)

    def both(params, images, alpha, architecture, flag):
        chosen = jax.nn.one_hot(architecture, len(OPERATIONS), dtype=jnp.float32)
        certain = dict(zip(CELL_TYPES, 1000 * chosen, strict=True))
        common = {"settings": settings, "binary": flag}
        return (
            mixture.apply(params, images, certain, **common),
            mixture.apply(params, images, alpha, survivors=chosen > 0, **common),
            supernet.apply(params, images, architecture, settings=network, binary=flag),
        )

    program = jax.jit(both, compiler_options=QUICK)
    for seed, flag in ((0, True), (1, False)):
        architecture = random_architecture(seed)
        certain, alone, path = program(
            params, images_of((8, 8)), alpha, architecture, jnp.asarray(flag)
        )
        close((certain, alone), (path, path))


def test_gates_are_factors_with_gradients_of_their_own(cell):
    """That of `none` has none."""
    params, images = params_of(cell), images_of((8, 8))
    generator = np.random.default_rng(4)
    gates = generator.uniform(0.5, 1.5, (2, 14)).astype(np.float32)

    @gradients_of
    def scanned(params, images, gates, arguments):
        architecture, flag = arguments
        return supernet.apply(params, images, architecture, settings=cell, binary=flag, gates=gates)

    first = (random_architecture(0), jnp.asarray(True))
    program = jax.jit(scanned).lower(params, images, gates, first).compile(QUICK)
    for seed, flag in ((0, True), (1, False)):
        architecture = random_architecture(seed)

        @gradients_of
        def expected(params, images, gates, flag, architecture=architecture):
            return reference_network(params, images, architecture, flag, cell, gates)

        found = program(params, images, gates, (architecture, jnp.asarray(flag)))
        close(found, expected(params, images, gates, flag))
        (_, _, gradient), _ = found
        is_none = np.asarray(architecture)[1] == OPERATIONS.index("none")
        assert 0 < is_none.sum() < 14
        np.testing.assert_array_equal(np.asarray(gradient)[1] == 0, is_none)
        assert np.all(np.asarray(gradient)[0] == 0)  # there is no normal cell


def test_edge_weights_sum_to_one_at_every_node():
    alpha = alpha_of(True)
    for cell, weights in mixture.edge_weights(alpha).items():
        own = alpha[EDGE_PARAMETERS[cell]]
        for target in (2, 3, 4, 5):
            entering = [e for e, (_, end) in enumerate(EDGES) if end == target]
            exponentials = np.exp(own[entering])
            np.testing.assert_allclose(
                weights[np.asarray(entering)], exponentials / exponentials.sum(), rtol=1e-5
            )
    for weights in mixture.edge_weights(alpha_of(False)).values():
        np.testing.assert_array_equal(weights, np.ones(14))


def test_cells_are_derived_by_the_weights_that_the_network_has():
    """`derived` computes them on the host, in double precision, for logs that are checked."""
    alpha = alpha_of(True)
    # Three of every edge.
    survivors = np.random.default_rng(1).random((2, 14, 8)).argsort(axis=-1) < 3
    _, strengths, weights = derived(alpha, survivors)
    own = mixture.operation_weights(alpha, jnp.asarray(survivors))
    edges = mixture.edge_weights(alpha)
    for row, cell in enumerate(CELL_TYPES):
        mask = survivors[row]
        np.testing.assert_allclose(own[cell][mask], weights[row][mask], rtol=1e-5)
        np.testing.assert_allclose(
            (own[cell] * edges[cell][:, None])[mask], strengths[row][mask], rtol=1e-5
        )
        assert np.isnan(strengths[row][~mask]).all()


def test_alpha_starts_small_and_differs_by_key():
    first = mixture.init_alpha(jax.random.key(0), True)
    assert {name: leaf.shape for name, leaf in first.items()} == {
        **{"normal": (14, 8), "reduce": (14, 8)},
        **{"normal_edges": (14,), "reduce_edges": (14,)},
    }
    values = np.concatenate([np.ravel(leaf) for leaf in first.values()])
    assert 0.5e-3 < values.std() < 2e-3
    assert len(np.unique(values)) == values.size
    second = mixture.init_alpha(jax.random.key(1), False)
    assert set(second) == set(CELL_TYPES)
    assert not np.array_equal(first["normal"], second["normal"])


def test_channels_must_be_a_multiple_of_the_parts(network):
    with pytest.raises(ValueError, match="4 channels in 3 parts"):
        MixtureSettings(network, 3)
