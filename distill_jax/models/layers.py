"""The layers that every family shares: one convolution, one BatchNorm, pools, a classifier.

Images and feature maps are NHWC, kernels HWIO. Parameters and statistics are float32 whatever the
computation's type is. Modules are named after the entries of the PyTorch state dict that they hold,
so that the path of a leaf joined by dots is its PyTorch name (`interop.torch_weights`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax

from distill_jax.models.convolution import CPU_CHUNK, conv2d, form_of

Variables = dict[str, Any]  # {"params", "batch_stats"} of a network
FROZEN = "frozen"  # the collection of what layers make of their weights for a frozen network


class Mode(NamedTuple):
    """How a network is run: what the layers need to know besides their inputs."""

    train: bool = False
    axis_name: str | None = None  # devices over which BatchNorm shares its statistics
    dtype: Any = jnp.float32
    freezing: bool = False  # make what a network that is not trained needs, and look at no image


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


def frozen(module: nn.Module, make: Callable[[], Any]) -> Any:
    """What `make` makes of the weights of `module`, or made of them when its network was frozen."""
    if module.has_variable(FROZEN, "made"):
        return module.get_variable(FROZEN, "made")
    made = make()
    if module.is_mutable_collection(FROZEN):
        module.put_variable(FROZEN, "made", made)
    return made


# ------------------------------------------------------------------------------------ convolution
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
        self, x: Array, mode: Mode, affine: Callable[[], tuple[Array, Array]] | None = None
    ) -> Array:
        """x (B, H, W, I) -> (B, H', W', features).

        What `affine` gives, a scale and a shift of each channel, is folded into it outside
        training.
        """
        k = self.kernel_size
        padding = k // 2 if self.padding is None else self.padding
        shape = (k, k, x.shape[-1] // self.groups, self.features)
        x = x.astype(mode.dtype)
        if mode.train:
            kernel, bias = self._weights(shape)
            if self.is_initializing():  # the weights alone are asked for
                return self._no_output(x, padding)
            y = conv2d(x, kernel.astype(x.dtype), self.stride, padding, self.groups)
        else:
            # However many images there are: weights are frozen before that is known.
            few = (CPU_CHUNK, *x.shape[1:])
            form = form_of(few, shape, x.dtype, self.stride, padding, self.groups)

            def fold():
                kernel, bias = self._weights(shape)
                if affine is not None:
                    scale, shift = affine()
                    kernel = kernel * per_channel(scale, kernel)
                    bias = shift if bias is None else bias * scale + shift
                return form.prepare(kernel.astype(x.dtype)), bias

            prepared, bias = frozen(self, fold)
            if mode.freezing:
                return self._no_output(x, padding)
            y = form.run(x, prepared)
        return y if bias is None else y + per_channel(bias.astype(y.dtype), y)

    def _weights(self, shape: tuple[int, ...]) -> tuple[Array, Array | None]:
        kernel = self.param("kernel", self.kernel_init, shape)
        if not self.use_bias:
            return kernel, None
        bias_init = self.bias_init or _bias_uniform(math.prod(shape[:-1]))
        return kernel, self.param("bias", bias_init, shape[-1:])

    def _no_output(self, x: Array, padding: int) -> Array:
        over = 2 * padding - self.kernel_size
        height, width = ((n + over) // self.stride + 1 for n in x.shape[1:3])
        return jnp.zeros((len(x), height, width, self.features), x.dtype)


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
        if self.has_variable(FROZEN, "made"):
            return
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
        if self.is_initializing():
            return x
        if not mode.train:
            scale, shift = frozen(self, self.running_affine)
            return (x * per_channel(scale, x) + per_channel(shift, x)).astype(x.dtype)
        y, mean, var = _normalise_once(x, self.scale, self.bias, self.epsilon, mode.axis_name)
        devices = 1 if mode.axis_name is None else lax.axis_size(mode.axis_name)
        n = devices * (x.size // self.features)
        unbiased = var * (n / max(n - 1, 1))
        self.mean.value += self.momentum * (lax.stop_gradient(mean) - self.mean.value)
        self.var.value += self.momentum * (lax.stop_gradient(unbiased) - self.var.value)
        return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalise(
    x: Array, scale: Array, bias: Array, epsilon: float, axis_name: str | None
) -> tuple[Array, Array, Array]:
    """(x - mean)·scale/√(var + ε) + bias, and the batch's mean and biased variance (C,).

    Its gradient is written out (Ioffe and Szegedy 2015, 1502.03167) so that of all that is computed
    x alone is kept, and two sums and one pass remain of the backward pass: 0.4 of the time.
    The statistics have no gradient of their own.
    """
    return _normalise_forward(x, scale, bias, epsilon, axis_name)[0]


def _batch_mean(values: Array, axis_name: str | None) -> Array:
    local = jnp.mean(values, tuple(range(values.ndim - 1)))
    return local if axis_name is None else lax.pmean(local, axis_name)


def _normalise_forward(x, scale, bias, epsilon, axis_name):
    wide = at_least_float32(x)
    mean = _batch_mean(wide, axis_name)
    var = _batch_mean(jnp.square(wide - per_channel(mean, x)), axis_name)
    inverse = lax.rsqrt(var + epsilon)
    factor = scale * inverse
    y = wide * per_channel(factor, x) + per_channel(bias - mean * factor, x)
    return (y.astype(x.dtype), mean, var), (x, mean, inverse, scale)


def _normalise_backward(epsilon, axis_name, residuals, cotangents):
    x, mean, inverse, scale = residuals
    wide, g = at_least_float32(x), at_least_float32(cotangents[0])
    axes = tuple(range(x.ndim - 1))
    dbias = jnp.sum(g, axes)
    dscale = (jnp.sum(g * wide, axes) - mean * dbias) * inverse
    along_bias, along_scale = dbias, dscale
    n = x.size // x.shape[-1]
    if axis_name is not None:
        along_bias, along_scale = lax.psum((dbias, dscale), axis_name)
        n = n * lax.axis_size(axis_name)
    # dx = scale/√(var + ε) (g - Σg/n - x̂ Σ(g x̂)/n), as one multiple of g, one of x, and the rest.
    factor = scale * inverse
    of_x = -factor * inverse * along_scale / n
    rest = -factor * along_bias / n - mean * of_x
    dx = g * per_channel(factor, x) + wide * per_channel(of_x, x) + per_channel(rest, x)
    return dx.astype(x.dtype), dscale, dbias


_normalise.defvjp(_normalise_forward, _normalise_backward)
_normalise_once = jax.jit(_normalise, static_argnums=(3, 4))  # traced once for all of a shape


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
    return between(conv(x, mode, batch_norm.running_affine))


# ------------------------------------------------------------------------------- pools, classifier
@jax.custom_vjp
def max_pool(x: Array) -> Array:
    """2×2 max pool with stride 2, odd edges dropped, (B, H, W, C) -> (B, H/2, W/2, C).

    Of equal pixels the first takes the gradient, as in PyTorch. What is kept for the backward pass
    is which of the four was largest: forward and backward take 0.2 of the time of a reshape's
    maximum, whose gradient compares and counts.
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


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def max_pool_overlapping(x: Array) -> Array:
    """3×3 max pool with stride 2 and padding 1, the stem's of ImageNet ResNets."""
    return nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])


def resize_bilinear(x: Array, size: tuple[int, int]) -> Array:
    """Bilinear resize whose corner pixels stay corner pixels, (B, h, w, C) -> (B, *size, C).

    Output pixel o lies at o·(in - 1)/(out - 1) in the input. Two products with constant matrices,
    whose gradients are products too; their rows sum to one, for which they stay in float32. As a
    product for each image's row and for each image, so that XLA transposes nothing: 0.3 of the time
    on a CPU.
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


class Linear(nn.Module):
    """Fully connected layer with PyTorch's default initialisation, or the given one.

    Computed in float32 at least, since its output is the logits in every network but a few.
    """

    features: int
    kernel_init: nn.initializers.Initializer = torch_uniform
    bias_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """(B, I) -> (B, features)."""

        def weights():
            kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
            bias_init = self.bias_init or _bias_uniform(x.shape[-1])
            return kernel, self.param("bias", bias_init, (self.features,))

        kernel, bias = weights() if mode.train else frozen(self, weights)
        y = at_least_float32(x) @ kernel
        return y + per_channel(bias, y)
