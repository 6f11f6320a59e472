"""Ways to compute a convolution that are faster on a CPU than XLA's own, for some shapes.

Each is a function of the images and of what another makes of the kernel, once.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from distill_jax.models.basics import at_least_float32, per_channel

CPU_CHUNK = 16  # images whose maps fit a CPU's cache, where some are looked at at a time


def lax_conv(x, kernel, strides, pads, dilation=(1, 1), groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pads,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def patch_matrix(kernel: Array) -> Array:
    return kernel.reshape(-1, kernel.shape[-1])


def conv_patches(x: Array, matrix: Array, k: int, stride: int) -> Array:
    """A convolution whose patches do not overlap, as one product: its gradients are products too.

    TESKD's branches consist of these.
    """
    if k == 1:
        patches = x[:, ::stride, ::stride]
        b, h, w = patches.shape[:3]
    else:
        b, h, w = x.shape[0], x.shape[1] // k, x.shape[2] // k
        patches = x[:, : h * k, : w * k].reshape(b, h, k, w, k, -1).swapaxes(2, 3)
    return (patches.reshape(-1, len(matrix)) @ matrix).reshape(b, h, w, -1)


def conv_depthwise(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    """A convolution of each channel by itself, kernel (k, k, 1, I), as a sum over the taps.

    XLA's own takes 10 to 100 times as long, and its gradient inside loops more than that.
    """
    k = len(kernel)
    padded = at_least_float32(jnp.pad(x, ((0, 0), *[(padding, padding)] * 2, (0, 0))))
    last = [stride * ((size - k) // stride) for size in padded.shape[1:3]]

    def product(i: int, j: int) -> Array:
        pixels = padded[:, i : i + last[0] + 1 : stride, j : j + last[1] + 1 : stride]
        return pixels * per_channel(kernel[i, j, 0], pixels)

    y = functools.reduce(jnp.add, (product(*tap) for tap in np.ndindex(k, k)))
    return y.astype(x.dtype)


def small_matrix(kernel: Array, sizes, outs, stride: int, padding: int) -> Array:
    """(pixels of `sizes`·I, pixels of `outs`·O): which tap joins which two, zeros where none."""
    k = kernel.shape[0]

    def joining(pixel, out):
        taps = [i + padding - stride * j for i, j in zip(pixel, out, strict=True)]
        there = all(0 <= tap < k for tap in taps)
        return kernel[tuple(taps)] if there else jnp.zeros_like(kernel[0, 0])

    pairs = [[joining(pixel, out) for out in np.ndindex(*outs)] for pixel in np.ndindex(*sizes)]
    return jnp.block(pairs)


def conv_small(x: Array, matrix: Array, outs: tuple[int, int]) -> Array:
    """A convolution of maps smaller than the kernel, as one product over pixels and channels.

    XLA has no fast form for these, such as the last layers of VGG-16 at 32×32.
    """
    return (x.reshape(len(x), -1) @ matrix).reshape(len(x), *outs, -1)


def few_channels(kernel_shape: tuple[int, ...]) -> bool:
    """Too few to fill a CPU's vectors."""
    k, inputs, outputs = kernel_shape[1:]
    return k > 1 and inputs <= 16 and outputs <= 32 and inputs * outputs <= 256


def wide_kernel(kernel: Array, pixels: int) -> Array:
    """(k, k + pixels - 1, I, pixels·O): the kernel at each of neighbouring pixels of a row."""
    places = [(j, pixels - 1 - j) for j in range(pixels)]
    shifted = [jnp.pad(kernel, ((0, 0), place, (0, 0), (0, 0))) for place in places]
    wide = jnp.stack(shifted, 3)
    return wide.reshape(*wide.shape[:3], -1)


def conv_pixels(x: Array, wide: Array, k: int, padding: int, pixels: int) -> Array:
    """A convolution of stride 1 that gives neighbouring `pixels` of a row at once.

    As a kernel wider by pixels - 1, of as many times the outputs, at that stride along the row:
    more products, in matrices of a better shape.
    """
    width = x.shape[2] + 2 * padding - k + 1
    over = -width % pixels  # pixels computed beyond the right edge, and cut off
    y = lax_conv(x, wide, (1, pixels), [(padding, padding), (padding, padding + over)])
    return y.reshape(*y.shape[:2], width + over, -1)[:, :, :width]


def suits_winograd(shape, kernel_shape, dtype, padding: int) -> bool:
    """Where its products are of matrices tall enough, and the maps stay in the cache."""
    b, h, w, inputs = shape
    few = min(kernel_shape[2:]) < 32 or 2 * b * h * w < inputs
    large = math.prod(shape) > CPU_CHUNK * 32 * 32 * 32
    return kernel_shape[0] == 3 and padding == 1 and dtype.itemsize == 4 and not (few or large)


def winograd_taps(kernel: Array) -> Array:
    """(16, I, O): the kernel as its products with the tiles of `conv_winograd` take it."""

    def filters(w0, w1, w2):
        return jnp.stack([w0, 0.5 * (w0 + w1 + w2), 0.5 * (w0 - w1 + w2), w2])

    taps = filters(*filters(*kernel).swapaxes(0, 1))  # (4, 4, I, O): of columns, of rows
    return taps.reshape(16, *kernel.shape[2:])


def conv_winograd(x: Array, taps: Array) -> Array:
    """A 3×3 convolution of stride 1 and padding 1, by Winograd's minimal filtering F(2×2, 3×3).

    Each 2×2 tile of the output takes 16 products where the sum takes 36,
    within 1e-5 of the sum (Lavin and Gray 2015, 1509.09308).
    """
    b, h, w, inputs = x.shape
    rows, columns = -(-h // 2), -(-w // 2)
    padded = jnp.pad(x, ((0, 0), (1, 1 + h % 2), (1, 1 + w % 2), (0, 0)))

    def input_tiles(d, axis, size):
        """d0 - d2, d1 + d2, d2 - d1, d1 - d3 of every second four along `axis`, as (4, size)."""
        starts = 2 * np.arange(size)
        first, second = (starts + np.array(i)[:, None] for i in ((0, 1, 2, 1), (2, 2, 1, 3)))
        signs = np.float32([-1, 1, -1, -1]).reshape((1,) * axis + (4,) + (1,) * (d.ndim - axis))
        # By index: what is stacked or concatenated, XLA computes one number at a time.
        return d.take(first, axis, mode="clip") + signs * d.take(second, axis, mode="clip")

    def output_tiles(m0, m1, m2, m3):
        return jnp.stack([m0 + m1 + m2, m1 - m2 - m3])

    tiles = input_tiles(input_tiles(padded, 1, rows), 3, columns)  # (B, 4, rows, 4, columns, I)
    tiles = tiles.transpose(3, 1, 0, 2, 4, 5).reshape(16, -1, inputs)
    products = (tiles @ taps).reshape(4, 4, b, rows, columns, -1)
    y = output_tiles(*output_tiles(*products).swapaxes(0, 1))  # (2, 2, ...): of rows, of columns
    y = y.transpose(2, 3, 0, 4, 1, 5)
    return y.reshape(b, 2 * rows, 2 * columns, -1)[:, :h, :w]
