"""Changes to images inside the compiled step: pure functions of (keys, images)."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from distill_jax.data.checks import DataError, integer


def normalise(
    images: jax.Array, mean: Sequence[float] | jax.Array, std: Sequence[float] | jax.Array
) -> jax.Array:
    """(images / 255 - mean) / std: uint8 (B, H, W, C) to float32 of the same shape.

    `mean` and `std` hold C values in units of pixel/255; DataError for another number of them.
    """
    return standardise(images.astype(jnp.float32) / 255, mean, std)


def to_unit(images: jax.Array, value_range: tuple[float, float]) -> jax.Array:
    """Float images whose values are in [low, high], scaled to [0, 1]."""
    low, high = value_range
    return (images - low) / (high - low)


def standardise(
    unit: jax.Array, mean: Sequence[float] | jax.Array, std: Sequence[float] | jax.Array
) -> jax.Array:
    """(unit - mean) / std of images in [0, 1], float32; see `normalise`."""
    average, deviation = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    channels = unit.shape[-1]
    for what, values in (("mean", average), ("std", deviation)):
        if values.shape != (channels,):
            raise DataError(f"{what} has shape {values.shape}: expected ({channels},)")
    # Explicit axes: ranks match, so this also works where rank promotion is an error.
    average, deviation = (values.reshape(1, 1, 1, channels) for values in (average, deviation))
    return (unit - average) / deviation


def unchanged(keys: jax.Array, images: jax.Array) -> jax.Array:
    """The images as they are."""
    del keys
    return images


def crop_flip(
    keys: jax.Array, images: jax.Array, *, padding: int = 4, flip: bool = True
) -> jax.Array:
    """Random crop out of a zero-padded image, then a mirror image half of the time.

    keys: typed, (B,), one an example; images: uint8 (B, H, W, C), and so is the result. The crop's
    corner is uniform over (2 * padding + 1)^2 places. An example's result depends on its own key
    alone (with JAX's default threefry keys), not on its neighbours or on how the batch is sharded.
    Padding is 0 before normalisation (black), as in the usual CIFAR recipe.
    DataError: padding below 0, or another number of keys than of images.
    """
    padding = integer("padding", padding, 0)
    if keys.shape != images.shape[:1]:
        raise DataError(
            f"keys have shape {keys.shape}: expected ({images.shape[0]},), one an image"
        )
    return jax.vmap(functools.partial(_crop_flip_one, padding=padding, flip=flip))(keys, images)


def _crop_flip_one(key: jax.Array, image: jax.Array, *, padding: int, flip: bool) -> jax.Array:
    crop_key, flip_key = jax.random.split(key)
    top, left = jax.random.randint(crop_key, (2,), 0, 2 * padding + 1)
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    crop = jax.lax.dynamic_slice(padded, (top, left, jnp.zeros_like(top)), image.shape)
    if not flip:
        return crop
    return jnp.where(jax.random.bernoulli(flip_key), crop[:, ::-1], crop)


def inception_crop(keys: jax.Array, images: jax.Array) -> jax.Array:
    """A random part of the image resized to all of it, then a mirror image half of the time.

    The part has 0.08 to 1 of the image's area and a ratio of 3/4 to 4/3: of ten draws the first
    that lies within the image, or what of the first does; resized bilinearly, with antialiasing.

    Args:
      keys: typed, (B,), one an example, on which alone its result depends.
      images: uint8 or floats (B, H, W, C).

    Returns:
      Floats of the same shape and units.

    References:
      Szegedy et al., Going Deeper with Convolutions, CVPR 2015; as Beyer et al., Knowledge
      Distillation: A Good Teacher Is Patient and Consistent, 2106.05237, have student and teacher
      see it alike.
    """
    return jax.vmap(_inception_crop_one)(keys, images)


def _inception_crop_one(key: jax.Array, image: jax.Array) -> jax.Array:
    size_key, ratio_key, place_key, flip_key = jax.random.split(key, 4)
    sides = jnp.array(image.shape[:2], jnp.float32)
    area = jnp.prod(sides) * jax.random.uniform(size_key, (10,), minval=0.08, maxval=1.0)
    log_ratio = jax.random.uniform(ratio_key, (10,), minval=-1.0, maxval=1.0) * math.log(4 / 3)
    ratio = jnp.exp(log_ratio)
    parts = jnp.sqrt(jnp.stack([area / ratio, area * ratio], 1))  # heights and widths
    first = jnp.argmax(jnp.all(parts <= sides[None], 1))
    part = jnp.minimum(parts[first], sides)
    corner = jax.random.uniform(place_key, (2,)) * (sides - part)
    scale = sides / part
    crop = jax.image.scale_and_translate(
        image.astype(jnp.float32), image.shape, (0, 1), scale, -corner * scale, "linear"
    )
    return jnp.where(jax.random.bernoulli(flip_key), crop[:, ::-1], crop)


AUGMENT: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "none": unchanged,
    "crop_flip": crop_flip,
    "flip": functools.partial(crop_flip, padding=0),
    "inception_crop": inception_crop,
}
