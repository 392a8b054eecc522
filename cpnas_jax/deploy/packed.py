"""The engine of CPUs: signs as bits in words, products by XNOR, sums by counting bits.

Signs are uint32[N, words, H, W] (see `bits`): neighbours in a row lie side by side, so that one
instruction takes many pixels. A depthwise convolution adds up one bit of every tap, of 32 channels
at a time: its sum is held as binary digits, a word for each (carry-save adders, Harley and Seal),
and compared with thresholds that are held alike, so that it never becomes a number. A 1x1
convolution counts the bits in which pixel and kernel differ.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cpnas_jax.deploy import real
from cpnas_jax.deploy.bits import WORD, num_words, to_words
from cpnas_jax.deploy.real import Tensors
from cpnas_jax.deploy.steps import Step

_ALL = np.uint32(0xFFFFFFFF)


def pack(signs: jax.Array) -> jax.Array:
    """Pack bool[N, H, W, C] to uint32[N, words, H, W]."""
    missing = -signs.shape[-1] % WORD
    padded = jnp.pad(signs, ((0, 0), (0, 0), (0, 0), (0, missing)))
    grouped = padded.reshape(*signs.shape[:-1], -1, WORD)
    values = np.uint32(1) << np.arange(WORD, dtype=np.uint32)
    words = jnp.sum(
        jnp.where(grouped, jnp.asarray(values), jnp.uint32(0)), axis=-1, dtype=jnp.uint32
    )
    return jnp.moveaxis(words, -1, 1)


def sign(step: Step, tensors: Tensors, x: jax.Array) -> jax.Array:
    """Take signs, of a multiple and an offset by channel where there are any."""
    if tensors:
        x = real.affine(step, tensors, x)
    return pack(x >= 0)


def pointwise_sums(step: Step, kernel: np.ndarray, words: jax.Array) -> jax.Array:
    """Return the integers of a 1x1 convolution, int32[N, h, w, D].

    Args:
        step: gives stride and shift.
        kernel: bool[C, D].
        words: signs of C channels.
    """
    shift, stride = step.settings["shift"], step.settings["stride"]
    words = words[:, :, shift::stride, shift::stride]
    of_output = to_words(kernel.T)
    different = None
    for word in range(num_words(kernel.shape[0])):
        own = words[:, word, :, :, None] ^ jnp.asarray(of_output[:, word])[None, None, None]
        count = jax.lax.population_count(own).astype(jnp.int32)
        different = count if different is None else different + count
    assert different is not None
    return kernel.shape[0] - 2 * different


def binary_pointwise(
    step: Step, tensors: Tensors, words: jax.Array, *, pad_value: int
) -> jax.Array:
    """Convolve signs with a 1-bit 1x1 kernel, then multiply and add by channel."""
    kernel = tensors["kernel"]
    sums = pointwise_sums(step, kernel, words)
    # Where the shifted pixels end, all signs are 0, or all are +1.
    of_padding = pad_value * (2 * kernel.sum(axis=0) - kernel.shape[0]).astype(np.int32)
    sums = real.fill(step, sums, jnp.asarray(of_padding)[None, None, None])
    return real.affine(step, tensors, sums.astype(jnp.float32))


def depthwise_matches(
    step: Step, kernel: np.ndarray, words: jax.Array, pad_value: int
) -> list[jax.Array]:
    """Return of how many taps sign and kernel agree, by channel, as binary digits.

    Args:
        step: gives kernel size, stride, dilation.
        kernel: bool[k, k, C].
        words: signs of C channels; around the image stand bits `pad_value`.

    Returns:
        uint32[N, words, H', W'] for each digit, the lowest first.
    """
    size, dilation = step.settings["kernel_size"], step.settings["dilation"]
    stride = step.settings["stride"]
    pad = dilation * (size // 2)
    around = np.uint32(_ALL if pad_value else 0)
    padded = jnp.pad(words, ((0, 0), (0, 0), (pad, pad), (pad, pad)), constant_values=around)
    height, width, _ = step.shape
    # With the opposite of the kernel: equal bits give 1.
    opposite = ~to_words(kernel.reshape(size * size, -1))
    agreeing = []
    for tap in range(size * size):
        row, column = dilation * (tap // size), dilation * (tap % size)
        own = padded[
            :,
            :,
            row : row + stride * (height - 1) + 1 : stride,
            column : column + stride * (width - 1) + 1 : stride,
        ]
        agreeing.append(own ^ jnp.asarray(opposite[tap])[None, :, None, None])
    return count_digits(agreeing)


def count_digits(terms: Sequence[jax.Array]) -> list[jax.Array]:
    """Add up words bit by bit; return the digits of the sums, the lowest first."""
    digits: list[jax.Array] = []
    column = list(terms)
    while column:
        carries = []
        while len(column) >= 3:
            a, b, c = column[:3]
            half = a ^ b
            column = [*column[3:], half ^ c]
            carries.append((a & b) | (half & c))
        if len(column) == 2:
            a, b = column
            column = [a ^ b]
            carries.append(a & b)
        digits.append(column[0])
        column = carries
    return digits


def at_least(digits: Sequence[jax.Array], bounds: Sequence[jax.Array]) -> jax.Array:
    """Return bit by bit whether a number reaches its bound; both as digits, the lowest first."""
    highest, *lower = zip(reversed(digits), reversed(bounds), strict=True)
    greater, equal = highest[0] & ~highest[1], ~(highest[0] ^ highest[1])
    for own, bound in lower:
        greater = greater | (equal & own & ~bound)
        equal = equal & ~(own ^ bound)
    return greater | equal


def valid_taps(size: int, length: int, stride: int, dilation: int) -> np.ndarray:
    """Return which taps of an axis lie inside the image, bool[outputs, k]."""
    centres = np.arange(0, length, stride)[:, None]
    places = centres + dilation * (np.arange(size)[None] - size // 2)
    return (places >= 0) & (places < length)


def match_bounds(
    step: Step, kernel: np.ndarray, threshold: np.ndarray, image: tuple[int, int], pad_value: int
) -> np.ndarray:
    """Return how many taps must agree for D >= threshold, int[H', W', C].

    Where signs are 0 around the image, its taps there have bits 0, which agree with kernel bits of
    0: so many agreements more are asked for.

    Args:
        step: gives kernel size, stride, dilation.
        kernel: bool[k, k, C].
        threshold: int[C].
        image: height and width of the signs.
        pad_value: 0 or 1.
    """
    size, form = step.settings["kernel_size"], step.settings
    inside = np.ones((*step.shape[:2], size, size), bool)
    if pad_value == 0:
        rows, columns = (
            valid_taps(size, length, form["stride"], form["dilation"]) for length in image
        )
        inside = rows[:, None, :, None] & columns[None, :, None, :]
    number = inside.sum(axis=(2, 3))[..., None]
    outside = np.einsum("hwij,ijc->hwc", (~inside).astype(int), (~kernel).astype(int))
    # D = 2 * agreements - taps inside.
    needed = -(-(threshold.astype(int) + number) // 2)
    return np.clip(needed, 0, number + 1) + outside


def binary_depthwise(
    step: Step, tensors: Tensors, words: jax.Array, *, pad_value: int
) -> jax.Array:
    """Convolve signs with a 1-bit depthwise kernel; give whether the sums reach thresholds."""
    kernel = tensors["kernel"]
    digits = depthwise_matches(step, kernel, words, pad_value)
    image = words.shape[2], words.shape[3]
    bounds = match_bounds(step, kernel, tensors["threshold"], image, pad_value)
    # Channels that only fill up the last word: never reached.
    never = bits_beyond(bounds, kernel)
    planes = [
        jnp.asarray(np.moveaxis(to_words((never >> digit) & 1 == 1), -1, 0))[None]
        for digit in range(len(digits))
    ]
    flips = jnp.asarray(to_words(tensors["flip"]))[None, :, None, None]
    return at_least(digits, planes) ^ flips


def bits_beyond(bounds: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Give int[H', W', C] as many channels as words have bits, with a bound out of reach."""
    missing = -bounds.shape[-1] % WORD
    taps = kernel.shape[0] * kernel.shape[1]
    return np.pad(bounds, ((0, 0), (0, 0), (0, missing)), constant_values=taps + 1)


def signed_depthwise(step: Step, tensors: Tensors, x: jax.Array) -> jax.Array:
    """Convolve real values with a kernel of -1 and +1."""
    kernel = jnp.where(jnp.asarray(tensors["kernel"]), 1.0, -1.0)
    return real.shifted_depthwise_sums(step, kernel, x, 0.0)


def depthwise(step: Step, tensors: Tensors, x: jax.Array) -> jax.Array:
    """Convolve real values with a real depthwise kernel."""
    return real.shifted_depthwise_sums(step, jnp.asarray(tensors["kernel"]), x, 0.0)


STEPS: dict[str, real.RealStep] = {
    **real.COMMON,
    "convolution": real.shifted_convolution,
    "max_pool": real.shifted_max_pool,
    "avg_pool": real.shifted_avg_pool,
    "depthwise": depthwise,
    "signed_depthwise": signed_depthwise,
    "sign": sign,
    "binary_depthwise": binary_depthwise,
    "binary_pointwise": binary_pointwise,
}
