"""One convolution, in the form that suits the backend and the shapes.

On a GPU or TPU it is XLA's. On the CPU, XLA's gradient is slow inside loops and its forward pass
where channels are few; here these are written as the sums and products that it does well, each with
the share of the time that it takes (float32 on one core).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

CPU_CHUNK = 16  # images whose maps fit a CPU's cache, where some are looked at at a time


class Form(NamedTuple):
    """A way to compute a convolution: what it makes of the kernel, and of images with that.

    A network that is not trained makes it of its kernels once, not for every few images.
    """

    prepare: Callable[[Array], Array]
    run: Callable[[Array, Array], Array]
    own_vjp: bool = False  # its gradient is better written than derived


def conv2d(x: Array, kernel: Array, stride: int = 1, padding: int = 0, groups: int = 1) -> Array:
    """2-D cross-correlation, x (B, H, W, I) and kernel (k, k, I/groups, O) -> (B, H', W', O).

    On the CPU its gradient is written as two forward convolutions: XLA's own falls back to a naive
    loop inside `while` and `cond`, 20 to 90 times slower.
    """
    return _conv2d(x, kernel, stride, padding, groups, jax.default_backend())


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))  # traced once for all layers of a shape
def _conv2d(x, kernel, stride, padding, groups, backend):
    form = _form(x.shape, kernel.shape, x.dtype, stride, padding, groups, backend)
    if form.own_vjp:
        return _conv_own_vjp(x, kernel, stride, padding)
    return form.run(x, form.prepare(kernel))


def form_of(
    shape: tuple[int, ...],
    kernel_shape: tuple[int, ...],
    dtype: Any,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> Form:
    """How `conv2d` computes it for images of `shape` (B, H, W, I); `run` is traced once a shape."""
    form = _form(
        shape, kernel_shape, jnp.dtype(dtype), stride, padding, groups, jax.default_backend()
    )
    return form._replace(run=_traced_once(form.run))


@functools.cache
def _form(shape, kernel_shape, dtype, stride, padding, groups, backend) -> Form:
    def form(run: Callable, prepare: Callable = lambda kernel: kernel, **options) -> Form:
        return Form(prepare, lambda x, prepared: _unfused(run(x, prepared)), **options)

    def by_lax(x, kernel):
        return _lax_conv(x, kernel, (stride, stride), [(padding, padding)] * 2, groups=groups)

    k, outputs = kernel_shape[0], kernel_shape[-1]
    if groups > 1 or backend != "cpu":
        return form(by_lax)
    if not padding and k in (1, stride):
        return form(functools.partial(_conv_patches, k=k, stride=stride), _patch_matrix)
    if max(shape[1:3]) < k:
        outs = tuple((size + 2 * padding - k) // stride + 1 for size in shape[1:3])
        matrix = functools.partial(
            _small_matrix, sizes=shape[1:3], outs=outs, stride=stride, padding=padding
        )
        return form(functools.partial(_conv_small, outs=outs), matrix)
    if stride == 1 and _few_channels(kernel_shape):
        pixels = 4 if kernel_shape[2] <= 4 and outputs <= 16 else 2
        run = functools.partial(_conv_pixels, k=k, padding=padding, pixels=pixels)
        return form(run, functools.partial(_wide_kernel, pixels=pixels), own_vjp=True)
    if stride == 1 and _suits_winograd(shape, kernel_shape, dtype, padding):
        return form(_conv_winograd, _winograd_taps, own_vjp=True)
    return form(by_lax, own_vjp=True)


_traced_once = functools.cache(jax.jit)


def _conv(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    form = _form(x.shape, kernel.shape, x.dtype, stride, padding, 1, "cpu")
    return form.run(x, form.prepare(kernel))


def _lax_conv(x, kernel, strides, pads, dilation=(1, 1), groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pads,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _patch_matrix(kernel: Array) -> Array:
    return kernel.reshape(-1, kernel.shape[-1])


def _conv_patches(x: Array, matrix: Array, k: int, stride: int) -> Array:
    """A convolution whose patches do not overlap, as one product: its gradients are products too.

    TESKD's branches consist of these: its training step on ResNet-8 takes 0.7 of the time.
    """
    if k == 1:
        patches = x[:, ::stride, ::stride]
        b, h, w = patches.shape[:3]
    else:
        b, h, w = x.shape[0], x.shape[1] // k, x.shape[2] // k
        patches = x[:, : h * k, : w * k].reshape(b, h, k, w, k, -1).swapaxes(2, 3)
    return (patches.reshape(-1, len(matrix)) @ matrix).reshape(b, h, w, -1)


def _small_matrix(kernel: Array, sizes, outs, stride: int, padding: int) -> Array:
    """(pixels of `sizes`·I, pixels of `outs`·O): which tap joins which two, zeros where none."""
    k = kernel.shape[0]

    def joining(pixel, out):
        taps = [i + padding - stride * j for i, j in zip(pixel, out, strict=True)]
        there = all(0 <= tap < k for tap in taps)
        return kernel[tuple(taps)] if there else jnp.zeros_like(kernel[0, 0])

    pairs = [[joining(pixel, out) for out in np.ndindex(*outs)] for pixel in np.ndindex(*sizes)]
    return jnp.block(pairs)


def _conv_small(x: Array, matrix: Array, outs: tuple[int, int]) -> Array:
    """A convolution of maps smaller than the kernel, as one product over pixels and channels.

    XLA has no fast form for these: the last layers of VGG-16 at 32×32 take 0.02 of the time.
    """
    return (x.reshape(len(x), -1) @ matrix).reshape(len(x), *outs, -1)


def _few_channels(kernel_shape: tuple[int, ...]) -> bool:
    """Too few to fill a CPU's vectors."""
    k, inputs, outputs = kernel_shape[1:]
    return k > 1 and inputs <= 16 and outputs <= 32 and inputs * outputs <= 256


