"""Augmentation and normalisation on the device, inside the compiled training step.

Each function takes what is random as uniform draws, a row for each image.
"""

import jax
import jax.numpy as jnp

CROP_DRAWS, COLOR_DRAWS, CUT_DRAWS = 3, 4, 2
"""Numbers that an image needs."""


def random_crop_flip(draws: jax.Array, images: jax.Array, padding: int, flip: bool) -> jax.Array:
    """Shift each image at random within a black border, and mirror it with probability 1/2.

    The border is black in uint8, before normalisation, as in DARTS (zero padding of the pixels).

    Args:
        draws: f32[b, CROP_DRAWS] in [0, 1).
        images: uint8[b, h, w, c].
        padding: pixels on each side, static; each shift is uniform over 2 * padding + 1 values in
            either direction. 0 crops nothing.
        flip: static; whether to mirror.

    Returns:
        uint8[b, h, w, c].
    """
    if not padding and not flip:
        return images
    rows, columns = (_whole(draws[:, i], 2 * padding + 1) for i in range(2))
    return crop_flip(images, rows, columns, (draws[:, 2] < 0.5) & flip, padding)


def _whole(draws: jax.Array, values: int) -> jax.Array:
    """Return int32 in [0, values) from draws in [0, 1)."""
    # Even the largest draw, 1 - 2**-23, times `values` rounds to less than `values`.
    return (draws * values).astype(jnp.int32)


def crop_flip(
    images: jax.Array, rows: jax.Array, columns: jax.Array, mirrored: jax.Array, padding: int
) -> jax.Array:
    """Cut each image's own window out of its zero-padded form, then mirror where asked.

    Args:
        images: uint8[b, h, w, c].
        rows: int32[b], the window's first row in the padded image, in [0, 2 * padding].
        columns: int32[b], its first column.
        mirrored: bool[b].
        padding: pixels of zeros on each side, static.

    Returns:
        uint8[b, h, w, c].
    """
    batch, height, width, _ = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    across = jnp.arange(width, dtype=jnp.int32)[None, :]
    across = jnp.where(mirrored[:, None], width - 1 - across, across) + columns[:, None]
    down = jnp.arange(height, dtype=jnp.int32)[None, :] + rows[:, None]
    example = jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    # One gather with the flip in its indices. On 2 CPU cores, 64 images of 32x32x3: 0.25 ms;
    # vmapped dynamic_slice 0.37, one-hot products 1.6, selecting among shifted slices 15.
    window = padded.at[example, down[:, :, None], across[:, None, :]]
    return window.get(mode="promise_in_bounds")


def color_jitter(
    draws: jax.Array,
    images: jax.Array,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
) -> jax.Array:
    """Change the colours of each image at random; DARTS trains ImageNet with 0.4, 0.4, 0.4, 0.2.

    Factors and formulas are those of torchvision's ColorJitter. It also draws the order of the
    four; the order here is fixed, our choice, because on the device each image would compute all
    orders.

    Args:
        draws: f32[b, COLOR_DRAWS] in [0, 1).
        images: uint8[b, h, w, c], or f32 in [0, 255]; c is 1 or 3.
        brightness: static; factors are uniform within so much of 1, and at least 0.
        contrast: likewise.
        saturation: likewise; no effect on grayscale.
        hue: static; shifts are uniform within so much of 0, where 1 is the whole circle of colours;
            at most 1/2. No effect on grayscale.

    Returns:
        f32[b, h, w, c] in [0, 255], not rounded, as `normalise` takes it.
    """
    factors = []
    for column, spread in enumerate((brightness, contrast, saturation)):
        low = max(0.0, 1 - spread)
        factors.append(low + (1 + spread - low) * draws[:, column])
    shift = hue * (2 * draws[:, 3] - 1)
    pixels = images.astype(jnp.float32)
    if brightness:
        pixels = adjust_brightness(pixels, factors[0])
    if contrast:
        pixels = adjust_contrast(pixels, factors[1])
    if saturation and images.shape[-1] == 3:
        pixels = adjust_saturation(pixels, factors[2])
    if hue and images.shape[-1] == 3:
        pixels = shift_hue(pixels, shift)
    return pixels


# The library dm-pix has functions of these names. Its brightness adds instead of multiplying, its
# contrast keeps each channel's own mean, its saturation is that of HSV (all as TensorFlow, not as
# torchvision), and its saturation and hue fail under strict dtype promotion (0.4.5).


