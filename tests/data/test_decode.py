import io

import numpy as np
import pytest
from PIL import Image

from cpnas_jax.data import decode


def pixels(*shape):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, shape, dtype=np.uint8)


def decoded_images(*arguments):
    """Decode what must be sound."""
    failures = []
    images = decode.decode_images(*arguments, lambda *failure: failures.append(failure))
    assert failures == []
    return images


def save(array, file_format="PNG", mode=None, **options):
    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, file_format, **options)
    return file.getvalue()


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("declared", [True, False])
def test_png_is_exact(channels, declared):
    array = pixels(3, 20, 24, channels)
    shape = (20, 24, channels) if declared else (None, None, channels)
    decoded = decoded_images([save(a) for a in array], shape, None)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, array)


def test_png_of_several_data_chunks():
    array = pixels(200, 200, 3)  # noise, so that the pixels exceed a chunk of 64 KiB
    encoded = save(array)
    assert encoded.count(b"IDAT") > 1
    np.testing.assert_array_equal(decoded_images([encoded], (200, 200, 3), None)[0], array)


@pytest.mark.parametrize(
    ("declared", "options"),
    [
        ((32, 32, 3), {"file_format": "JPEG"}),
        ((32, 32, 3), {"file_format": "JPEG", "progressive": True}),
        ((32, 32, 3), {"file_format": "JPEG", "mode": "L"}),
        ((32, 32, 3), {"file_format": "JPEG", "mode": "CMYK"}),
        ((32, 32, 1), {"file_format": "JPEG", "mode": "L"}),
        ((32, 32, 3), {"mode": "P"}),
        ((32, 32, 3), {"mode": "L"}),
        ((32, 32, 3), {"mode": "RGBA"}),
        ((32, 32, 3), {"file_format": "BMP"}),
    ],
)
def test_fast_path_agrees_with_pillow(declared, options):
    encoded = save(pixels(32, 32, 3), **options)
    with Image.open(io.BytesIO(encoded)) as image:
        expected = np.asarray(image.convert("L" if declared[2] == 1 else "RGB"))
    decoded = decoded_images([encoded], declared, None)[0]
    np.testing.assert_array_equal(decoded, expected.reshape(declared))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
@pytest.mark.parametrize("size", [(40, 32), (32, 40), (24, 24), (64, 16)])
def test_an_image_of_another_size_than_declared_is_never_misread(file_format, size):
    images = [save(pixels(32, 32, 3), file_format), save(pixels(*size, 3), file_format)]
    with pytest.raises(decode.ImageSizesDiffer, match="32, 32"):
        decoded_images(images, (32, 32, 3), None)


@pytest.mark.parametrize("broken", [b"", b"neither", save(pixels(32, 32, 3), "JPEG")[:500]])
@pytest.mark.parametrize("shape", [(32, 32, 3), (None, None, None)])
def test_broken_images_are_left_out_wherever_they_are(broken, shape):
    array = pixels(2, 32, 32, 3)
    encoded = [broken, save(array[0]), broken, save(array[1]), broken]
    failures = []
    found = decode.decode_images(encoded, shape, None, lambda *failure: failures.append(failure))
    np.testing.assert_array_equal(found, array)
    assert [position for position, _ in failures] == [0, 2, 4]
    with pytest.raises(decode.NothingDecoded):
        decode.decode_images([broken], shape, None, lambda *_: None)
    with pytest.raises(OverflowError, match="stop"):
        decode.decode_images([broken], shape, None, stop)


def stop(*_):
    raise OverflowError("stop")


def test_resizing_by_a_divisor_is_the_mean_over_blocks():
    array = pixels(5, 32, 32, 3)
    resized = decoded_images([save(a) for a in array], (32, 32, 3), 8)
    means = array.reshape(5, 8, 4, 8, 4, 3).mean(axis=(2, 4))
    assert resized.shape == (5, 8, 8, 3)
    np.testing.assert_allclose(resized, means, atol=1)


def test_resizing_takes_the_central_square_and_is_antialiased():
    array = np.zeros((1, 28, 40, 1), np.uint8)
    array[:, :, 6:34] = 200  # the central square
    array[:, ::2] //= 2  # stripes that only an antialiased filter averages
    resized = decoded_images([save(a) for a in array], (None, None, 1), 16)
    assert resized.shape == (1, 16, 16, 1)
    np.testing.assert_allclose(resized[:, 1:-1], 150, atol=20)


def test_images_of_several_sizes_need_a_size():
    images = [save(pixels(20, 30, 3)), save(pixels(40, 24, 3))]
    with pytest.raises(decode.ImageSizesDiffer):
        decoded_images(images, (None, None, 3), None)
    assert decoded_images(images, (None, None, 3), 16).shape == (2, 16, 16, 3)
