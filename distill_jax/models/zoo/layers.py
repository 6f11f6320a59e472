"""The layers with weights that every family shares: one convolution, one classifier."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from distill_jax.models.backend import backend
from distill_jax.models.basics import Mode, at_least_float32, frozen, per_channel
from distill_jax.models.kernels.batch_norm import BatchNorm
from distill_jax.models.kernels.convolution import algorithm_for, conv2d
from distill_jax.models.kernels.cpu_conv import CPU_CHUNK

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


def bias_uniform(fan_in: int) -> nn.initializers.Initializer:
    """U(±1/√fan_in), PyTorch's of a bias."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=float: jax.random.uniform(key, shape, dtype, -bound, bound)


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
        self,
        x: Array,
        mode: Mode,
        affine: Callable[[], tuple[Array, Array]] | None = None,
        biased: bool = True,
    ) -> Array:
        """x (B, H, W, I) -> (B, H', W', features).

        What `affine` gives, a scale and a shift of each channel, is folded into it outside
        training. In training the bias is left out where it is not to be `biased`.
        """
        k = self.kernel_size
        padding = k // 2 if self.padding is None else self.padding
        shape = (k, k, x.shape[-1] // self.groups, self.features)
        x = x.astype(mode.dtype)
        if mode.train:
            kernel, bias = self._weights(shape)
            if self.is_initializing():  # only the weights are wanted
                return self._no_output(x, padding)
            bias = bias if biased else None
            y = conv2d(x, kernel.astype(x.dtype), self.stride, padding, self.groups)
        else:
            # However many images there are: weights are frozen before that is known.
            few = (CPU_CHUNK, *x.shape[1:])
            algorithm = algorithm_for(few, shape, x.dtype, self.stride, padding, self.groups)

            def fold():
                kernel, bias = self._weights(shape)
                if affine is not None:
                    scale, shift = affine()
                    kernel = kernel * per_channel(scale, kernel)
                    bias = shift if bias is None else bias * scale + shift
                bias = None if bias is None else bias.astype(x.dtype)
                return algorithm.transform_kernel(kernel.astype(x.dtype)), bias

            transformed, bias = frozen(self, fold)
            if mode.freezing:
                return self._no_output(x, padding)
            y = algorithm.run(x, transformed)
        return y if bias is None else y + per_channel(bias.astype(y.dtype), y)

    def _weights(self, shape: tuple[int, ...]) -> tuple[Array, Array | None]:
        kernel = self.param("kernel", self.kernel_init, shape)
        if not self.use_bias:
            return kernel, None
        bias_init = self.bias_init or bias_uniform(math.prod(shape[:-1]))
        return kernel, self.param("bias", bias_init, shape[-1:])

    def _no_output(self, x: Array, padding: int) -> Array:
        over = 2 * padding - self.kernel_size
        height, width = ((n + over) // self.stride + 1 for n in x.shape[1:3])
        return jnp.zeros((len(x), height, width, self.features), x.dtype)


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
    if mode.train and conv.use_bias and backend() != "cpu":
        # The batch's mean takes a bias away again, and its gradient is zero but for rounding.
        y = between(conv(x, mode, biased=False))
        return batch_norm(y, mode, conv.get_variable("params", "bias"))
    if mode.train:
        return batch_norm(between(conv(x, mode)), mode)
    return between(conv(x, mode, batch_norm.running_affine))


class Linear(nn.Module):
    """Fully connected layer with PyTorch's default initialisation, or the given one.

    Computed in float32 at least and at the highest precision, since its output is the logits in
    every network but a few: by default "float32" is TF32 on many GPUs and bfloat16 on TPUs.
    """

    features: int
    kernel_init: nn.initializers.Initializer = torch_uniform
    bias_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """(B, I) -> (B, features)."""

        def weights():
            kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
            bias_init = self.bias_init or bias_uniform(x.shape[-1])
            return kernel, self.param("bias", bias_init, (self.features,))

        kernel, bias = weights() if mode.train else frozen(self, weights)
        y = jnp.matmul(at_least_float32(x), kernel, precision=lax.Precision.HIGHEST)
        return y + per_channel(bias, y)