def _wide_kernel(kernel: Array, pixels: int) -> Array:
    """(k, k + pixels - 1, I, pixels·O): the kernel at each of neighbouring pixels of a row."""
    places = [(j, pixels - 1 - j) for j in range(pixels)]
    shifted = [jnp.pad(kernel, ((0, 0), place, (0, 0), (0, 0))) for place in places]
    wide = jnp.stack(shifted, 3)
    return wide.reshape(*wide.shape[:3], -1)


def _conv_pixels(x: Array, wide: Array, k: int, padding: int, pixels: int) -> Array:
    """A convolution of stride 1 that gives neighbouring `pixels` of a row at once.

    As a kernel wider by pixels - 1, of as many times the outputs, at that stride along the row:
    more products, in matrices of a better shape. Frozen plain CNN 4 takes 0.65 of the time,
    ResNet-56 0.8, 16 channels at 32×32 alone 0.64.
    """
    width = x.shape[2] + 2 * padding - k + 1
    over = -width % pixels  # pixels computed beyond the right edge, and cut off
    y = _lax_conv(x, wide, (1, pixels), [(padding, padding), (padding, padding + over)])
    return y.reshape(*y.shape[:2], width + over, -1)[:, :, :width]


def _suits_winograd(shape, kernel_shape, dtype, padding: int) -> bool:
    """Where its products are of matrices tall enough, and the maps stay in the cache."""
    b, h, w, inputs = shape
    few = min(kernel_shape[2:]) < 32 or 2 * b * h * w < inputs
    large = math.prod(shape) > CPU_CHUNK * 32 * 32 * 32
    return kernel_shape[0] == 3 and padding == 1 and dtype.itemsize == 4 and not (few or large)


def _winograd_taps(kernel: Array) -> Array:
    """(16, I, O): the kernel as its products with the tiles of `_conv_winograd` take it."""

    def filters(w0, w1, w2):
        return jnp.stack([w0, 0.5 * (w0 + w1 + w2), 0.5 * (w0 - w1 + w2), w2])

    taps = filters(*filters(*kernel).swapaxes(0, 1))  # (4, 4, I, O): of columns, of rows
    return taps.reshape(16, *kernel.shape[2:])


