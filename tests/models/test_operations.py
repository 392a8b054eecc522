import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import QUICK
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export, lax
from operation_cases import (
    CHANNELS,
    CONVOLUTIONS,
    PARAMETRIC_CASES,
    image,
    params_of,
    shapes_of,
)

from cpnas_jax.models.binarize import Binarizer
from cpnas_jax.models.operations import (
    FactorizedReduce,
    OperationSettings,
    Preprocess,
    make_operation,
)
from cpnas_jax.models.space import OPERATIONS

POOL_CASES = [(f"{kind}_pool_3x3", stride) for kind in ("max", "avg") for stride in (1, 2)]


def half(size, stride):
    return -(-size // stride)


def count(module, channels):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes_of(module, channels)))


def close(got, expected, tolerance=2e-4):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance), got, expected
    )


def value_and_gradients(module, params, x):
    """A program of (params, x, flag): output, and gradients of <output, fixed random array>."""
    out = jax.eval_shape(lambda p, x: module.apply({"params": p}, x, False), params, x)
    weights = np.random.default_rng(7).normal(size=out.shape).astype(np.float32)

    def run(params, x, binary):
        y, pullback = jax.vjp(lambda p, x: module.apply({"params": p}, x, binary), params, x)
        return y, pullback(jnp.asarray(weights))

    return run


# Shapes and dtypes


