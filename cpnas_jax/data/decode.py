"""Encoded images to arrays: fast decoding of small images, cropping and resizing."""

import io
import struct
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

# Pillow's mode for a number of channels.
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_COLOUR_TYPES = {1: 0, 3: 2}


class ImageSizesDiffer(ValueError):
    """The images of a split have more than one size, and no size was asked for."""


class NothingDecoded(ValueError):
    """Not one image could be decoded."""


def decode_images(
    encoded: Sequence[bytes],
    shape: tuple[int | None, int | None, int | None],
    image_size: int | None,
    failed: Callable[[int, Exception], None],
) -> np.ndarray:
    """Decode images into one array.

    Args:
        encoded: PNG, JPEG, or whatever else Pillow reads; at least one.
        shape: (height, width, channels) as the data set declares it, None where it varies.
        image_size: None keeps the stored size. Otherwise the central square of each image is
            resized to this many pixels a side: the exact mean over blocks where the size divides
            the square's, else Pillow's antialiased bicubic filter.
        failed: called with the position of an image that cannot be decoded and with what Pillow
            raised; it is left out.

    Returns:
        uint8[n, height, width, channels], n the images that were decoded, at least one.

    Raises:
        ImageSizesDiffer: the sizes differ and `image_size` is None.
        NothingDecoded: no image can be decoded.
    """
    height, width, channels = shape
    mode = MODES.get(channels) if channels is not None else None
    images: np.ndarray | None = None
    decoded = 0
    # One thread: Pillow's codecs hold the interpreter lock, a pool was measured not to help.
    for index, data in enumerate(encoded):
        try:
            image = _decode(data, height, width, channels)
            if mode is None:
                mode = image.mode if image.mode in MODES.values() else "RGB"
            pixels = _to_array(image, mode, image_size)
        except MemoryError:
            raise
        # Pillow reports broken images by errors of many types.
        except Exception as error:
            failed(index, error)
            continue
        if images is None:
            images = np.empty((len(encoded), *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            raise ImageSizesDiffer(f"{images.shape[1:3]} and {pixels.shape[:2]}")
        images[decoded] = pixels
        decoded += 1
    if images is None:
        raise NothingDecoded
    return images[:decoded]


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