def _conv_winograd(x: Array, taps: Array) -> Array:
    """A 3×3 convolution of stride 1 and padding 1, by Winograd's minimal filtering F(2×2, 3×3).

    Each 2×2 tile of the output takes 16 products where the sum takes 36: 0.55 to 0.75 of the time
    for 32 to 256 channels, within 1e-5 of the sum (Lavin and Gray 2015, 1509.09308).
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


def _unfused(y: Array) -> Array:
    """`y`, kept out of the CPU's fusions in half precision.

    What jaxlib 0.11 makes of a bfloat16 convolution and the operations around it reads memory that
    nothing has written: NaN here and there, other ones each time.
    """
    if y.dtype.itemsize < 4 and jax.default_backend() == "cpu":
        return lax.optimization_barrier(y)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv_own_vjp(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    return _conv(x, kernel, stride, padding)


def _conv_forward(x, kernel, stride, padding):
    return _conv(x, kernel, stride, padding), (x, kernel)


def _conv_backward(stride, padding, residuals, g):
    x, kernel = residuals
    return _conv_dx(g, kernel, stride, padding, x.shape), _conv_dw(x, g, kernel, stride, padding)


def _conv_dx(g: Array, kernel: Array, stride: int, padding: int, shape: tuple[int, ...]) -> Array:
    """The gradient at the input (B, H, W, I), a convolution of that at the output.

    Pixels that lie alike between the strides are told by the same taps: the output's gradient is
    convolved once, with the taps of all stride² of them as more channels. With the gradient spread
    out by zeros instead, three of four products would be by zero.
    """
    k, inputs, outputs = kernel.shape[1:]
    if stride == 1:
        return _conv(g, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), 1, k - 1 - padding)
    b, height, width, _ = shape
    phase, first = np.arange(stride), -((k - 1 - padding) // stride)
    offsets = np.arange(first, (stride - 1 + padding) // stride + 1)
    taps = phase + padding - stride * offsets[:, None]  # (offsets, phases)
    taps = np.where((taps >= 0) & (taps < k), taps, k)  # k: a tap that is not there
    there = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
    wide = there[taps][:, :, taps].transpose(0, 2, 5, 1, 3, 4)
    rows, columns = -(-height // stride), -(-width // stride)
    pads = [
        (-first, int(offsets[-1]) + size - out)
        for size, out in zip((rows, columns), g.shape[1:3], strict=True)
    ]
    y = _lax_conv(g, wide.reshape(*wide.shape[:3], -1), (1, 1), pads)
    y = y.reshape(b, rows, columns, stride, stride, inputs).swapaxes(2, 3)
    return _unfused(y.reshape(b, rows * stride, columns * stride, inputs)[:, :height, :width])


def _conv_dw(x: Array, g: Array, kernel: Array, stride: int, padding: int) -> Array:
    """The gradient at the kernel (k, k, I, O), a convolution over the batch as channels.

    A few images at a time (0.4 to 0.9 of the time), and of few channels by pairs of pixels, as
    `_conv_pixels` gives them (0.7 of the time).
    """
    k, inputs, outputs = kernel.shape[1:]
    pixels = 2 if stride == 1 and _few_channels(kernel.shape) and g.shape[2] % 2 == 0 else 1
    strides, sizes = (stride, stride * pixels), (k, k + pixels - 1)
    outs = g.shape[1], g.shape[2] // pixels
    pads = []
    for size, taps, out, step in zip(x.shape[1:3], sizes, outs, strides, strict=True):
        pads.append((padding, taps - 1 + (out - 1) * step + 1 - size - padding))

    def dw_of(x, g):
        paired = g.reshape(len(g), *outs, pixels * outputs)
        x, g = x.transpose(3, 1, 2, 0), paired.transpose(1, 2, 0, 3)  # batch as channels
        return _lax_conv(x, g, (1, 1), pads, dilation=strides).transpose(1, 2, 0, 3)

    wide = _sum_over_chunks(dw_of, x, g).reshape(*sizes, inputs, pixels, outputs)
    return _unfused(jnp.stack([wide[:, j : j + k, :, j] for j in range(pixels)]).sum(0))


def _sum_over_chunks(function: Callable[[Array, Array], Array], x: Array, g: Array) -> Array:
    """function(x, g), a sum over the batch, computed some images at a time."""
    size = CPU_CHUNK // 2
    parts, rest = divmod(len(x), size)
    if rest or parts < 2 or x.dtype.itemsize < 4:  # half precision is to be summed at once
        return function(x, g)

    def add(i, total):
        # Slices, not rows of a reshaped array: that is made once more by what computes the array.
        part = [lax.dynamic_slice_in_dim(array, i * size, size) for array in (x, g)]
        return total + function(*part)

    whole = jax.eval_shape(function, x, g)
    return lax.fori_loop(0, parts, add, jnp.zeros(whole.shape, whole.dtype))


_conv_own_vjp.defvjp(_conv_forward, _conv_backward)
