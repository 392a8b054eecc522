"""Encoded images to arrays: fast decoding of small images, cropping and resizing."""

import io
import struct
from collections.abc import Sequence

import numpy as np
from PIL import Image

# Pillow's mode for a number of channels.
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_COLOUR_TYPES = {1: 0, 3: 2}


class ImageSizesDiffer(ValueError):
    """The images of a split have more than one size, and no size was asked for."""


def decode_images(
    encoded: Sequence[bytes],
    shape: tuple[int | None, int | None, int | None],
    image_size: int | None,
) -> np.ndarray:
    """Decode images into one array.

    Args:
        encoded: PNG, JPEG, or whatever else Pillow reads; at least one.
        shape: (height, width, channels) as the data set declares it, None where it varies.
        image_size: None keeps the stored size. Otherwise the central square of each image is
            resized to this many pixels a side: the exact mean over blocks where the size divides
            the square's, else Pillow's antialiased bicubic filter.

    Returns:
        uint8[n, height, width, channels].

    Raises:
        ImageSizesDiffer: the sizes differ and `image_size` is None.
        OSError, ValueError, SyntaxError: an image cannot be decoded.
    """
    height, width, channels = shape
    first = _decode(encoded[0], height, width, channels)
    mode = first.mode if first.mode in MODES.values() else "RGB"
    mode = MODES.get(channels, mode) if channels is not None else mode
    first_array = _to_array(first, mode, image_size)
    images = np.empty((len(encoded), *first_array.shape), np.uint8)

    # One thread: Pillow's codecs hold the interpreter lock, a pool was measured not to help.
    for index, data in enumerate(encoded):
        image = _to_array(_decode(data, height, width, channels), mode, image_size)
        if image.shape != images.shape[1:]:
            raise ImageSizesDiffer(f"{images.shape[1:3]} and {image.shape[:2]}")
        images[index] = image
    return images


def _decode(
    encoded: bytes, height: int | None, width: int | None, channels: int | None
) -> Image.Image:
    """Decode one image, by Pillow's bare codec where the declared shape allows that.

    For images as small as CIFAR's most of `Image.open` is its header parsing in Python. The bare
    codec knows neither size nor mode and refuses data of another size, which then goes to
    `Image.open`.
    """
    if height is not None and width is not None and channels in (1, 3):
        try:
            mode = MODES[channels]
            if encoded.startswith(b"\xff\xd8"):
                return Image.frombytes(mode, (width, height), encoded, "jpeg", mode, "")
            pixels = _plain_png_data(encoded, height, width, channels)
            if pixels is not None:
                return Image.frombytes(mode, (width, height), pixels, "zip", mode, 0)
        except ValueError:
            pass
    with Image.open(io.BytesIO(encoded)) as image:
        image.load()
        return image


def _plain_png_data(encoded: bytes, height: int, width: int, channels: int) -> bytes | None:
    """Return the compressed pixels of a PNG file if it is of the plain kind, None otherwise.

    Plain means 8 bits, not interlaced, without a palette or transparency, of exactly this shape.
    """
    plain = _PNG_SIGNATURE + struct.pack(
        ">I4sIIBBBBB", 13, b"IHDR", width, height, 8, _PNG_COLOUR_TYPES[channels], 0, 0, 0
    )
    if not encoded.startswith(plain):
        return None
    parts = []
    position = len(plain) + 4  # past the header's checksum
    while position + 8 <= len(encoded):
        length, kind = struct.unpack_from(">I4s", encoded, position)
        if kind == b"IDAT":
            parts.append(encoded[position + 8 : position + 8 + length])
        elif kind == b"tRNS":
            return None
        position += length + 12
    return b"".join(parts)


def _to_array(image: Image.Image, mode: str, image_size: int | None) -> np.ndarray:
    """Return an image as uint8[height, width, channels], cropped and resized if a size is given."""
    if image.mode != mode:
        image = image.convert(mode)
    if image_size is not None and image.size != (image_size, image_size):
        image = _resize(image, image_size)
    pixels = np.frombuffer(image.tobytes(), np.uint8)
    return pixels.reshape(image.height, image.width, -1)


def _resize(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    resampling = Image.Resampling.BOX if side % size == 0 else Image.Resampling.BICUBIC
    return image.resize((size, size), resampling, box=(left, top, left + side, top + side))
