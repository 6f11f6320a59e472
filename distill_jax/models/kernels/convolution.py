"""One convolution, in the form that suits the backend and the shapes.

On a GPU or TPU it is XLA's. On the CPU, XLA's gradient is slow inside loops and its forward pass
where channels are few; here these are written as the sums and products that it does well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from distill_jax.models.backend import backend
from distill_jax.models.kernels import cpu_conv

FEW_GROUPS = 8  # as many convolutions are still compiled fast


class ConvAlgorithm(NamedTuple):
    """A way to compute a convolution: what it makes of the kernel, and of images with that.

    A network that is not trained makes it of its kernels once, not for every few images.
    """

    transform_kernel: Callable[[Array], Array]
    run: Callable[[Array, Array], Array]
    own_vjp: bool = False  # its gradient is better written than derived


def conv2d(x: Array, kernel: Array, stride: int = 1, padding: int = 0, groups: int = 1) -> Array:
    """2-D cross-correlation, x (B, H, W, I) and kernel (k, k, I/groups, O) -> (B, H', W', O).

    On the CPU its gradient is written as two forward convolutions: XLA's own falls back to a naive
    loop inside `while` and `cond`, 20 to 90 times slower.
    """
    return _conv2d(x, kernel, stride, padding, groups)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))  # traced once for all layers of a shape
def _conv2d(x, kernel, stride, padding, groups):
    algorithm = _algorithm(x.shape, kernel.shape, x.dtype, stride, padding, groups, backend())
    if algorithm.own_vjp:
        return _conv_own_vjp(x, kernel, stride, padding)
    return algorithm.run(x, algorithm.transform_kernel(kernel))


def algorithm_for(
    shape: tuple[int, ...],
    kernel_shape: tuple[int, ...],
    dtype: Any,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> ConvAlgorithm:
    """How `conv2d` computes it for images of `shape` (B, H, W, I); `run` is traced once a shape."""
    dtype = jnp.dtype(dtype)
    algorithm = _algorithm(shape, kernel_shape, dtype, stride, padding, groups, backend())
    return algorithm._replace(run=_traced_once(algorithm.run))


@functools.cache
def _algorithm(shape, kernel_shape, dtype, stride, padding, groups, platform) -> ConvAlgorithm:
    def algorithm(
        run: Callable, transform: Callable = lambda kernel: kernel, **options
    ) -> ConvAlgorithm:
        return ConvAlgorithm(transform, lambda x, kernel: _unfused(run(x, kernel)), **options)

    def by_lax(x, kernel):
        return cpu_conv.lax_conv(
            x, kernel, (stride, stride), [(padding, padding)] * 2, groups=groups
        )

    def by_group(x, kernel):
        pairs = zip(jnp.split(x, groups, -1), jnp.split(kernel, groups, -1), strict=True)
        return jnp.concatenate([conv2d(*pair, stride, padding) for pair in pairs], -1)

    k, outputs = kernel_shape[0], kernel_shape[-1]
    if platform != "cpu":
        return ConvAlgorithm(lambda kernel: kernel, by_lax)
    if groups > 1:
        if shape[-1] == groups == outputs:
            return algorithm(
                functools.partial(cpu_conv.conv_depthwise, stride=stride, padding=padding)
            )
        return algorithm(by_group if groups <= FEW_GROUPS else by_lax)
    if not padding and k in (1, stride):
        return algorithm(
            functools.partial(cpu_conv.conv_patches, k=k, stride=stride), cpu_conv.patch_matrix
        )
    if max(shape[1:3]) < k:
        outs = tuple((size + 2 * padding - k) // stride + 1 for size in shape[1:3])
        matrix = functools.partial(
            cpu_conv.small_matrix, sizes=shape[1:3], outs=outs, stride=stride, padding=padding
        )
        return algorithm(functools.partial(cpu_conv.conv_small, outs=outs), matrix)
    if stride == 1 and cpu_conv.few_channels(kernel_shape):
        pixels = 4 if kernel_shape[2] <= 4 and outputs <= 16 else 2
        run = functools.partial(cpu_conv.conv_pixels, k=k, padding=padding, pixels=pixels)
        return algorithm(run, functools.partial(cpu_conv.wide_kernel, pixels=pixels), own_vjp=True)
    if stride == 1 and cpu_conv.suits_winograd(shape, kernel_shape, dtype, padding):
        return algorithm(cpu_conv.conv_winograd, cpu_conv.winograd_taps, own_vjp=True)
    return algorithm(by_lax, own_vjp=True)


_traced_once = functools.cache(jax.jit)


def _conv(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    algorithm = _algorithm(x.shape, kernel.shape, x.dtype, stride, padding, 1, "cpu")
    return algorithm.run(x, algorithm.transform_kernel(kernel))


def _unfused(y: Array) -> Array:
    """`y` on a CPU, kept out of its fusions in half precision.

    What jaxlib 0.11 makes of a bfloat16 convolution and the operations around it reads memory that
    nothing has written: NaN here and there, other ones each time.
    """
    return lax.optimization_barrier(y) if y.dtype.itemsize < 4 else y


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

    Pixels that lie alike between the strides take the same taps: the output's gradient is
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
    y = cpu_conv.lax_conv(g, wide.reshape(*wide.shape[:3], -1), (1, 1), pads)
    y = y.reshape(b, rows, columns, stride, stride, inputs).swapaxes(2, 3)
    return _unfused(y.reshape(b, rows * stride, columns * stride, inputs)[:, :height, :width])


def _conv_dw(x: Array, g: Array, kernel: Array, stride: int, padding: int) -> Array:
    """The gradient at the kernel (k, k, I, O), a convolution over the batch as channels.

    A few images at a time, and of few channels by pairs of pixels as `cpu_conv.conv_pixels` has it.
    """
    k, inputs, outputs = kernel.shape[1:]
    pixels = 2 if stride == 1 and cpu_conv.few_channels(kernel.shape) and g.shape[2] % 2 == 0 else 1
    strides, sizes = (stride, stride * pixels), (k, k + pixels - 1)
    outs = g.shape[1], g.shape[2] // pixels
    pads = []
    for size, taps, out, step in zip(x.shape[1:3], sizes, outs, strides, strict=True):
        pads.append((padding, taps - 1 + (out - 1) * step + 1 - size - padding))

    def dw_of(x, g):
        paired = g.reshape(len(g), *outs, pixels * outputs)
        x, g = x.transpose(3, 1, 2, 0), paired.transpose(1, 2, 0, 3)  # batch as channels
        return cpu_conv.lax_conv(x, g, (1, 1), pads, dilation=strides).transpose(1, 2, 0, 3)

    wide = _sum_over_chunks(dw_of, x, g).reshape(*sizes, inputs, pixels, outputs)
    return _unfused(jnp.stack([wide[:, j : j + k, :, j] for j in range(pixels)]).sum(0))


def _sum_over_chunks(function: Callable[[Array, Array], Array], x: Array, g: Array) -> Array:
    """function(x, g), a sum over the batch, computed some images at a time."""
    size = cpu_conv.CPU_CHUNK // 2
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
