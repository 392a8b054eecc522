"""Bits: of kernels in files, of signs in words. A bit 1 stands for +1, a bit 0 for -1.

In files the bits of a tensor follow each other in C order, the lowest of a byte first. In programs
32 channels share a uint32, channel 32 w + i is bit i of word w, and what the last word has beyond
the channels is 0.
"""

import numpy as np

WORD = 32


def to_bytes(signs: np.ndarray) -> np.ndarray:
    """Pack bool[...] to uint8[ceil(entries / 8)]."""
    return np.packbits(np.ascontiguousarray(signs).ravel(), bitorder="little")


def from_bytes(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return bool[shape] of what `to_bytes` gave."""
    size = int(np.prod(shape))
    return np.unpackbits(packed, count=size, bitorder="little").astype(bool).reshape(shape)


def num_words(channels: int) -> int:
    """Return how many words hold a bit of so many channels."""
    return -(-channels // WORD)


def to_words(signs: np.ndarray) -> np.ndarray:
    """Pack the last axis: bool[..., C] to uint32[..., ceil(C / 32)]."""
    missing = -signs.shape[-1] % WORD
    padded = np.pad(signs, [(0, 0)] * (signs.ndim - 1) + [(0, missing)])
    grouped = padded.reshape(*signs.shape[:-1], -1, WORD).astype(np.uint32)
    return (grouped << np.arange(WORD, dtype=np.uint32)).sum(axis=-1, dtype=np.uint32)