def adjust_brightness(images: jax.Array, factors: jax.Array) -> jax.Array:
    """Scale f32[b, h, w, c] in [0, 255] by f32[b], within the range."""
    return _blend(images, jnp.zeros((1, 1, 1, 1), jnp.float32), factors)


def adjust_contrast(images: jax.Array, factors: jax.Array) -> jax.Array:
    """Scale the distance of f32[b, h, w, c] to each image's mean gray by f32[b]."""
    return _blend(images, jnp.mean(_gray(images), axis=(1, 2, 3), keepdims=True), factors)


def adjust_saturation(images: jax.Array, factors: jax.Array) -> jax.Array:
    """Scale the distance of f32[b, h, w, 3] to each pixel's gray by f32[b]."""
    return _blend(images, _gray(images), factors)


def shift_hue(images: jax.Array, shifts: jax.Array) -> jax.Array:
    """Turn the hue of f32[b, h, w, 3] by f32[b], where 1 is the whole circle; value is kept."""
    red, green, blue = (images[..., channel] for channel in range(3))
    value = jnp.max(images, axis=-1)
    chroma = value - jnp.min(images, axis=-1)
    divisor = jnp.where(chroma > 0, chroma, 1)
    # In sixths of the circle: red is 0, green 2, blue 4. Not by `value == red`: XLA may compute the
    # images twice, rounded in two ways, and then no channel would be the largest.
    hue = jnp.where(
        (red >= green) & (red >= blue),
        (green - blue) / divisor,
        jnp.where(green >= blue, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    hue = hue + 6 * shifts[:, None, None]
    channels = []
    for offset in (5.0, 3.0, 1.0):
        place = jnp.mod(hue + offset, 6)
        channels.append(value - chroma * jnp.clip(jnp.minimum(place, 4 - place), 0, 1))
    return jnp.stack(channels, axis=-1)


def _gray(images: jax.Array) -> jax.Array:
    """Return the luma of ITU-R 601, which Pillow's mode L has: f32[b, h, w, 1]."""
    if images.shape[-1] == 1:
        return images
    weights = jnp.asarray([0.299, 0.587, 0.114], jnp.float32).reshape(1, 1, 1, 3)
    return jnp.sum(images * weights, axis=-1, keepdims=True)


def _blend(images: jax.Array, others: jax.Array, factors: jax.Array) -> jax.Array:
    """Extrapolate from `others` through `images`, one factor an image, within [0, 255]."""
    return jnp.clip(others + factors[:, None, None, None] * (images - others), 0, 255)


def cutout(draws: jax.Array, images: jax.Array, size: int) -> jax.Array:
    """Set a square around a random pixel of each image to zero (DeVries and Taylor 2017).

    The square's centre is uniform over the image, so it may lie partly outside, as in DARTS, which
    also cuts after normalising: zero is the mean colour.

    Args:
        draws: f32[b, CUT_DRAWS] in [0, 1).
        images: f32[b, h, w, c], normalised.
        size: side of the square, static; 0 cuts nothing.

    Returns:
        f32[b, h, w, c].
    """
    if not size:
        return images
    _, height, width, _ = images.shape
    first_row = _whole(draws[:, 0], height) - size // 2
    first_column = _whole(draws[:, 1], width) - size // 2

    def inside(first: jax.Array, length: int) -> jax.Array:
        places = jnp.arange(length, dtype=jnp.int32)[None]
        return (places >= first[:, None]) & (places < first[:, None] + size)

    cut = inside(first_row, height)[:, :, None] & inside(first_column, width)[:, None, :]
    return jnp.where(cut[..., None], 0, images)


def normalise(images: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Scale pixels to [0, 1], then centre and scale each channel.

    Args:
        images: uint8[..., c], or f32 in [0, 255].
        mean: f32[c], of pixels in [0, 1].
        std: f32[c], likewise; positive (see `datasets.channel_statistics`).

    Returns:
        f32[..., c].
    """
    channelwise = (1,) * (images.ndim - 1) + (-1,)
    mean = jnp.asarray(mean, jnp.float32).reshape(channelwise)
    std = jnp.asarray(std, jnp.float32).reshape(channelwise)
    return (images.astype(jnp.float32) / 255 - mean) / std
