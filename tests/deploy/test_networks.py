"""Whole shipped networks against the networks that they were made of."""

import functools

import jax
import numpy as np
import pytest
from draws import QUICK
from random_networks import images_of, shipped_of, trained_logits, variables_of

from cpnas_jax.deploy import program
from cpnas_jax.deploy.structure import Structure, steps
from cpnas_jax.folding import structure_of, threshold_of
from cpnas_jax.models.binarize import Binarizer
from cpnas_jax.models.blocks import Levers, OperationSettings
from cpnas_jax.models.network import NetworkSettings
from cpnas_jax.models.space import EDGES

# Every operation; those of a reduction cell's first edges at stride 2 too.
NORMAL = (
    *((0, 2, "sep_conv_3x3"), (1, 2, "max_pool_3x3"), (0, 3, "dil_conv_5x5"), (2, 3, "none")),
    *(
        (1, 4, "avg_pool_3x3"),
        (2, 4, "skip_connect"),
        (3, 5, "dil_conv_3x3"),
        (4, 5, "skip_connect"),
    ),
)
REDUCE = (
    *(
        (0, 2, "skip_connect"),
        (1, 2, "avg_pool_3x3"),
        (0, 3, "sep_conv_5x5"),
        (2, 3, "skip_connect"),
    ),
    *(
        (1, 4, "max_pool_3x3"),
        (2, 4, "dil_conv_3x3"),
        (1, 5, "dil_conv_5x5"),
        (4, 5, "sep_conv_3x3"),
    ),
)


def settings_of(*, binary=True, levers=(), pad_value=0.0, cells=3, channels=9, stem="cifar", **own):
    operations = OperationSettings(
        levers=Levers(**dict.fromkeys(levers, True)),
        binarizer=Binarizer(pad_value=pad_value, weight_scale=own.pop("weight_scale", "channel")),
        **own,
    )
    return NetworkSettings(
        NORMAL,
        REDUCE,
        cells,
        channels,
        5,
        stem,
        auxiliary=True,
        binary=binary,
        operations=operations,
    )


# Odd sizes: the shifted half of a factorized reduce lacks a row and a column.
CASES = {
    "child": (settings_of(), 9),
    "parent": (settings_of(binary=False), 9),
    "plus": (settings_of(levers=("residual", "prelu", "first_norm"), pad_value=1.0), 9),
    "learnable": (
        settings_of(
            levers=("learnable_sign", "learnable_prelu", "real_depthwise", "first_norm"),
            weight_scale="layer",
            normalize_pools=False,
        ),
        10,
    ),
    "imagenet": (
        settings_of(
            stem="imagenet", separable_repeats=1, binary_preprocess=False, cells=2, channels=34
        ),
        40,
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    settings, size = CASES[request.param]
    variables = variables_of(settings, size)
    images = images_of(size)
    trained = jax.jit(functools.partial(trained_logits, settings))
    expected = trained.lower(variables, images).compile(QUICK)(variables, images)
    return settings, size, variables, images, np.asarray(expected)


def test_every_engine_gives_the_trained_network_s_logits(case):
    settings, size, variables, images, expected = case
    shipped = shipped_of(settings, variables, size)
    engines = program.ENGINES if settings.binary else ("signed", "signed on cpu")
    for engine in engines:
        function = jax.jit(
            lambda images, engine=engine: program.logits(
                shipped.structure, shipped.tensors, images, engine
            )
        )
        found = function.lower(images).compile(QUICK)(images)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_a_structure_is_what_json_holds(case):
    settings, size, *_ = case
    structure = structure_of(settings, (size, size, 3))
    assert Structure.from_dict(structure.to_dict()) == structure
    names = [step.name for step in steps(structure)]
    assert len(names) == len(set(names))
    assert {step.op for step in steps(structure)} <= set(program.ENGINES["packed"])


def test_signs_that_several_edges_share_are_taken_once():
    structure = structure_of(settings_of(), (9, 9, 3))
    taken = [step.inputs for step in steps(structure) if step.op == "sign"]
    assert len(taken) == len(set(taken))
    assert not any(step.tensors for step in steps(structure) if step.op == "sign")


@pytest.mark.parametrize("largest", [9, 25])
def test_thresholds_say_the_same_of_every_sum(largest):
    rng = np.random.default_rng(0)
    sums = np.arange(-largest, largest + 1)[:, None]
    factor, offset = rng.normal(size=(2, 200))
    factor[:5] = 0
    positive = sums * factor + largest * offset >= 0
    threshold, flip = threshold_of(positive, largest)
    assert threshold.dtype == np.int8
    np.testing.assert_array_equal((sums >= threshold) != flip, positive)
    assert positive.all(axis=0).any()
    assert (~positive).all(axis=0).any()
    with pytest.raises(ValueError, match="more than once"):
        threshold_of(np.array([[True], [False], [True]]), 1)


def test_a_child_with_real_weights_is_refused():
    with pytest.raises(ValueError, match="no bits"):
        structure_of(settings_of(binary_weights=False), (8, 8, 3))


@pytest.mark.parametrize(
    ("edges", "words"),
    [
        (((2, 2, "skip_connect"),), "no edge 2->2"),
        (((0, 2, "conv_7x7"),), "'conv_7x7' does not exist"),
        (((0, 2, "none"),), "node 2 of the normal cell has no input"),
    ],
)
def test_cells_that_cannot_be_are_refused(edges, words):
    structure = structure_of(settings_of(), (9, 9, 3))
    damaged = Structure.from_dict({**structure.to_dict(), "normal": edges})
    with pytest.raises(ValueError, match=words):
        steps(damaged)


def test_edges_are_those_of_the_search():
    assert {edge[:2] for edge in NORMAL + REDUCE} <= set(EDGES)


def test_no_rounding_turns_a_sign():
    """A fold that is equal but for rounding gave one of fifty images other logits at this size."""
    settings = settings_of(levers=("residual", "prelu", "first_norm"), channels=36, cells=2)
    variables = variables_of(settings, 32)
    own = shipped_of(settings, variables, 32)
    images = images_of(32, 128, seed=9)
    expected = jax.jit(functools.partial(trained_logits, settings))(variables, images)
    network = jax.jit(
        functools.partial(program.logits, own.structure, own.tensors, engine="packed")
    )
    assert abs(np.asarray(network(images)) - np.asarray(expected)).max() < 1e-4
