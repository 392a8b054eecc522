import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpnas_jax.data import augment


def pictures(*shape):
    return np.random.default_rng(0).integers(1, 256, shape, dtype=np.uint8)


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
    augmented = augment.random_crop_flip(jax.random.key(0), jnp.asarray(images), padding, flip)
    assert {a.tobytes() for a in np.asarray(augmented)} == candidates(image, padding, flip)


def test_offsets_and_flips_are_uniform():
    # One bright pixel in the middle shows where its image went.
    images = np.zeros((9000, 9, 9, 1), np.uint8)
    images[:, 4, 4] = 255
    augmented = np.asarray(
        augment.random_crop_flip(jax.random.key(1), jnp.asarray(images), 4, True)
    )
    counts = (augmented[..., 0] > 0).sum(axis=0)
    assert counts.sum() == 9000
    # 81 positions, 111 each, standard deviation 10.5.
    assert 60 < counts.min() < counts.max() < 165


def test_images_of_a_batch_move_on_their_own():
    images = jnp.asarray(np.broadcast_to(pictures(16, 16, 1), (32, 16, 16, 1)))
    augmented = np.asarray(augment.random_crop_flip(jax.random.key(2), images, 4, True))
    assert len({a.tobytes() for a in augmented}) > 20


def test_key_decides():
    images = jnp.asarray(pictures(16, 8, 8, 3))
    one, same, other = (
        np.asarray(augment.random_crop_flip(jax.random.key(k), images, 2, True)) for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_turning_the_flip_off_keeps_the_crops():
    images = np.zeros((64, 9, 9, 1), np.uint8)
    images[:, 4, 4] = 255
    key = jax.random.key(3)
    with_flip, without = (
        np.asarray(augment.random_crop_flip(key, jnp.asarray(images), 3, flip))[..., 0]
        for flip in (True, False)
    )
    same = (with_flip == without).all(axis=(1, 2))
    mirrored = (with_flip == without[:, :, ::-1]).all(axis=(1, 2))
    assert (same | mirrored).all()
    assert not same.all()


def test_nothing_to_do():
    images = jnp.asarray(pictures(4, 8, 8, 3))
    found = augment.random_crop_flip(jax.random.key(0), images, 0, False)
    np.testing.assert_array_equal(found, images)


def test_jit_vmap_and_pmap_agree():
    images = jnp.asarray(pictures(2, 8, 8, 8, 3))
    keys = jax.random.split(jax.random.key(4), 2)

    def function(key, batch):
        return augment.random_crop_flip(key, batch, 2, True)

    expected = np.stack([np.asarray(function(k, i)) for k, i in zip(keys, images, strict=True)])
    np.testing.assert_array_equal(jax.jit(jax.vmap(function))(keys, images), expected)
    np.testing.assert_array_equal(jax.pmap(function)(keys, images), expected)


def test_normalise_against_numpy():
    images = pictures(5, 4, 4, 3)
    mean, std = np.float32([0.5, 0.4, 0.3]), np.float32([0.2, 0.25, 0.3])
    expected = (images.astype(np.float64) / 255 - mean) / std
    found = jax.jit(augment.normalise)(images, mean, std)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=2e-6)
    single = augment.normalise(jnp.asarray(images[0]), jnp.asarray(mean), jnp.asarray(std))
    np.testing.assert_allclose(single, expected[0], atol=2e-6)
