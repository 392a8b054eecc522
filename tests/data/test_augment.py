import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from cpnas_jax.data import augment
from cpnas_jax.models.draws import position_draws


def pictures(*shape):
    return np.random.default_rng(0).integers(1, 256, shape, dtype=np.uint8)


def draws_of(key, images, count):
    """What each image of a batch draws."""
    return position_draws(jax.random.key(key), jnp.arange(len(images), dtype=jnp.int32), count)


def moved(images, padding, flip, key=0):
    draws = draws_of(key, images, augment.CROP_DRAWS)
    return augment.random_crop_flip(draws, jnp.asarray(images), padding, flip)


def shifted_and_mirrored(image, row, column, mirrored, padding):
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    window = padded[row : row + image.shape[0], column : column + image.shape[1]]
    return window[:, ::-1] if mirrored else window


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_crop_flip_against_numpy_slices(padding, channels):
    images = pictures(40, 12, 10, channels)
    rng = np.random.default_rng(1)
    rows, columns = rng.integers(0, 2 * padding + 1, (2, 40), dtype=np.int32)
    mirrored = rng.random(40) < 0.5
    rows[:2], columns[:2] = (0, 2 * padding), (2 * padding, 0)  # both extremes

    found = jax.jit(augment.crop_flip, static_argnums=4)(images, rows, columns, mirrored, padding)

    assert found.dtype == jnp.uint8
    expected = [
        shifted_and_mirrored(*each, padding)
        for each in zip(images, rows, columns, mirrored, strict=True)
    ]
    np.testing.assert_array_equal(found, np.stack(expected))


def candidates(image, padding, flip):
    """Every image that augmentation may make of one."""
    steps = range(2 * padding + 1)
    return {
        shifted_and_mirrored(image, row, column, mirrored, padding).tobytes()
        for row in steps
        for column in steps
        for mirrored in ((False, True) if flip else (False,))
    }


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("flip", [False, True])
def test_random_augmentation_makes_all_of_the_allowed_images_and_no_other(padding, flip):
    image = pictures(6, 6, 3)
    images = np.broadcast_to(image, (500, 6, 6, 3))
    augmented = moved(images, padding, flip)
    assert {a.tobytes() for a in np.asarray(augmented)} == candidates(image, padding, flip)


def test_offsets_and_flips_are_uniform():
    # One bright pixel in the middle shows where its image went.
    images = np.zeros((9000, 9, 9, 1), np.uint8)
    images[:, 4, 4] = 255
    augmented = np.asarray(moved(images, 4, True, key=1))
    counts = (augmented[..., 0] > 0).sum(axis=0)
    assert counts.sum() == 9000
    # 81 positions, 111 each, standard deviation 10.5.
    assert 60 < counts.min() < counts.max() < 165


def test_images_of_a_batch_move_on_their_own():
    images = jnp.asarray(np.broadcast_to(pictures(16, 16, 1), (32, 16, 16, 1)))
    augmented = np.asarray(moved(images, 4, True, key=2))
    assert len({a.tobytes() for a in augmented}) > 20


