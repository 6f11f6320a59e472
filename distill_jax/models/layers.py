"""The layers that every family shares: one convolution, one BatchNorm, pools, a classifier.

Images and feature maps are NHWC, kernels HWIO. Parameters and statistics are float32 whatever the
computation's type is. Modules are named after the entries of the PyTorch state dict that they hold,
so that the path of a leaf joined by dots is its PyTorch name (`interop.torch_weights`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax

CPU_CHUNK = 16  # images whose maps fit a CPU's cache, where some are looked at at a time


class Mode(NamedTuple):
    """How a network is run: what the layers need to know besides their inputs."""

    train: bool = False
    axis_name: str | None = None  # devices over which BatchNorm shares its statistics
    dtype: Any = jnp.float32


class Outputs(NamedTuple):
    """All that a network shows; what a caller does not use, XLA does not compute.

    Args:
      logits: (B, C) float32.
      feature: (B, F), the vector before the classifier.
      stages: the NHWC feature map at the end of each stage.
      branches: outputs of the student branches of an evolving network, deepest first.
    """

    logits: Array
    feature: Array
    stages: tuple[Array, ...]
    branches: tuple[Outputs, ...] = ()


def per_channel(vector: Array, x: Array) -> Array:
    """`vector` (C,) shaped to act on the last axis of `x` (..., C)."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def at_least_float32(x: Array) -> Array:
    """Half precision widened to float32; float32 and float64 as they are."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(±1/√fan_in)
he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # N(0, 2/(k² out))


class Init(NamedTuple):
    """How a family draws its fresh weights; None is PyTorch's default for a bias."""

    conv: nn.initializers.Initializer = torch_uniform
    conv_bias: nn.initializers.Initializer | None = None
    linear: nn.initializers.Initializer = torch_uniform
    linear_bias: nn.initializers.Initializer | None = None


TORCH = Init()
HE = Init(conv=he_fan_out)
HE_VGG = Init(
    he_fan_out, nn.initializers.zeros, nn.initializers.normal(0.01), nn.initializers.zeros
)


def _bias_uniform(fan_in: int) -> nn.initializers.Initializer:
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


# ------------------------------------------------------------------------------------ convolution
def conv2d(x: Array, kernel: Array, stride: int = 1, padding: int = 0, groups: int = 1) -> Array:
    """2-D cross-correlation, x (B, H, W, I) and kernel (k, k, I/groups, O) -> (B, H', W', O).

    On the CPU its gradient is written as two forward convolutions: XLA's own falls back to a naive
    loop inside `while` and `cond`, 20 to 90 times slower.
    """
    if groups == 1 and jax.default_backend() == "cpu":
        if not padding and kernel.shape[0] in (1, stride):
            return _unfused(_conv_patches(x, kernel, stride))
        return _conv_own_vjp(x, kernel, stride, padding)
    return _conv(x, kernel, stride, padding, groups)


def _conv(x: Array, kernel: Array, stride: int, padding: int, groups: int = 1) -> Array:
    k, inputs, outputs = kernel.shape[1:]
    few = k > 1 and inputs <= 16 and outputs <= 32  # too few to fill a CPU's vectors
    if stride == 1 and groups == 1 and few and jax.default_backend() == "cpu":
        return _conv_pixels(x, kernel, padding, pixels=4 if inputs <= 4 and outputs <= 16 else 2)
    y = lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return _unfused(y)


def _conv_patches(x: Array, kernel: Array, stride: int) -> Array:
    """A convolution whose patches do not overlap, as one product: its gradients are products too.

    TESKD's branches consist of these: its training step on ResNet-8 takes 0.7 of the time.
    """
    k, _, inputs, outputs = kernel.shape
    if k == 1:
        return x[:, ::stride, ::stride] @ kernel[0, 0]
    b, h, w = x.shape[0], x.shape[1] // k, x.shape[2] // k
    patches = x[:, : h * k, : w * k].reshape(b, h, k, w, k, inputs).swapaxes(2, 3)
    return patches.reshape(b, h, w, k * k * inputs) @ kernel.reshape(-1, outputs)


