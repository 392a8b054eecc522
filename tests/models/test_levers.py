"""Each lever of the child, on a separable unit, against its formula in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import QUICK

from cpnas_jax.models.binarize import Binarizer
from cpnas_jax.models.blocks import Levers, OperationSettings
from cpnas_jax.models.operations import SeparableUnit

CHANNELS, SIDE, EPSILON = 6, 5, 1e-3
CASES = [
    *((field.name,) for field in dataclasses.fields(Levers)),
    (),
    ("residual", "prelu", "first_norm"),
    tuple(field.name for field in dataclasses.fields(Levers)),
]


def sign(x):
    return np.where(x >= 0, 1.0, -1.0)


def binary(kernel):
    """Signs times the mean magnitude of each output channel."""
    scale = np.abs(kernel).mean(axis=tuple(range(kernel.ndim - 1)))
    return sign(kernel) * scale


def depthwise(x, kernel, pad_value):
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=pad_value)
    out = np.zeros_like(x)
    for row in range(3):
        for column in range(3):
            out += padded[:, row : row + SIDE, column : column + SIDE] * kernel[row, column]
    return out


def norm(x, variables, *path):
    """With running averages."""
    params, stats = variables["params"], variables["batch_stats"]
    for name in (*path, "affine"):
        params, stats = params[name], stats[name]
    normalized = (x - stats["mean"]) / np.sqrt(stats["var"] + EPSILON)
    return normalized * params["scale"] + params["bias"]


def unit(x, variables, levers, pad_value):
    """sign -> depthwise -> BN -> sign -> 1x1 -> BN, and what the levers make of it."""
    params = variables["params"]

    def signs(y, *path):
        node = params
        for name in path if levers.learnable_sign else ():
            node = node[name]
        return sign(y - node["threshold"]) if levers.learnable_sign else sign(y)

    y = norm(x, variables, "activation", "norm") if levers.first_norm else x
    if not levers.real_depthwise:
        y = signs(y, "activation", "sign")
    around = 0.0 if levers.real_depthwise else pad_value
    y = depthwise(y, binary(params["depthwise"]["kernel"]), around)
    y = signs(norm(y, variables, "between", "norm"), "between", "sign")
    y = norm(y @ binary(params["pointwise"]["kernel"]), variables, "ending", "norm")
    if levers.prelu or levers.learnable_prelu:
        ending = params["ending"]
        shift, lift = (ending["shift"], ending["lift"]) if levers.learnable_prelu else (0, 0)
        y = np.where(y >= shift, y - shift, ending["slope"] * (y - shift)) + lift
    return x + y if levers.residual else y


@pytest.mark.parametrize("pad_value", [0.0, 1.0])
@pytest.mark.parametrize("names", CASES, ids=lambda names: "+".join(names) or "none")
def test_unit_with_levers(names, pad_value):
    levers = Levers(**dict.fromkeys(names, True))
    settings = OperationSettings(
        Binarizer(pad_value=pad_value), normalization="running", levers=levers
    )
    module = SeparableUnit(3, 1, 1, settings)
    generator = np.random.default_rng(5)
    x = generator.normal(size=(2, SIDE, SIDE, CHANNELS)).astype(np.float32)
    shapes = jax.eval_shape(lambda key: module.init(key, jnp.asarray(x), True), jax.random.key(0))
    variables = jax.tree.map(
        # Variances are positive; the rest may be anything.
        lambda leaf: generator.uniform(0.2, 1.5, leaf.shape).astype(np.float32),
        shapes,
    )
    for name in ("depthwise", "pointwise"):
        kernel = variables["params"][name]["kernel"]
        variables["params"][name]["kernel"] = kernel - np.float32(0.8)
    run = jax.jit(lambda variables, x: module.apply(variables, x, True), compiler_options=QUICK)
    np.testing.assert_allclose(
        run(variables, x), unit(x, variables, levers, pad_value), rtol=2e-4, atol=2e-4
    )


def test_no_residual_over_a_stride():
    settings = OperationSettings(normalization="batch", levers=Levers(residual=True))
    plain = OperationSettings(normalization="batch")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, SIDE, SIDE, CHANNELS)), jnp.float32)
    params = SeparableUnit(3, 2, 1, plain).init(jax.random.key(0), x, True)
    expected = SeparableUnit(3, 2, 1, plain).apply(params, x, True)
    np.testing.assert_array_equal(SeparableUnit(3, 2, 1, settings).apply(params, x, True), expected)
