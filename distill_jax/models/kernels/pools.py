"""What changes the size of feature maps and has no weights: pools, a resize, flattening."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax

from distill_jax.models.backend import backend
from distill_jax.models.basics import at_least_float32


def max_pool(x: Array) -> Array:
    """2×2 max pool with stride 2, odd edges dropped, (B, H, W, C) -> (B, H/2, W/2, C).

    Of equal pixels the first takes the gradient, as in PyTorch.
    """
    if backend() == "tpu":  # which has an operation for the gradient
        return nn.max_pool(x, (2, 2), (2, 2))
    return _max_pool_with_places(x)


@jax.custom_vjp
def _max_pool_with_places(x: Array) -> Array:
    """What is kept for the backward pass is which of the four was largest.

    The gradient of a reshape's maximum compares and counts.
    """
    return _max_pool(x)[0]


def _max_pool(x: Array) -> tuple[Array, Array]:
    """The maximum of each 2×2 window and its place in it, 0 to 3."""
    b, h, w, c = x.shape
    windows = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)
    left, right = windows[..., 0, :], windows[..., 1, :]
    rows, place = jnp.maximum(left, right), (left < right).astype(jnp.int32)
    top, bottom = rows[:, :, 0], rows[:, :, 1]
    place = jnp.where(top < bottom, 2 + place[:, :, 1], place[:, :, 0])
    return jnp.maximum(top, bottom), place


def _max_pool_forward(x):
    y, place = _max_pool(x)
    return y, (place, jnp.zeros((0, *x.shape[1:]), x.dtype))  # the second tells of the shape


def _max_pool_backward(residuals, g):
    place, like = residuals
    b, h, w, c = g.shape
    places = jnp.arange(4).reshape(1, 1, 2, 1, 2, 1)
    dx = jnp.where(place[:, :, None, :, None] == places, g[:, :, None, :, None], 0)
    dropped = [(0, 0), (0, like.shape[1] - 2 * h), (0, like.shape[2] - 2 * w), (0, 0)]
    return (jnp.pad(dx.reshape(b, 2 * h, 2 * w, c), dropped),)


_max_pool_with_places.defvjp(_max_pool_forward, _max_pool_backward)


def max_pool_overlapping(x: Array) -> Array:
    """3×3 max pool with stride 2 and padding 1, the stem's of ImageNet ResNets."""
    return nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])


def average_pool_overlapping(x: Array) -> Array:
    """3×3 average pool with stride 2 and padding 1, whose zeros count."""
    return nn.avg_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])


def resize_bilinear(x: Array, size: tuple[int, int]) -> Array:
    """Bilinear resize whose corner pixels stay corner pixels, (B, h, w, C) -> (B, *size, C).

    Output pixel o lies at o·(in - 1)/(out - 1) in the input. Two products with constant matrices,
    whose gradients are products too; their rows sum to one, for which they stay in float32. As a
    product for each image's row and for each image, so that XLA transposes nothing.
    """
    y, (b, h, w, c) = at_least_float32(x), x.shape

    def product(inputs, outputs, y):
        weights = jnp.asarray(_corner_weights(inputs, outputs), y.dtype)
        weights = jnp.broadcast_to(weights, (*y.shape[:-2], *weights.shape))
        return jnp.matmul(weights, y, precision=lax.Precision.HIGHEST)

    if w != size[1]:
        y = product(w, size[1], y)
    if h != size[0]:
        y = product(h, size[0], y.reshape(b, h, -1))
    return y.reshape(b, *size, c).astype(x.dtype)


@functools.cache
def _corner_weights(inputs: int, outputs: int) -> np.ndarray:
    """(outputs, inputs) float64 matrix of linear interpolation with aligned corners."""
    position = np.arange(outputs) * (inputs - 1) / max(outputs - 1, 1)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(inputs)))


def global_average_pool(x: Array) -> Array:
    """(B, H, W, C) -> (B, C)."""
    return jnp.mean(x, (1, 2))


def flatten_channels_first(x: Array) -> Array:
    """(B, H, W, C) -> (B, C·H·W), in the order in which PyTorch flattens its NCHW maps."""
    return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