def _conv_pixels(x: Array, kernel: Array, padding: int, pixels: int) -> Array:
    """A convolution of stride 1 that gives neighbouring `pixels` of a row at once.

    As a kernel wider by pixels - 1, of as many times the outputs, at that stride along the row:
    more products, in matrices of a better shape. Frozen plain CNN 4 takes 0.65 of the time,
    ResNet-56 0.8, 16 channels at 32×32 alone 0.64.
    """
    k, inputs, outputs = kernel.shape[1:]
    width = x.shape[2] + 2 * padding - k + 1
    over = -width % pixels  # pixels computed beyond the right edge, and cut off
    places = [(j, pixels - 1 - j) for j in range(pixels)]
    shifted = [jnp.pad(kernel, ((0, 0), place, (0, 0), (0, 0))) for place in places]
    wide = jnp.stack(shifted, 3).reshape(-1, k + pixels - 1, inputs, pixels * outputs)
    y = lax.conv_general_dilated(
        x,
        wide,
        (1, pixels),
        [(padding, padding), (padding, padding + over)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    y = y.reshape(*y.shape[:2], -1, outputs)
    return _unfused(y[:, :, :width])


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
    pads_x, pads_w = [], []
    for size, k, out in zip(x.shape[1:3], kernel.shape[:2], g.shape[1:3], strict=True):
        reach = (out - 1) * stride + 1  # extent of the output's gradient spread by the stride
        pads_x.append((k - 1 - padding, size - reach + padding))
        pads_w.append((padding, k - 1 + reach - size - padding))
    turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    if stride == 1:
        dx = _conv(g, turned, 1, kernel.shape[0] - 1 - padding)
    else:
        dx = lax.conv_general_dilated(
            g,
            turned,
            (1, 1),
            pads_x,
            lhs_dilation=(stride, stride),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def dw_of(x, g):
        return lax.conv_general_dilated(
            x.transpose(3, 1, 2, 0),  # channels as batch, the batch as channels
            g.transpose(1, 2, 0, 3),
            (1, 1),
            pads_w,
            rhs_dilation=(stride, stride),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ).transpose(1, 2, 0, 3)

    return _unfused(dx), _unfused(_sum_over_chunks(dw_of, x, g))


def _sum_over_chunks(function: Callable[[Array, Array], Array], x: Array, g: Array) -> Array:
    """function(x, g), a sum over the batch, some images at a time: 0.4 to 0.8 of the time."""
    parts, rest = divmod(len(x), CPU_CHUNK)
    if rest or parts < 2 or x.dtype.itemsize < 4:  # half precision is to be summed at once
        return function(x, g)
    xs, gs = (a.reshape(parts, CPU_CHUNK, *a.shape[1:]) for a in (x, g))
    whole = jax.eval_shape(function, x, g)
    zeros = jnp.zeros(whole.shape, whole.dtype)
    return lax.fori_loop(0, parts, lambda i, total: total + function(xs[i], gs[i]), zeros)


_conv_own_vjp.defvjp(_conv_forward, _conv_backward)


class Conv(nn.Module):
    """Convolution with PyTorch's default initialisation, or the given one for its kernel."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: int | None = None  # None: "same" for odd kernels at stride 1
    use_bias: bool = True
    groups: int = 1
    kernel_init: nn.initializers.Initializer = torch_uniform
    bias_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(
        self, x: Array, mode: Mode, scale: Array | None = None, shift: Array | None = None
    ) -> Array:
        """x (B, H, W, I) -> (B, H', W', features); `scale` and `shift` are folded into it."""
        k, inputs = self.kernel_size, x.shape[-1] // self.groups
        padding = k // 2 if self.padding is None else self.padding
        kernel = self.param("kernel", self.kernel_init, (k, k, inputs, self.features))
        bias = None
        if self.use_bias:
            bias_init = self.bias_init or _bias_uniform(k * k * inputs)
            bias = self.param("bias", bias_init, (self.features,))
        if scale is not None and shift is not None:
            kernel = kernel * per_channel(scale, kernel)
            bias = shift if bias is None else bias * scale + shift
        y = conv2d(
            x.astype(mode.dtype), kernel.astype(mode.dtype), self.stride, padding, self.groups
        )
        return y if bias is None else y + per_channel(bias.astype(mode.dtype), y)


# -------------------------------------------------------------------------------------- BatchNorm
class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with PyTorch's conventions.

    The batch is normalised by its biased variance, the running variance takes the unbiased one,
    running = 0.9 running + 0.1 batch. With `mode.axis_name` the statistics are those of the whole
    batch over all devices.
    """

    features: int
    momentum: float = 0.1
    epsilon: float = 1e-5

    def setup(self) -> None:
        shape = (self.features,)
        self.scale = self.param("scale", nn.initializers.ones, shape)
        self.bias = self.param("bias", nn.initializers.zeros, shape)
        self.mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        self.var = self.variable("batch_stats", "var", jnp.ones, shape)

    def running_affine(self) -> tuple[Array, Array]:
        """(scale, shift) such that x·scale + shift normalises by the running statistics."""
        scale = self.scale * lax.rsqrt(self.var.value + self.epsilon)
        return scale, self.bias - self.mean.value * scale

    def __call__(self, x: Array, mode: Mode) -> Array:
        """x (..., features) -> the same shape and type."""
        if not mode.train:
            scale, shift = self.running_affine()
            return (x * per_channel(scale, x) + per_channel(shift, x)).astype(x.dtype)
        wide = at_least_float32(x)
        axes = tuple(range(x.ndim - 1))

        def mean_over_batch(values):
            local = jnp.mean(values, axes)
            whole = local if mode.axis_name is None else lax.pmean(local, mode.axis_name)
            return per_channel(whole, x)

        mean = mean_over_batch(wide)
        centred = wide - mean
        var = mean_over_batch(jnp.square(centred))
        if not self.is_initializing():
            devices = 1 if mode.axis_name is None else lax.axis_size(mode.axis_name)
            n = devices * (x.size // self.features)
            unbiased = var * (n / max(n - 1, 1))
            self.mean.value += self.momentum * (mean.ravel() - self.mean.value)
            self.var.value += self.momentum * (unbiased.ravel() - self.var.value)
        scale = per_channel(self.scale, x) * lax.rsqrt(var + self.epsilon)
        return (centred * scale + per_channel(self.bias, x)).astype(x.dtype)


def conv_norm(
    x: Array,
    mode: Mode,
    conv: Conv,
    norm: str,
    between: Callable[[Array], Array] = lambda y: y,
) -> Array:
    """Convolution and the BatchNorm named `norm`, as one convolution outside training.

    With running statistics the normalisation is folded into kernel and bias: frozen teachers and
    evaluation pay for no BatchNorm. `between` stands between the two; folding is exact as long as
    it is linear over space and keeps constants, as a resize does.
    """
    batch_norm = BatchNorm(conv.features, name=norm)
    if mode.train:
        return batch_norm(between(conv(x, mode)), mode)
    return between(conv(x, mode, *batch_norm.running_affine()))


# ------------------------------------------------------------------------------- pools, classifier
def max_pool(x: Array) -> Array:
    """2×2 max pool with stride 2, odd edges dropped; as a reshape, whose gradient is cheap."""
    b, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))


def max_pool_overlapping(x: Array) -> Array:
    """3×3 max pool with stride 2 and padding 1, the stem's of ImageNet ResNets."""
    return nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])


