"""Parts of encoded images, resized to squares: random crops for training, centres for evaluation.

Filters and crops are those of torchvision on Pillow images, which DARTS and its kin train with.
"""

import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

TRIES = 10
"""Boxes that are tried before a random crop falls back on the centre."""

Box = tuple[int, int, int, int]
"""Left, top, width and height, in pixels of the stored image."""

# JPEG also decodes at 1/2, 1/4 or 1/8, for up to a third less work. The part keeps at least twice
# the wanted pixels a side, so that the filter still does most of the shrinking (Pillow's own choice
# in `Image.thumbnail`).
_REDUCING_GAP = 2


def random_crop_box(
    width: int,
    height: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
    draws: np.ndarray,
) -> Box:
    """Return the box of a random resized crop (Szegedy et al. 2015, as torchvision draws it).

    A box has a random share of the image's area, uniform, and a random aspect ratio, uniform in its
    logarithm. Where none of ten fits into the image, the largest central box of an allowed ratio is
    taken.

    Args:
        width: of the image.
        height: of the image.
        area: smallest and largest share of the area.
        ratio: smallest and largest width / height.
        draws: f64[TRIES, 4], uniform over [0, 1): for area, ratio, left edge, top edge.

    Returns:
        The box.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for of_area, of_ratio, of_left, of_top in draws.tolist():
        pixels = width * height * (area[0] + of_area * (area[1] - area[0]))
        aspect = math.exp(low + of_ratio * (high - low))
        box_width = round(math.sqrt(pixels * aspect))
        box_height = round(math.sqrt(pixels / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(of_left * (width - box_width + 1))
            top = int(of_top * (height - box_height + 1))
            return left, top, box_width, box_height
    box_width = max(1, min(width, round(height * ratio[1])))
    box_height = max(1, min(height, round(width / ratio[0])))
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height


def central_box(width: int, height: int, fraction: float) -> Box:
    """Return the box of the central fraction of the central square.

    Args:
        width: of the image.
        height: of the image.
        fraction: side of the box as a share of the shorter side, in (0, 1]. 0.875 is what resizing
            the shorter side to 256 and cutting 224 out of the centre leaves.
    """
    side = max(1, round(min(width, height) * fraction))
    return (width - side) // 2, (height - side) // 2, side, side


def read_view(
    encoded: bytes, mode: str, size: int, box_of: Callable[[int, int], Box], *, quick: bool
) -> np.ndarray:
    """Decode an image and resize a part of it, with an antialiased bilinear filter.

    Args:
        encoded: PNG, JPEG, or whatever else Pillow reads.
        mode: Pillow's mode to convert to, of `decode.MODES`.
        size: pixels a side of the result.
        box_of: (width, height) of the stored image -> the part.
        quick: whether a large JPEG may be decoded at a reduced size, which changes pixels by less
            than a grey level on average.

    Returns:
        uint8[size, size, channels].

    Raises:
        OSError, ValueError, SyntaxError: the image cannot be decoded.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        width, height = image.size
        left, top, box_width, box_height = box_of(width, height)
        scale = 1.0
        if quick:
            wanted = size * _REDUCING_GAP
            # Nothing for other formats, or where half the pixels would not do.
            reduced = image.draft(
                image.mode, (-(-width * wanted // box_width), -(-height * wanted // box_height))
            )
            # Of the exact sides: the decoded ones are rounded up.
            scale = reduced[1][2] / width if reduced else 1.0
        image.load()
        view = image if image.mode == mode else image.convert(mode)
        edges = (left, top, left + box_width, top + box_height)
        view = view.resize(
            (size, size),
            Image.Resampling.BILINEAR,
            box=(edges[0] * scale, edges[1] * scale, edges[2] * scale, edges[3] * scale),
        )
    return np.frombuffer(view.tobytes(), np.uint8).reshape(size, size, -1)
