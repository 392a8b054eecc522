"""What the convolutions of a child are given: signs, padding on the border, two-valued filters."""

import jax.numpy as jnp
import numpy as np
import pytest
from operands import Recorder
from operation_cases import PARAMETRIC_CASES, image, params_of

from cpnas_jax.models.binarize import Binarizer
from cpnas_jax.models.operations import (
    FactorizedReduce,
    OperationSettings,
    Preprocess,
    make_operation,
)
from cpnas_jax.models.space import OPERATIONS


def recorded(module, channels, binary, x):
    """Products of one evaluation; the interpreter must give the value of the module itself."""
    params = params_of(module, channels)
    recorder = Recorder()
    out = recorder.run(lambda p, x: module.apply({"params": p}, x, binary), params, x)
    np.testing.assert_allclose(out, module.apply({"params": params}, x, binary), atol=1e-5)
    return recorder.products


def sees_only_bits(products, pad_value):
    """Whether signs, and padding on the border alone, is all that enters the products."""
    for product in products:
        pad = product.dilation * (product.kernel.shape[0] // 2) if product.kernel.ndim == 4 else 0
        height, width = product.activations.shape[1:3]
        inside = product.activations[:, pad : height - pad, pad : width - pad]
        if set(np.unique(inside)) != {-1.0, 1.0} or set(np.unique(product.kernel)) != {-1.0, 1.0}:
            return False
        if not set(np.unique(product.activations)) <= {-1.0, 1.0, pad_value}:
            return False
    return True


# Sixteen channels, so that every filter has weights of both signs.
WIDE = 16
EXPECTED_PRODUCTS = {
    "none": 0,
    "max_pool_3x3": 0,
    "avg_pool_3x3": 0,
    "sep_conv_3x3": 4,
    "sep_conv_5x5": 4,
    "dil_conv_3x3": 2,
    "dil_conv_5x5": 2,
}


def number_of_products(name, stride):
    return EXPECTED_PRODUCTS.get(name, {1: 0, 2: 2}[stride])


@pytest.mark.parametrize("pad_value", [0.0, 1.0])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", OPERATIONS)
def test_child_convolutions_see_nothing_but_bits(name, stride, pad_value):
    settings = OperationSettings(Binarizer(pad_value=pad_value), formulation="native")
    module = make_operation(name, WIDE, stride, settings)
    x = image(WIDE, size=(6, 6))
    for binary in (True, jnp.asarray(True)):
        products = recorded(module, WIDE, binary, x)
        assert len(products) == number_of_products(name, stride)
        assert sees_only_bits(products, pad_value)
        for product in products:
            assert product.scale is not None
            assert product.scale.shape == (product.kernel.shape[-1],)
            assert np.all(product.scale > 0)
            weights = (product.kernel * product.scale).reshape(-1, product.kernel.shape[-1])
            for filter_weights in weights.T:
                low, high = np.unique(filter_weights)
                assert low == -high


@pytest.mark.parametrize(("name", "stride"), PARAMETRIC_CASES)
def test_parent_convolutions_see_other_values(name, stride):
    module = make_operation(name, WIDE, stride, OperationSettings(formulation="native"))
    for binary in (False, jnp.asarray(False)):
        products = recorded(module, WIDE, binary, image(WIDE, size=(6, 6)))
        assert len(products) == number_of_products(name, stride)
        for product in products:
            assert not sees_only_bits([product], 0.0)
            assert len(np.unique(product.activations)) > 3
            assert len(np.unique(product.kernel)) == product.kernel.size


def test_check_of_the_operands_notices_each_kind_of_leak():
    """Zero padding where +1 is due, a float preprocessing, a zero inside the image."""
    padded = OperationSettings(Binarizer(pad_value=0.0), formulation="native")
    x = image(WIDE, size=(6, 6))
    products = recorded(make_operation("dil_conv_3x3", WIDE, 1, padded), WIDE, True, x)
    assert sees_only_bits(products, 0.0)
    assert not sees_only_bits(products, 1.0)
    products[0].activations = products[0].activations.copy()
    products[0].activations[0, 3, 3, 0] = 0
    assert not sees_only_bits(products, 0.0)
    full = OperationSettings(formulation="native", binary_preprocess=False)
    products = recorded(Preprocess(WIDE, False, full), WIDE, True, x)
    assert len(products) == 1
    assert not sees_only_bits(products, 0.0)


@pytest.mark.parametrize("reduce", [True, False])
def test_child_preprocessing_sees_nothing_but_bits(reduce):
    settings = OperationSettings(formulation="native")
    module = Preprocess(WIDE, reduce, settings)
    products = recorded(module, WIDE, True, image(WIDE, size=(6, 6)))
    assert len(products) == (2 if reduce else 1)
    assert sees_only_bits(products, 0.0)


# An odd image has an end row that only the padding fills.
@pytest.mark.parametrize("pad_value", [0.0, 1.0])
def test_factorized_reduce_of_an_odd_image_pads_with_the_configured_value(pad_value):
    settings = OperationSettings(Binarizer(pad_value=pad_value), formulation="native")
    products = recorded(FactorizedReduce(WIDE, settings), WIDE, True, image(WIDE, size=(5, 5)))
    _, odd = (product.activations for product in products)
    assert odd.shape[1:3] == (5, 5)
    np.testing.assert_array_equal(odd[:, -1], np.full_like(odd[:, -1], pad_value))
    np.testing.assert_array_equal(odd[:, :, -1], np.full_like(odd[:, :, -1], pad_value))
    assert set(np.unique(odd[:, :-1, :-1])) == {-1.0, 1.0}