def test_key_decides():
    images = pictures(16, 8, 8, 3)
    one, same, other = (np.asarray(moved(images, 2, True, k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_turning_the_flip_off_keeps_the_crops():
    images = np.zeros((64, 9, 9, 1), np.uint8)
    images[:, 4, 4] = 255
    with_flip, without = (
        np.asarray(moved(images, 3, flip, key=3))[..., 0] for flip in (True, False)
    )
    same = (with_flip == without).all(axis=(1, 2))
    mirrored = (with_flip == without[:, :, ::-1]).all(axis=(1, 2))
    assert (same | mirrored).all()
    assert not same.all()


def test_nothing_to_do():
    images = jnp.asarray(pictures(4, 8, 8, 3))
    found = moved(images, 0, False)
    np.testing.assert_array_equal(found, images)


def test_jit_vmap_and_pmap_agree():
    images = jnp.asarray(pictures(2, 8, 8, 8, 3))
    draws = jnp.stack([draws_of(key, images[0], augment.CROP_DRAWS) for key in (4, 5)])

    def function(draws, batch):
        return augment.random_crop_flip(draws, batch, 2, True)

    expected = np.stack([np.asarray(function(d, i)) for d, i in zip(draws, images, strict=True)])
    np.testing.assert_array_equal(jax.jit(jax.vmap(function))(draws, images), expected)
    np.testing.assert_array_equal(jax.pmap(function)(draws, images), expected)


@pytest.mark.parametrize("values", [1, 2, 3, 9, 224, 1024])
def test_the_extreme_draws_stay_within_the_values(values):
    draws = np.float32([0, 1 - 2.0**-23, 0.5])
    found = np.asarray(augment._whole(jnp.asarray(draws), values))
    assert list(found) == [0, values - 1, values // 2]


def test_normalise_against_numpy():
    images = pictures(5, 4, 4, 3)
    mean, std = np.float32([0.5, 0.4, 0.3]), np.float32([0.2, 0.25, 0.3])
    expected = (images.astype(np.float64) / 255 - mean) / std
    found = jax.jit(augment.normalise)(images, mean, std)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=2e-6)
    single = augment.normalise(jnp.asarray(images[0]), jnp.asarray(mean), jnp.asarray(std))
    np.testing.assert_allclose(single, expected[0], atol=2e-6)


FACTORS = np.float32([0.6, 0.85, 1.0, 1.1, 1.4])


@pytest.mark.parametrize(
    ("adjust", "enhancer"),
    [
        (augment.adjust_brightness, ImageEnhance.Brightness),
        (augment.adjust_contrast, ImageEnhance.Contrast),
        (augment.adjust_saturation, ImageEnhance.Color),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_enhancement_against_pillow(adjust, enhancer, channels):
    images = pictures(5, 9, 8, channels)
    images[:, :3] //= 4  # a dark part, so that the mean is not the middle
    found = np.asarray(jax.jit(adjust)(jnp.asarray(images, jnp.float32), FACTORS))
    assert found.dtype == np.float32
    for image, factor, changed in zip(images, FACTORS, found, strict=True):
        expected = enhancer(Image.fromarray(image.squeeze())).enhance(factor)
        # Pillow rounds gray and result, and cuts off: up to 1.4 x 1/2 + 1.
        np.testing.assert_allclose(
            changed, np.asarray(expected).reshape(image.shape).astype(float), atol=1.7
        )


def test_hue_against_colorsys():
    images = pictures(5, 6, 7, 3)
    images[0, 0, 0] = 90  # gray has no hue
    images[0, 0, 1] = 0
    images[0, 0, 2:5] = [[200, 200, 10], [10, 200, 200], [200, 10, 200]]  # two largest channels
    shifts = np.float32([-0.5, -0.2, 0.0, 0.07, 0.5])
    found = np.asarray(jax.jit(augment.shift_hue)(jnp.asarray(images, jnp.float32), shifts))
    for image, shift, changed in zip(images, shifts, found, strict=True):
        for pixel, other in zip(image.reshape(-1, 3), changed.reshape(-1, 3), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
            expected = colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)
            np.testing.assert_allclose(other, 255 * np.array(expected), atol=1e-2)


def jitter(images, *strengths, key=0):
    return np.asarray(
        jax.jit(augment.color_jitter, static_argnums=(2, 3, 4, 5))(
            draws_of(key, images, augment.COLOR_DRAWS), jnp.asarray(images), *strengths
        )
    )


def test_jitter_without_strength_changes_nothing():
    images = pictures(3, 6, 6, 3)
    found = jitter(images, 0.0, 0.0, 0.0, 0.0)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, images)


def test_jitter_factors_are_uniform_and_per_image():
    images = np.full((4000, 2, 2, 3), 100, np.uint8)
    factors = jitter(images, 0.4, 0.0, 0.0, 0.0)[:, 0, 0, 0] / 100
    assert 0.6 <= factors.min() < 0.61
    assert 1.39 < factors.max() <= 1.4
    counts = np.histogram(factors, 10, (0.6, 1.4))[0]
    assert 320 < counts.min() < counts.max() < 480
    # Beyond 1 some factors would be negative, and turn bright into dark.
    images[:, 0] = 150
    bright, dark = np.moveaxis(jitter(images, 0.0, 3.0, 0.0, 0.0), 1, 0)
    assert (bright >= dark).all()


def test_jitter_is_its_four_changes_one_after_the_other():
    images = pictures(6, 5, 5, 3)
    uniform = draws_of(5, images, augment.COLOR_DRAWS)
    low, high = np.float32([0.6, 0.7, 0.5, -0.2]), np.float32([1.4, 1.3, 1.5, 0.2])
    draws = list((low[None] + (high - low)[None] * uniform).T)
    assert len({float(draw[0]) for draw in draws}) == 4
    expected = jnp.asarray(images, jnp.float32)
    for change, draw in zip(
        (
            augment.adjust_brightness,
            augment.adjust_contrast,
            augment.adjust_saturation,
            augment.shift_hue,
        ),
        draws,
        strict=True,
    ):
        expected = change(expected, draw)
    found = jitter(images, 0.4, 0.3, 0.5, 0.2, key=5)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert found.min() >= 0
    assert found.max() <= 255


def test_turning_one_change_off_keeps_the_others():
    images = 100 + pictures(6, 5, 5, 3) // 5  # nothing is cut off

    def chroma(*strengths):
        found = jitter(images, *strengths)
        return found.max(axis=-1) - found.min(axis=-1)

    alone = chroma(0.0, 0.0, 0.4, 0.0)
    assert np.abs(alone - chroma(0.0, 0.0, 0.0, 0.0)).max() > 3
    np.testing.assert_allclose(chroma(0.0, 0.0, 0.4, 0.1), alone, atol=1e-3)
    ratios = chroma(0.1, 0.0, 0.4, 0.0) / alone
    assert np.ptp(ratios, axis=(1, 2)).max() < 1e-4  # the brightness of each image
    assert np.ptp(ratios) > 0.05


def test_jitter_of_grayscale():
    images = pictures(4, 5, 5, 1)
    np.testing.assert_array_equal(
        jitter(images, 0.2, 0.3, 0.4, 0.2), jitter(images, 0.2, 0.3, 0.0, 0.0)
    )


def cut(images, size, key=0):
    return np.asarray(
        jax.jit(augment.cutout, static_argnums=2)(
            draws_of(key, images, augment.CUT_DRAWS), jnp.asarray(images), size
        )
    )


@pytest.mark.parametrize("size", [1, 4, 5])
def test_cutout_sets_one_square_to_zero_and_nothing_else(size):
    images = np.random.default_rng(0).uniform(1, 2, (500, 9, 12, 3)).astype(np.float32)
    found = cut(images, size)
    assert found.dtype == np.float32
    whole = 0
    for image, changed in zip(images, found, strict=True):
        zero = (changed == 0).all(axis=-1)
        np.testing.assert_array_equal(changed[~zero], image[~zero])
        rows, columns = np.flatnonzero(zero.any(axis=1)), np.flatnonzero(zero.any(axis=0))
        assert zero[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert zero.sum() == len(rows) * len(columns)
        for places, length in ((rows, 9), (columns, 12)):
            # A side is shorter only at the edge.
            assert len(places) == size or places[0] == 0 or places[-1] == length - 1
            assert 1 <= len(places) <= size
        whole += len(rows) == len(columns) == size
    inner = (9 - size + 1) * (12 - size + 1) / (9 * 12)
    assert abs(whole / 500 - inner) < 0.1


def test_centre_of_cutout_is_uniform():
    found = cut(np.ones((9000, 9, 9, 1), np.float32), 1)
    counts = (found[..., 0] == 0).sum(axis=0)
    assert counts.sum() == 9000
    # 81 positions, 111 each, standard deviation 10.5.
    assert 60 < counts.min() < counts.max() < 165
    # Of a larger square too, though the corners see less of it: 5 rows and columns reach them.
    covered = (cut(np.ones((9000, 9, 9, 1), np.float32), 5)[..., 0] == 0).mean(axis=0)
    reach = np.array([3, 4, 5, 5, 5, 5, 5, 4, 3]) / 9
    np.testing.assert_allclose(covered, np.outer(reach, reach), atol=0.02)


def test_cutout_of_size_zero():
    images = np.ones((4, 5, 5, 3), np.float32)
    np.testing.assert_array_equal(cut(images, 0), images)
