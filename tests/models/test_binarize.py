import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cpnas_jax.models.binarize import (
    ESTIMATORS,
    SWISH_BETA,
    WEIGHT_SCALES,
    Binarizer,
    binarize_activations,
    binarize_weights,
)

NAMES = sorted(ESTIMATORS)
# Below, at, inside and beyond the clip on both sides, and far out: sixteen, two for each device.
POINTS = np.array(
    [-1e4, -30, -2, -1.25, -1, -0.75, -0.5, -0.125, 0, 0.25, 0.5, 0.875, 1, 2, 30, 1e4]
)


def hard_tanh(x):
    return np.clip(x, -1, 1)


def bireal_surrogate(x):
    """The piecewise quadratic of Bi-Real Net, equation 6."""
    inner = np.where(x < 0, 2 * x + x * x, 2 * x - x * x)
    return np.where(np.abs(x) < 1, inner, np.where(x < 0, -1.0, 1.0))


def sign_swish_surrogate(x):
    """SignSwish of BNN+, equation 3, in the tanh form of the logistic, which cannot overflow."""
    y = SWISH_BETA * x
    logistic = 0.5 * (1 + np.tanh(y / 2))
    return 2 * logistic * (1 + y * (1 - logistic)) - 1


SURROGATES = {
    "identity": lambda x: x,
    "clip": hard_tanh,
    "bireal": bireal_surrogate,
    "swish": sign_swish_surrogate,
}


def slope(name, x):
    """Central difference of the surrogate in float64; at its kinks, the published convention."""
    h = 1e-6
    x = np.asarray(x, np.float64)
    numerical = (SURROGATES[name](x + h) - SURROGATES[name](x - h)) / (2 * h)
    if name == "clip":  # the clip counts |x| = 1 as inside
        return np.where(np.abs(x) == 1, 1.0, numerical)
    return numerical


def gradient(name):
    return jax.grad(lambda x: jnp.sum(ESTIMATORS[name](x)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sign_has_two_values_and_keeps_the_dtype(name, dtype):
    x = jnp.asarray([-3.0, -0.5, -0.0, 0.0, 0.5, 3.0], dtype)
    signs = ESTIMATORS[name](x)
    assert signs.dtype == dtype
    np.testing.assert_array_equal(np.asarray(signs, np.float32), [-1, -1, 1, 1, 1, 1])
    assert gradient(name)(x).dtype == dtype


@given(
    hnp.arrays(
        np.float32,
        (7,),
        elements=st.floats(allow_nan=False, width=32, allow_subnormal=False),
    )
)
def test_sign_of_any_float_is_plus_or_minus_one(x):
    expected = np.where(x >= 0, 1, -1)
    signs = binarize_activations(jnp.asarray(x), Binarizer())
    np.testing.assert_array_equal(signs, expected)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_])
def test_anything_but_floats_is_refused(dtype):
    x = jnp.ones((2, 2), dtype)
    with pytest.raises(TypeError, match=f"activations must be floating.*{x.dtype}"):
        binarize_activations(x, Binarizer())
    with pytest.raises(TypeError, match=f"weights must be floating.*{x.dtype}"):
        binarize_weights(x, Binarizer())


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_slope_of_the_published_surrogate(name):
    got = jax.jit(gradient(name))(jnp.asarray(POINTS, jnp.float32))
    assert np.all(np.isfinite(got))
    np.testing.assert_allclose(got, slope(name, POINTS), atol=1e-5)


