import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cpnas_jax.data import views

AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)


def crop_box(width, height, seed, area=AREA, ratio=RATIO):
    draws = np.random.default_rng(seed).random((views.TRIES, 4))
    return views.random_crop_box(width, height, area, ratio, draws)


@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 10**6))
def test_box_lies_inside(width, height, seed):
    left, top, box_width, box_height = crop_box(width, height, seed)
    assert box_width >= 1
    assert box_height >= 1
    assert 0 <= left <= width - box_width
    assert 0 <= top <= height - box_height


def test_shares_and_ratios_are_the_asked_ones():
    boxes = np.array([crop_box(400, 400, seed, (0.2, 0.6)) for seed in range(4000)])
    shares = boxes[:, 2] * boxes[:, 3] / 400**2
    ratios = np.log(boxes[:, 2] / boxes[:, 3])
    assert 0.19 < shares.min() < shares.max() < 0.61
    assert np.abs(ratios).max() < np.log(4 / 3) + 0.02
    # Both are uniform: every box of those shares and ratios fits into a square.
    tenths = np.histogram(shares, 10, (0.2, 0.6))[0], np.histogram(ratios, 10, np.log(RATIO))[0]
    assert np.min(tenths) > 320
    assert np.max(tenths) < 480
    # So is the place among those that are left.
    for first, length in ((0, 2), (1, 3)):
        places = boxes[:, first] / (400 - boxes[:, length] + 1)
        counts = np.histogram(places, 10, (0, 1))[0]
        assert 320 < counts.min() < counts.max() < 480
        assert boxes[:, first].min() == 0


def test_first_try_against_the_formula():
    draws = np.full((views.TRIES, 4), 0.99)
    draws[0] = (0.25, 0.75, 0.5, 1 - 1e-9)
    pixels = 500 * 375 * (0.08 + 0.25 * 0.92)
    aspect = (3 / 4) ** 0.25 * (4 / 3) ** 0.75
    width, height = round((pixels * aspect) ** 0.5), round((pixels / aspect) ** 0.5)
    expected = (int(0.5 * (501 - width)), 375 - height, width, height)
    assert views.random_crop_box(500, 375, AREA, RATIO, draws) == expected


def test_a_box_that_does_not_fit_is_drawn_again():
    draws = np.zeros((views.TRIES, 4))
    draws[:3] = (1 - 1e-9, 1 - 1e-9, 0, 0)  # all of the area at 4:3 does not fit into a square
    draws[3] = (0, 0.5, 0, 0)
    side = round(300 * 0.08**0.5)
    assert views.random_crop_box(300, 300, AREA, RATIO, draws) == (0, 0, side, side)


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [
        (1000, 60, (460, 0, 80, 60)),  # 4:3 of the height
        (60, 1000, (0, 460, 60, 80)),
        (200, 180, (0, 0, 200, 180)),
    ],
)
def test_fallback_is_the_centre(width, height, box):
    draws = np.full((views.TRIES, 4), 1 - 1e-9)
    assert views.random_crop_box(width, height, (1, 4), RATIO, draws) == box


def test_central_box():
    assert views.central_box(500, 375, 1.0) == (62, 0, 375, 375)
    assert views.central_box(256, 300, 0.875) == (16, 38, 224, 224)
    assert views.central_box(1, 1, 0.1) == (0, 0, 1, 1)


def smooth(width, height):
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def file_of(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def test_view_is_the_resized_crop():
    image = smooth(300, 200)
    box = (40, 20, 160, 120)
    found = views.read_view(file_of(image, format="PNG"), "RGB", 32, lambda w, h: box, quick=True)
    expected = np.asarray(
        image.crop((40, 20, 200, 140)).resize((32, 32), Image.Resampling.BILINEAR)
    )
    assert found.dtype == np.uint8
    # At the edge the filter also sees the pixels outside of the box.
    np.testing.assert_array_equal(found[1:-1, 1:-1], expected[1:-1, 1:-1])
    np.testing.assert_allclose(found.astype(int), expected, atol=20)


def test_box_depends_on_the_size_of_the_image():
    sizes = []
    encoded = file_of(smooth(300, 200), format="JPEG")
    views.read_view(encoded, "RGB", 8, lambda *size: sizes.append(size) or (0, 0, 9, 9), quick=True)
    assert sizes == [(300, 200)]


def test_quick_decoding_shows_the_same_part():
    encoded = file_of(smooth(1203, 905), format="JPEG", quality=95)
    for box in [(0, 0, 1203, 905), (603, 455, 600, 450), (100, 7, 700, 400)]:
        quick, full = (
            views.read_view(encoded, "RGB", 48, lambda w, h, b=box: b, quick=quick).astype(int)
            for quick in (True, False)
        )
        assert (quick != full).any()  # decoded at a reduced size
        assert np.abs(quick - full).mean() < 1
        assert np.abs(quick - full).max() < 12
    # Not where a reduced size would not have the pixels.
    small = [
        views.read_view(encoded, "RGB", 200, lambda w, h: (500, 300, 500, 500), quick=quick)
        for quick in (True, False)
    ]
    np.testing.assert_array_equal(*small)


@pytest.mark.parametrize(("stored", "asked"), [("L", "RGB"), ("RGB", "L"), ("CMYK", "RGB")])
@pytest.mark.parametrize("quick", [False, True])
def test_modes_are_converted(stored, asked, quick):
    image = smooth(400, 400).convert(stored)
    encoded = file_of(image, format="JPEG", quality=95)
    found = views.read_view(encoded, asked, 40, lambda w, h: (0, 0, w, h), quick=quick)
    assert found.shape == (40, 40, 3 if asked == "RGB" else 1)
    expected = np.asarray(image.convert(asked).resize((40, 40), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(found.reshape(expected.shape).astype(int), expected, atol=12)


@pytest.mark.parametrize(
    "encoded", [b"", b"no image", file_of(smooth(90, 90), format="JPEG")[:900]]
)
def test_damaged_image(encoded):
    with pytest.raises((OSError, ValueError, SyntaxError)):
        views.read_view(encoded, "RGB", 8, lambda w, h: (0, 0, w, h), quick=True)
