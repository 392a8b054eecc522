import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import QUICK
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export, lax

from cpnas_jax.models import layers

FORMS = ("native", "shifted")
# The values are what is tested, not the speed of the code that computes them.


def compiled(f):
    return jax.jit(f, compiler_options=QUICK)


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def small_integers(shape, seed=0):
    """Few distinct values, so that most 3x3 windows have ties."""
    return np.random.default_rng(seed).integers(0, 3, size=shape).astype(np.float32)


def half(size, stride):
    return -(-size // stride)


def value_and_pullback(f, *arguments):
    """Output of f, and the gradients of <output, fixed random array>."""
    cotangent = random(jax.eval_shape(f, *arguments).shape, seed=99)

    def run(*arguments):
        out, pullback = jax.vjp(f, *arguments)
        return out, pullback(jnp.asarray(cotangent))

    out, gradients = compiled(run)(*arguments)
    return out, gradients, np.asarray(cotangent, np.float64)


# Oracles: explicit loops over output pixels and taps, float64, gradients by scattering back.


def convolution_oracle(x, kernel, cotangent, stride, dilation, pad_value):
    """Dense convolution with PyTorch's symmetric padding; kernel [k, k, C, D]."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    k = kernel.shape[0]
    pad = dilation * (k // 2)
    n, height, width, _ = x.shape
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=float(pad_value))
    out = np.zeros((n, half(height, stride), half(width, stride), kernel.shape[-1]))
    padded_gradient, kernel_gradient = np.zeros_like(padded), np.zeros_like(kernel)
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            for a in range(k):
                for b in range(k):
                    row, column = i * stride + a * dilation, j * stride + b * dilation
                    pixel = padded[:, row, column]
                    out[:, i, j] += pixel @ kernel[a, b]
                    padded_gradient[:, row, column] += cotangent[:, i, j] @ kernel[a, b].T
                    kernel_gradient[a, b] += pixel.T @ cotangent[:, i, j]
    return out, padded_gradient[:, pad : pad + height, pad : pad + width], kernel_gradient


def depthwise_oracle(x, kernel, cotangent, stride, dilation, pad_value):
    """A depthwise convolution is a dense one whose kernel is diagonal in the channels."""
    dense = np.asarray(kernel)[..., None] * np.eye(kernel.shape[-1])
    out, x_gradient, dense_gradient = convolution_oracle(
        x, dense, cotangent, stride, dilation, pad_value
    )
    return out, x_gradient, np.einsum("abcc->abc", dense_gradient)


def pool_oracle(x, cotangent, stride, kind):
    """3x3 pooling over the pixels inside the image; the first of equal maxima wins."""
    x = np.asarray(x, np.float64)
    n, height, width, channels = x.shape
    out = np.zeros((n, half(height, stride), half(width, stride), channels))
    gradient = np.zeros_like(x)
    for index in np.ndindex(out.shape):
        image, i, j, channel = index
        inside = [
            (image, row, column, channel)
            for row in range(i * stride - 1, i * stride + 2)
            for column in range(j * stride - 1, j * stride + 2)
            if 0 <= row < height and 0 <= column < width
        ]
        if kind == "avg":
            out[index] = np.mean([x[pixel] for pixel in inside])
            for pixel in inside:
                gradient[pixel] += cotangent[index] / len(inside)
        else:
            winner = max(inside, key=lambda pixel: x[pixel])  # max keeps the first
            out[index] = x[winner]
            gradient[winner] += cotangent[index]
    return out, gradient


def agree(got, expected, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5), got, expected)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize(("images", "size"), [(12, (6, 6)), (11, (7, 4))])
def test_depthwise_value_and_gradients(images, size, k, stride, dilation):
    x, kernel = random((images, *size, 3)), random((k, k, 3), seed=1)
    runs = {}
    for form in FORMS:

        def conv(x, kernel, pad_value, form=form):
            return layers.depthwise_conv(
                x, kernel, stride=stride, dilation=dilation, pad_value=pad_value, formulation=form
            )

        cotangent = random((images, half(size[0], stride), half(size[1], stride), 3), seed=99)

        def run(x, kernel, pad_value, conv=conv, cotangent=cotangent):
            out, pullback = jax.vjp(conv, x, kernel, pad_value)
            return out, *pullback(jnp.asarray(cotangent))

        program = compiled(run)  # the padding is traced: one program for both values
        for pad_value in (0.0, 1.0):
            *got, pad_gradient = program(x, kernel, jnp.float32(pad_value))
            expected = depthwise_oracle(x, kernel, cotangent, stride, dilation, pad_value)
            agree(tuple(got), expected)
            assert pad_gradient == 0
            runs[form, pad_value] = got
    for pad_value in (0.0, 1.0):
        agree(runs["native", pad_value], runs["shifted", pad_value])
    assert np.any(np.asarray(runs["native", 0.0][0]) != np.asarray(runs["native", 1.0][0]))


@pytest.mark.parametrize("form", FORMS)
def test_static_padding_is_the_traced_padding(form):
    x, kernel = random((1, 4, 4, 2)), random((3, 3, 2), seed=1)
    for value in (0.0, 1.0):
        static = layers.depthwise_conv(x, kernel, pad_value=value, formulation=form)
        traced = layers.depthwise_conv(x, kernel, pad_value=jnp.float32(value), formulation=form)
        np.testing.assert_array_equal(static, traced)


@pytest.mark.parametrize("form", FORMS)
def test_stride_two_pads_symmetrically_and_not_as_same(form):
    x, kernel = random((1, 6, 6, 2)), random((3, 3, 2), seed=1)
    got = layers.depthwise_conv(x, kernel, stride=2, formulation=form)
    expected, _, _ = depthwise_oracle(x, kernel, np.zeros((1, 3, 3, 2)), 2, 1, 0.0)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    same = lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (2, 2),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )
    assert same.shape == got.shape
    assert np.max(np.abs(np.asarray(same) - np.asarray(got))) > 0.1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
def test_pointwise_value_and_gradients(size, stride, form):
    x, kernel = random((2, *size, 3)), random((3, 4), seed=1)
    out, gradients, cotangent = value_and_pullback(
        lambda x, k: layers.pointwise_conv(x, k, stride=stride, formulation=form), x, kernel
    )
    value, x_gradient, kernel_gradient = convolution_oracle(
        x, kernel[None, None], cotangent, stride, 1, 0.0
    )
    agree((out, *gradients), (value, x_gradient, kernel_gradient[0, 0]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(6, 6), (5, 3), (7, 4)])
def test_conv_3x3_value_and_gradients(size, stride, form):
    x, kernel = random((2, *size, 3)), random((3, 3, 3, 4), seed=1)
    out, gradients, cotangent = value_and_pullback(
        lambda x, k: layers.conv_3x3(x, k, stride=stride, formulation=form), x, kernel
    )
    agree((out, *gradients), convolution_oracle(x, kernel, cotangent, stride, 1, 0.0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(6, 6), (7, 4)])
@pytest.mark.parametrize("kind", ["avg", "max"])
def test_pool_value_and_gradient(kind, size, stride, form):
    pool = {"avg": layers.avg_pool, "max": layers.max_pool}[kind]
    # Ties everywhere, negative values in the corners (zeros of a padding would win there).
    x = small_integers((2, *size, 3)) - 5
    out, (gradient,), cotangent = value_and_pullback(
        lambda x: pool(x, stride=stride, formulation=form), x
    )
    agree((out, gradient), pool_oracle(x, cotangent, stride, kind))


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 1)])
def test_2x2_pooling_of_windows_apart(size):
    """Value, and the gradient to the first of the largest, window by window."""
    generator = np.random.default_rng(0)
    # Few different values: there are ties.
    x = generator.integers(0, 3, (2, *size, 3)).astype(np.float32) - 5
    halves = tuple(-(-side // 2) for side in size)
    cotangent = generator.normal(size=(2, *halves, 3)).astype(np.float32)
    value, pull = jax.vjp(layers.max_pool_2x2, x)
    expected, gradient = np.zeros(cotangent.shape), np.zeros(x.shape)
    for n, i, j, c in np.ndindex(*cotangent.shape):
        window = x[n, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, c]
        first = np.unravel_index(np.argmax(window), window.shape)
        expected[n, i, j, c] = window[first]
        gradient[n, 2 * i + first[0], 2 * j + first[1], c] = cotangent[n, i, j, c]
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_allclose(pull(cotangent)[0], gradient, rtol=1e-6)


def test_ties_of_a_constant_image_go_to_the_first_pixel():
    """By hand: the first pixel of the only window of a 2x2 image, in reading order."""
    x = jnp.ones((1, 2, 2, 1))
    for form in FORMS:
        gradient = jax.grad(
            lambda x, form=form: jnp.sum(layers.max_pool(x, stride=2, formulation=form))
        )(x)
        np.testing.assert_array_equal(gradient[0, :, :, 0], [[1, 0], [0, 0]])


def test_average_pooling_does_not_count_padding():
    for form in FORMS:
        out = layers.avg_pool(jnp.full((1, 4, 5, 1), 3.0), formulation=form)
        np.testing.assert_allclose(out, np.full((1, 4, 5, 1), 3.0), rtol=1e-6)


sizes = st.integers(1, 9)


@given(sizes, sizes, st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.sampled_from([3, 5]))
def test_shapes_and_dtypes_for_any_image_size(height, width, stride, dilation, k):
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jax.ShapeDtypeStruct((1, height, width, 2), dtype)
        kernel = jax.ShapeDtypeStruct((k, k, 2), dtype)
        dense = jax.ShapeDtypeStruct((2, 3), dtype)
        for form in FORMS:
            options = {"stride": stride, "formulation": form}

            def every(x, kernel, dense, options=options):
                return (
                    layers.depthwise_conv(x, kernel, dilation=dilation, **options),
                    layers.max_pool(x, **options),
                    layers.avg_pool(x, **options),
                    layers.pointwise_conv(x, dense, **options),
                )

            outputs = jax.eval_shape(every, x, kernel, dense)
            for out, channels in zip(outputs, (2, 2, 2, 3), strict=True):
                assert out.shape == (1, half(height, stride), half(width, stride), channels)
                assert out.dtype == dtype


@settings(max_examples=5)
@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 2]))
def test_pools_of_small_images(height, width, stride):
    x = small_integers((1, height, width, 2), seed=height * 7 + width)
    for kind, pool in (("avg", layers.avg_pool), ("max", layers.max_pool)):
        expected, _ = pool_oracle(x, np.zeros((1, height, width, 2)), stride, kind)
        for form in FORMS:
            got = pool(jnp.asarray(x), stride=stride, formulation=form)
            np.testing.assert_allclose(got, expected, rtol=1e-6)


def normalize_oracle(x, epsilon):
    x = np.asarray(x, np.float64)
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) / np.sqrt(variance + epsilon)


def test_normalize_value_and_gradient():
    x = random((3, 4, 5, 2)) * np.float32([0.3, 4.0]) + np.float32([1.0, -2.0])
    epsilon = layers.BATCH_NORM_EPSILON
    assert epsilon == 1e-3
    out, (gradient,), cotangent = value_and_pullback(layers.normalize, x)
    np.testing.assert_allclose(out, normalize_oracle(x, epsilon), atol=1e-5)
    for pixel in [(0, 0, 0, 0), (1, 2, 3, 1), (2, 3, 4, 0)]:
        step = np.zeros(x.shape)
        step[pixel] = 1e-5
        numerical = np.sum(
            cotangent * (normalize_oracle(x + step, epsilon) - normalize_oracle(x - step, epsilon))
        ) / (2 * step[pixel])
        np.testing.assert_allclose(gradient[pixel], numerical, atol=1e-4)


def test_normalize_of_a_constant_is_zero_and_has_a_finite_gradient():
    x = jnp.full((2, 3, 3, 2), 7.25)
    np.testing.assert_allclose(layers.normalize(x), np.zeros(x.shape), atol=1e-4)
    assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(layers.normalize(x) ** 2))(x)))


def test_auto_is_shifted_on_a_cpu():
    assert jax.default_backend() == "cpu"
    assert layers.resolve_formulation("auto") == "shifted"
    x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2))
    text = {
        form: str(
            jax.make_jaxpr(lambda x, k, f=form: layers.depthwise_conv(x, k, formulation=f))(
                x, kernel
            )
        )
        for form in layers.FORMULATIONS
    }
    assert "conv_general_dilated" in text["native"]
    assert "conv_general_dilated" not in text["shifted"]
    assert "conv_general_dilated" not in text["auto"]


def test_native_is_kept_and_unknown_formulations_are_refused():
    assert [layers.resolve_formulation(form) for form in FORMS] == list(FORMS)
    with pytest.raises(ValueError, match=r"formulation is 'im2col'; offered are .*native"):
        layers.resolve_formulation("im2col")
    with pytest.raises(ValueError, match="formulation is 'fast'"):
        layers.max_pool(jnp.ones((1, 4, 4, 1)), formulation="fast")


def test_native_forms_and_their_gradients_lower_for_tpu():
    def everything(x, kernel, dense, stem):
        options = {"stride": 2, "formulation": "native"}
        y = layers.conv_3x3(x, stem, formulation="native")
        y = layers.depthwise_conv(y, kernel, dilation=2, pad_value=1.0, **options)
        y = layers.max_pool(layers.avg_pool(y, **options), **options)
        return jnp.sum(layers.normalize(layers.pointwise_conv(y, dense, formulation="native")) ** 2)

    shapes = [(2, 16, 16, 4), (5, 5, 4), (4, 8), (3, 3, 4, 4)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    exported = export.export(
        jax.jit(jax.grad(everything, argnums=(0, 1, 2, 3))), platforms=["tpu"]
    )(*arguments)
    assert exported.platforms == ("tpu",)
    assert [out.shape for out in exported.out_avals] == shapes
    assert "stablehlo.convolution" in exported.mlir_module()
    assert "stablehlo.select_and_scatter" in exported.mlir_module()