@pytest.mark.parametrize("form", ["native", "shifted"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_shape_and_dtype_for_even_and_odd_sizes(name, form):
    for stride in (1, 2):
        module = make_operation(name, CHANNELS, stride, OperationSettings(formulation=form))
        shapes = {"params": shapes_of(module, CHANNELS)}
        for size in ((8, 8), (7, 7), (6, 3), (1, 2)):
            x = jax.ShapeDtypeStruct((2, *size, CHANNELS), jnp.float32)
            flag = jax.ShapeDtypeStruct((), jnp.bool_)
            expected = (2, half(size[0], stride), half(size[1], stride), CHANNELS)
            outputs = [
                jax.eval_shape(lambda v, x, b=b, m=module: m.apply(v, x, b), shapes, x)
                for b in (True, False)
            ]
            outputs.append(jax.eval_shape(module.apply, shapes, x, flag))
            for out in outputs:
                assert (out.shape, out.dtype) == (expected, jnp.float32)


def test_none_is_zero_and_skip_is_the_input():
    x = image()
    for binary in (True, False, jnp.asarray(True)):
        for stride in (1, 2):
            zero = make_operation("none", CHANNELS, stride, OperationSettings())
            np.testing.assert_array_equal(
                zero.apply({}, x, binary), np.zeros((3, half(5, stride), half(6, stride), CHANNELS))
            )
        skip = make_operation("skip_connect", CHANNELS, 1, OperationSettings())
        np.testing.assert_array_equal(skip.apply({}, x, binary), x)


def test_unknown_operations_and_settings_are_refused():
    with pytest.raises(ValueError, match=r"operation is 'conv_7x7'; offered are .*sep_conv_3x3"):
        make_operation("conv_7x7", CHANNELS, 1, OperationSettings())
    with pytest.raises(ValueError, match="separable_repeats is 3"):
        OperationSettings(separable_repeats=3)
    with pytest.raises(ValueError, match="formulation is 'cudnn'"):
        OperationSettings(formulation="cudnn")
    assert hash(OperationSettings()) == hash(OperationSettings())


# Parameter counts, from the sizes of the kernels


@pytest.mark.parametrize("channels", [4, 7, 16])
@pytest.mark.parametrize("stride", [1, 2])
def test_parameter_counts(stride, channels):
    c = channels
    expected = {
        "none": 0,
        "max_pool_3x3": 0,
        "avg_pool_3x3": 0,
        "skip_connect": {1: 0, 2: c * c}[stride],  # two 1x1 convolutions to half the channels each
        "sep_conv_3x3": 2 * (9 * c + c * c),
        "sep_conv_5x5": 2 * (25 * c + c * c),
        "dil_conv_3x3": 9 * c + c * c,
        "dil_conv_5x5": 25 * c + c * c,
    }
    assert set(expected) == set(OPERATIONS)
    for name, number in expected.items():
        module = make_operation(name, c, stride, OperationSettings())
        assert count(module, c) == number, name


def test_parameter_counts_of_the_variants():
    once = OperationSettings(separable_repeats=1)
    assert count(make_operation("sep_conv_3x3", 8, 1, once), 8) == 9 * 8 + 64
    assert count(make_operation("sep_conv_5x5", 8, 2, once), 8) == 25 * 8 + 64
    assert count(make_operation("dil_conv_5x5", 8, 2, once), 8) == 25 * 8 + 64
    for reduce in (True, False):
        assert count(Preprocess(8, reduce, once), 12) == 12 * 8
    assert count(FactorizedReduce(7, once), 12) == 12 * 7


def test_initial_kernels_follow_their_fan_in():
    """He: standard deviation sqrt(2 / fan-in)."""
    module = make_operation("dil_conv_5x5", 64, 1, OperationSettings())
    unit = module.init(jax.random.key(0), jnp.zeros((1, 4, 4, 64)), False)["params"]["unit0"]
    for part, fan_in in (("depthwise", 25), ("pointwise", 64)):
        kernel = np.asarray(unit[part]["kernel"])
        np.testing.assert_allclose(kernel.std(), np.sqrt(2 / fan_in), rtol=0.06)
        assert abs(kernel.mean()) < 0.1 * kernel.std()


# Agreement of the formulations, of traced and static flags, and with an independent composition


@functools.cache
def case(name, stride, pad_value):
    """Params, input, and the shifted program for a traced flag."""
    settings = OperationSettings(Binarizer(pad_value=pad_value), formulation="shifted")
    module = make_operation(name, CHANNELS, stride, settings)
    params, x = params_of(module, CHANNELS), image()
    program = jax.jit(value_and_gradients(module, params, x), compiler_options=QUICK)
    return params, x, {b: program(params, x, jnp.asarray(b)) for b in (True, False)}


def padding_of(name):
    """Both paddings are covered without running every operation twice."""
    return 1.0 if "5x5" in name else 0.0


@pytest.mark.parametrize(("name", "stride"), PARAMETRIC_CASES + POOL_CASES)
def test_static_native_is_traced_shifted_in_value_and_gradient(name, stride):
    params, x, shifted = case(name, stride, padding_of(name))
    binarizer = Binarizer(pad_value=padding_of(name))
    module = make_operation(
        name, CHANNELS, stride, OperationSettings(binarizer, formulation="native")
    )
    run = value_and_gradients(module, params, x)
    for binary in (True, False):
        static = jax.jit(lambda p, x, b=binary: run(p, x, b), compiler_options=QUICK)(params, x)
        close(static, shifted[binary], tolerance=5e-5)
        leaves = jax.tree.leaves(static)
        assert all(leaf.dtype == jnp.float32 for leaf in leaves)
        assert all(np.any(leaf) for leaf in leaves)  # nothing is cut off from its gradient
    equal = np.array_equal(shifted[True][0], shifted[False][0])
    assert equal == ("pool" in name)  # child and parent differ wherever there is a convolution


def test_traced_flag_is_the_static_flag_in_one_formulation():
    """Evaluated without fusion, so that nothing but the last bits could differ."""
    module = make_operation("dil_conv_3x3", CHANNELS, 2, OperationSettings(formulation="shifted"))
    params, x = params_of(module, CHANNELS), image()
    run = value_and_gradients(module, params, x)
    for binary in (True, False):
        static, traced = run(params, x, binary), run(params, x, jnp.asarray(binary))
        close(traced, static, tolerance=1e-6)


def lax_conv(x, kernel, stride, dilation, pad, pad_value, groups):
    padded = jnp.pad(
        x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=np.float32(pad_value)
    )
    return lax.conv_general_dilated(
        padded,
        kernel,
        (stride, stride),
        "VALID",
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def batch_norm(x):
    mean = jnp.mean(x, (0, 1, 2), keepdims=True)
    return (x - mean) / jnp.sqrt(jnp.mean((x - mean) ** 2, (0, 1, 2), keepdims=True) + 1e-3)


def sign(x):
    # A value nearer to zero than rounding would make the comparison a matter of luck.
    assert float(jnp.min(jnp.abs(x))) > 1e-6
    return jnp.where(x >= 0, np.float32(1), np.float32(-1))


def one_bit(kernel):
    """Mean magnitude of each output channel times the sign."""
    scale = jnp.mean(jnp.abs(kernel), tuple(range(kernel.ndim - 1)), keepdims=True)
    return scale * sign(kernel)


def expected_unit(x, unit, k, stride, dilation, binary, pad_value):
    """Figure 4.8 for the child, DARTS' order for the parent."""
    c = x.shape[-1]
    depthwise = unit["depthwise"]["kernel"]
    pointwise = unit["pointwise"]["kernel"]
    pad = dilation * (k // 2)
    if binary:
        y = lax_conv(sign(x), one_bit(depthwise)[:, :, None], stride, dilation, pad, pad_value, c)
        y = sign(batch_norm(y))
        y = lax_conv(y, one_bit(pointwise)[None, None], 1, 1, 0, 0.0, 1)
    else:
        y = lax_conv(jnp.maximum(x, 0), depthwise[:, :, None], stride, dilation, pad, 0.0, c)
        y = lax_conv(y, pointwise[None, None], 1, 1, 0, 0.0, 1)
    return batch_norm(y)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_order_of_layers(name, stride, binary):
    pad_value = padding_of(name)
    params, x, got = case(name, stride, pad_value)
    k, dilation = int(name[-1]), 2 if name.startswith("dil") else 1
    repeats = 2 if name.startswith("sep") else 1
    assert sorted(params) == [f"unit{i}" for i in range(repeats)]
    y = x
    for i in range(repeats):
        y = expected_unit(
            y, params[f"unit{i}"], k, stride if i == 0 else 1, dilation, binary, pad_value
        )
    close(got[binary][0], y)


def test_one_repeat_is_the_first_unit_alone():
    module = make_operation("sep_conv_3x3", CHANNELS, 2, OperationSettings(separable_repeats=1))
    params, x = params_of(module, CHANNELS), image()
    assert list(params) == ["unit0"]
    for binary in (True, False):
        expected = expected_unit(x, params["unit0"], 3, 2, 1, binary, 0.0)
        close(module.apply({"params": params}, x, binary), expected)


def expected_reduce(x, params, binary, pad_value):
    x = sign(x) if binary else jnp.maximum(x, 0)
    quantize = one_bit if binary else lambda kernel: kernel
    end = [(0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)]
    shifted = jnp.pad(x[:, 1:, 1:], end, constant_values=np.float32(pad_value if binary else 0))
    halves = [
        jnp.einsum("nhwc,cd->nhwd", pixels[:, ::2, ::2], quantize(params[name]["kernel"]))
        for name, pixels in (("even", x), ("odd", shifted))
    ]
    return batch_norm(jnp.concatenate(halves, axis=-1))


@pytest.mark.parametrize("binary", [True, False])
def test_skip_at_stride_two_is_a_factorized_reduce(binary):
    for pad_value in (0.0, 1.0):
        params, x, got = case("skip_connect", 2, pad_value)
        close(got[binary][0], expected_reduce(x, params, binary, pad_value))


@pytest.mark.parametrize("binary_preprocess", [True, False])
@pytest.mark.parametrize("reduce", [True, False])
def test_preprocess_is_one_bit_only_when_asked(reduce, binary_preprocess):
    settings = OperationSettings(binary_preprocess=binary_preprocess)
    module = Preprocess(CHANNELS, reduce, settings)
    params, x = params_of(module, 6), image(6, size=(5, 5))
    for binary in (True, False):
        one = binary and binary_preprocess
        if reduce:
            expected = expected_reduce(x, params["reduce"], one, 0.0)
        else:
            kernel = params["conv"]["kernel"]
            y = sign(x) @ one_bit(kernel) if one else jnp.maximum(x, 0) @ kernel
            expected = batch_norm(y)
        close(module.apply({"params": params}, x, binary), expected)
        close(module.apply({"params": params}, x, jnp.asarray(binary)), expected)


@settings(max_examples=4)
@given(st.floats(0.01, 100))
def test_child_ignores_the_magnitude_of_its_input(factor):
    """Signs alone enter: no positive factor of the input can be seen, except through gradients."""
    module = make_operation("dil_conv_3x3", CHANNELS, 1, OperationSettings(formulation="native"))
    params, x = params_of(module, CHANNELS), image()
    y = module.apply({"params": params}, x, True)
    np.testing.assert_array_equal(module.apply({"params": params}, x * np.float32(factor), True), y)


@pytest.mark.parametrize("name", ["sep_conv_5x5", "skip_connect", "max_pool_3x3", "avg_pool_3x3"])
def test_operations_with_gradients_lower_for_tpu(name):
    module = make_operation(name, CHANNELS, 2, OperationSettings(formulation="native"))
    shapes = shapes_of(module, CHANNELS)
    x = jax.ShapeDtypeStruct((2, 8, 8, CHANNELS), jnp.float32)
    run = value_and_gradients(module, shapes, x)
    flag = jax.ShapeDtypeStruct((), jnp.bool_)
    exported = export.export(jax.jit(run), platforms=["tpu"])(shapes, x, flag)
    assert exported.platforms == ("tpu",)