def resize_bilinear(x: Array, size: tuple[int, int]) -> Array:
    """Bilinear resize whose corner pixels stay corner pixels, (B, h, w, C) -> (B, *size, C).

    Output pixel o lies at o·(in - 1)/(out - 1) in the input. Two products with constant matrices,
    whose gradients are products too; their rows sum to one, for which they stay in float32.
    """
    y = at_least_float32(x)
    for axis, product in ((1, "ah,bhwc->bawc"), (2, "aw,bhwc->bhac")):
        if y.shape[axis] != size[axis - 1]:
            weights = jnp.asarray(_corner_weights(y.shape[axis], size[axis - 1]), y.dtype)
            y = jnp.einsum(product, weights, y, precision=lax.Precision.HIGHEST)
    return y.astype(x.dtype)


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


class Linear(nn.Module):
    """Fully connected layer with PyTorch's default initialisation, or the given one.

    Computed in float32 at least, since its output is the logits in every network but a few.
    """

    features: int
    kernel_init: nn.initializers.Initializer = torch_uniform
    bias_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(B, I) -> (B, features)."""
        inputs = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (inputs, self.features))
        bias = self.param("bias", self.bias_init or _bias_uniform(inputs), (self.features,))
        y = at_least_float32(x) @ kernel
        return y + per_channel(bias, y)
