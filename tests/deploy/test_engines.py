"""1-bit steps of both engines against the convolutions of training, as integers, bit for bit."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from cpnas_jax.deploy import packed, signed
from cpnas_jax.deploy.bits import from_bytes, num_words, to_bytes, to_words
from cpnas_jax.deploy.steps import Step
from cpnas_jax.models import layers

RNG = functools.partial(np.random.default_rng)


def signs(rng, *shape):
    return rng.random(shape) < 0.5


def numbers(bits):
    return np.where(bits, np.float32(1), np.float32(-1))


def step_of(op, image, channels, **settings):
    stride = settings.get("stride", 1)
    shape = (-(-image[0] // stride), -(-image[1] // stride), channels)
    return Step(op, "it", "cells.0", ("x",), shape, {}, settings)


def digits_of(planes, channels):
    """Return the numbers of binary digits in words, int[N, H, W, C]."""
    total = 0
    for digit, plane in enumerate(planes):
        words = np.moveaxis(np.asarray(plane), 1, -1)
        own = (words[..., None] >> np.arange(32, dtype=np.uint32)) & 1
        total = total + (own.reshape(*words.shape[:-1], -1)[..., :channels].astype(int) << digit)
    return total


CASES = [
    pytest.param(
        size, stride, dilation, channels, image, id=f"{size}-{stride}-{dilation}-{channels}"
    )
    for size, stride, dilation, channels, image in (
        *(
            (3, 1, 1, 36, (8, 8)),
            (3, 2, 1, 32, (7, 9)),
            (5, 1, 1, 33, (6, 5)),
            (5, 2, 1, 1, (9, 8)),
        ),
        *(
            (3, 1, 2, 31, (8, 7)),
            (3, 2, 2, 65, (7, 7)),
            (5, 1, 2, 40, (9, 9)),
            (5, 2, 2, 9, (4, 4)),
        ),
        # Smaller than the window.
        *((5, 1, 2, 5, (2, 3)), (5, 2, 1, 3, (1, 1))),
    )
]


@pytest.mark.parametrize("pad_value", [0, 1])
@pytest.mark.parametrize(("size", "stride", "dilation", "channels", "image"), CASES)
def test_depthwise_sums_and_thresholds(size, stride, dilation, channels, image, pad_value):
    rng = RNG(size * 100 + channels)
    x, kernel = signs(rng, 2, *image, channels), signs(rng, size, size, channels)
    expected = np.asarray(
        layers.depthwise_conv(
            jnp.asarray(numbers(x)),
            jnp.asarray(numbers(kernel)),
            stride=stride,
            dilation=dilation,
            pad_value=float(pad_value),
            formulation="native",
        )
    ).astype(int)
    step = step_of(
        "binary_depthwise", image, channels, kernel_size=size, stride=stride, dilation=dilation
    )
    words = packed.pack(jnp.asarray(x))
    if pad_value:
        found = digits_of(packed.depthwise_matches(step, kernel, words, 1), channels)
        np.testing.assert_array_equal(2 * found - size * size, expected)
    largest = size * size
    # All that a threshold can be, out of reach on both sides among it.
    thresholds = np.resize(np.arange(-largest, largest + 2), channels).astype(np.int8)
    for shift in range(0, 2 * largest + 2, 5):
        tensors = {
            "kernel": kernel,
            "threshold": np.roll(thresholds, shift),
            "flip": signs(rng, channels),
        }
        wanted = (expected >= tensors["threshold"]) != tensors["flip"]
        bits = packed.binary_depthwise(step, tensors, words, pad_value=pad_value)
        np.testing.assert_array_equal(digits_of([bits], channels), wanted.astype(int))
        # What the last word has beyond the channels stays 0.
        assert digits_of([bits], 32 * num_words(channels))[..., channels:].sum() == 0
    for steps in (signed.STEPS, signed.ON_CPU):
        own = steps["binary_depthwise"](step, tensors, jnp.asarray(numbers(x)), pad_value=pad_value)
        np.testing.assert_array_equal(own, numbers(wanted))


@pytest.mark.parametrize("pad_value", [0, 1])
@pytest.mark.parametrize(
    ("channels", "outputs", "image", "stride", "shift"),
    [
        (36, 36, (5, 4), 1, 0),
        (144, 36, (3, 3), 1, 0),
        (1, 2, (2, 2), 1, 0),
        (64, 17, (6, 6), 2, 0),
        (33, 18, (6, 6), 2, 1),
        (33, 18, (7, 5), 2, 1),
        (40, 8, (7, 6), 2, 0),
    ],
)
def test_pointwise_sums(channels, outputs, image, stride, shift, pad_value):
    rng = RNG(channels)
    x, kernel = signs(rng, 2, *image, channels), signs(rng, channels, outputs)
    # As training has it: the shifted image is padded where a row or column is missing.
    odd = [length % 2 if shift else 0 for length in image]
    given = np.pad(
        numbers(x)[:, shift:, shift:],
        ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)),
        constant_values=pad_value,
    )
    expected = np.asarray(
        layers.pointwise_conv(
            jnp.asarray(given), jnp.asarray(numbers(kernel)), stride=stride, formulation="native"
        )
    )
    step = step_of("binary_pointwise", image, outputs, stride=stride, shift=shift)
    tensors = {
        "kernel": kernel,
        **{name: np.ones(outputs, np.float32) for name in ("scale", "factor")},
        **{name: np.zeros(outputs, np.float32) for name in ("mean", "bias")},
    }
    for engine, own in (
        (packed, packed.pack(jnp.asarray(x))),
        (signed, jnp.asarray(numbers(x))),
    ):
        found = engine.binary_pointwise(step, tensors, own, pad_value=pad_value)
        np.testing.assert_array_equal(found, expected)
        sums = engine.pointwise_sums(step, kernel, own)
        rows = slice(0, sums.shape[1]), slice(0, sums.shape[2])
        np.testing.assert_array_equal(sums, expected[:, *rows])


@pytest.mark.parametrize("channels", [1, 31, 32, 33, 100])
def test_words_hold_what_was_packed(channels):
    bits = signs(RNG(channels), 2, 3, 4, channels)
    words = packed.pack(jnp.asarray(bits))
    assert words.dtype == jnp.uint32
    assert words.shape == (2, num_words(channels), 3, 4)
    np.testing.assert_array_equal(digits_of([words], channels), bits.astype(int))
    np.testing.assert_array_equal(np.moveaxis(np.asarray(words), 1, -1), to_words(bits))
    stored = to_bytes(bits)
    assert stored.size == -(-bits.size // 8)
    np.testing.assert_array_equal(from_bytes(stored, bits.shape), bits)


@pytest.mark.parametrize("terms", [1, 2, 3, 7, 9, 25])
def test_digits_count_bits(terms):
    words = [jnp.asarray(RNG(own).integers(0, 2**32, 5, np.uint32)) for own in range(terms)]
    digits = packed.count_digits(words)
    assert len(digits) == terms.bit_length()
    expected = sum(
        ((np.asarray(own)[:, None] >> np.arange(32, dtype=np.uint32)) & 1) for own in words
    )
    found = sum(
        ((np.asarray(own)[:, None] >> np.arange(32, dtype=np.uint32)) & 1).astype(int) << place
        for place, own in enumerate(digits)
    )
    np.testing.assert_array_equal(found, expected)


def test_sign_of_zero_is_plus_one():
    x = jnp.asarray([[[[0.0, -0.0, 1e-30, -1e-30]]]])
    step = step_of("sign", (1, 1), 4)
    np.testing.assert_array_equal(digits_of([packed.sign(step, {}, x)], 4), [[[[1, 1, 1, 0]]]])
    np.testing.assert_array_equal(signed.sign(step, {}, x), [[[[1, 1, 1, -1]]]])


def test_both_engines_know_the_same_steps():
    assert set(packed.STEPS) == set(signed.STEPS) == set(signed.ON_CPU)