def test_gradients_at_the_points_a_reader_can_check():
    x = jnp.asarray([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    expected = {
        "identity": [1, 1, 1, 1, 1, 1, 1],
        "clip": [0, 1, 1, 1, 1, 1, 0],
        "bireal": [0, 0, 1, 2, 1, 0, 0],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(gradient(name)(x), values)
    # At 0 the sign-swish has slope beta: (2 - 0) / (1 + cosh 0) = 1.
    np.testing.assert_allclose(gradient("swish")(x)[3], SWISH_BETA, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_multiplies_the_cotangent(name):
    x = jnp.asarray(POINTS, jnp.float32)
    cotangent = jnp.asarray(np.linspace(-2, 3, len(POINTS)), jnp.float32)
    _, pullback = jax.vjp(ESTIMATORS[name], x)
    expected = np.asarray(cotangent, np.float64) * slope(name, POINTS)
    np.testing.assert_allclose(pullback(cotangent)[0], expected, atol=1e-5)


def stop_gradient_form(name, x):
    """Sign in the forward pass, a smooth function's own derivative in the backward pass."""
    if name == "identity":
        smooth = x
    elif name == "clip":
        smooth = jnp.where(jnp.abs(x) <= 1, x, jax.lax.stop_gradient(x))
    elif name == "bireal":
        inner = jnp.where(x < 0, 2 * x + x * x, 2 * x - x * x)
        smooth = jnp.where(jnp.abs(x) < 1, inner, jax.lax.stop_gradient(x))
    else:
        y = SWISH_BETA * x
        smooth = 2 * jax.nn.sigmoid(y) * (1 + y * jax.nn.sigmoid(-y)) - 1
    sign = jnp.where(x >= 0, jnp.ones_like(x), -jnp.ones_like(x))
    return smooth + jax.lax.stop_gradient(sign - smooth)


@pytest.mark.parametrize("name", NAMES)
def test_stop_gradient_form_agrees_inside_a_computation(name):
    """Composed with other functions, so that chain rule and forward value matter."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
    w = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)

    def loss(sign, x):
        return jnp.sum(jnp.tanh(jnp.sin(sign(0.7 * x)) @ w))

    got = jax.value_and_grad(lambda x: loss(ESTIMATORS[name], x))(x)
    expected = jax.value_and_grad(lambda x: loss(lambda v: stop_gradient_form(name, v), x))(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_under_vmap_and_pmap(name):
    x = jnp.asarray(POINTS.reshape(8, 2), jnp.float32)
    expected = slope(name, POINTS.reshape(8, 2))
    assert jax.local_device_count() == 8
    np.testing.assert_allclose(jax.vmap(gradient(name))(x), expected, atol=1e-5)
    np.testing.assert_allclose(jax.pmap(gradient(name))(x), expected, atol=1e-5)


KERNEL_SHAPES = [(3, 3, 5), (6, 4), (3, 3, 2, 4)]


def latent(shape, seed=0):
    """Latent weights on both sides of zero and of the clip; some exactly zero."""
    kernel = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    kernel[0] = np.abs(kernel[0])
    kernel[1] = -np.abs(kernel[1])
    kernel.flat[0] = 0
    return kernel


def expected_scale(kernel, kind):
    kernel = np.asarray(kernel, np.float64)
    filters = kernel.reshape(-1, kernel.shape[-1])
    if kind == "none":
        return np.ones(1)
    if kind == "layer":
        return np.array([np.abs(filters).mean()])
    return np.array([np.abs(f).mean() for f in filters.T])


@pytest.mark.parametrize("kind", WEIGHT_SCALES)
@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_weight_scale_and_two_values_for_each_output_channel(shape, kind):
    kernel = latent(shape)
    signs, scale = binarize_weights(jnp.asarray(kernel), Binarizer(weight_scale=kind))
    np.testing.assert_array_equal(signs, np.where(kernel >= 0, 1, -1))
    assert signs.dtype == scale.dtype == jnp.float32
    np.testing.assert_allclose(scale, expected_scale(kernel, kind), rtol=1e-6)
    product = (np.asarray(signs) * np.asarray(scale)).reshape(-1, shape[-1])
    for column in product.T:
        low, high = np.unique(column)
        assert low == -high


@pytest.mark.parametrize("kind", WEIGHT_SCALES)
@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_the_latent_weights_through_the_sign_alone(name, kind):
    kernel = latent((6, 4))
    binarizer = Binarizer(weight_estimator=name, weight_scale=kind)
    upstream = np.random.default_rng(3).normal(size=kernel.shape).astype(np.float32)

    def loss(kernel):
        signs, scale = binarize_weights(kernel, binarizer)
        return jnp.sum(signs * scale.reshape(1, -1) * upstream)

    got = jax.grad(loss)(jnp.asarray(kernel))
    expected = upstream * expected_scale(kernel, kind) * slope(name, kernel)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    scale_gradient = jax.grad(lambda k: jnp.sum(binarize_weights(k, binarizer)[1]))
    np.testing.assert_array_equal(scale_gradient(jnp.asarray(kernel)), np.zeros_like(kernel))


def test_weights_keep_bfloat16():
    signs, scale = binarize_weights(jnp.asarray(latent((3, 3, 4)), jnp.bfloat16), Binarizer())
    assert signs.dtype == scale.dtype == jnp.bfloat16


def test_activation_and_weight_estimators_are_told_apart():
    binarizer = Binarizer(activation_estimator="identity", weight_estimator="clip")
    x = jnp.asarray([[2.0, 0.5]])
    activations = jax.grad(lambda x: jnp.sum(binarize_activations(x, binarizer)))(x)
    weights = jax.grad(lambda x: jnp.sum(binarize_weights(x, binarizer)[0]))(x)
    np.testing.assert_array_equal(activations, [[1, 1]])
    np.testing.assert_array_equal(weights, [[0, 1]])


def test_binarizer_is_a_frozen_static_argument():
    assert hash(Binarizer()) == hash(Binarizer())
    assert Binarizer() == Binarizer(weight_scale="channel") != Binarizer(weight_scale="layer")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Binarizer().weight_scale = "layer"
    jitted = jax.jit(binarize_weights, static_argnums=1)
    kernel = jnp.asarray(latent((6, 4)))
    for kind in WEIGHT_SCALES:
        _, scale = jitted(kernel, Binarizer(weight_scale=kind))
        np.testing.assert_allclose(scale, expected_scale(kernel, kind), rtol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation_estimator", "sign"),
        ("weight_estimator", ""),
        ("weight_scale", "filter"),
        ("pad_value", -1.0),
        ("pad_value", 0.5),
    ],
)
def test_unknown_values_are_refused_by_key(field, value):
    with pytest.raises(ValueError, match=rf"binarizer\.{field} is {value!r}; offered are \("):
        Binarizer(**{field: value})
