"""Batch normalisation, with a gradient of its own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from distill_jax.models.backend import backend
from distill_jax.models.basics import FROZEN, Mode, at_least_float32, frozen, per_channel


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

    def __call__(self, x: Array, mode: Mode, bias: Array | None = None) -> Array:
        """x (..., features) -> the same shape and type.

        In training `bias` is of x what the layer before left out: the running mean alone knows it.
        """
        if self.is_initializing():
            return x
        if not mode.train:
            scale, shift = frozen(self, self.running_affine)
            return (x * per_channel(scale, x) + per_channel(shift, x)).astype(x.dtype)
        y, mean, var = _normalise_once(x, self.scale, self.bias, self.epsilon, mode.axis_name)
        devices = 1 if mode.axis_name is None else lax.axis_size(mode.axis_name)
        n = devices * (x.size // self.features)
        unbiased = var * (n / max(n - 1, 1))
        mean = mean if bias is None else mean + bias
        self.mean.value += self.momentum * (lax.stop_gradient(mean) - self.mean.value)
        self.var.value += self.momentum * (lax.stop_gradient(unbiased) - self.var.value)
        return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalise(
    x: Array, scale: Array, bias: Array, epsilon: float, axis_name: str | None
) -> tuple[Array, Array, Array]:
    """(x - mean)·scale/√(var + ε) + bias, and the batch's mean and biased variance (C,).

    Its gradient is written out (Ioffe and Szegedy 2015, 1502.03167) so that of all that is computed
    x alone is kept, and two sums and one pass remain of the backward pass.
    The statistics have no gradient of their own.
    """
    return _normalise_forward(x, scale, bias, epsilon, axis_name)[0]


def _moments(x: Array, axis_name: str | None) -> tuple[Array, Array]:
    """The mean and the biased variance (C,) of all but the last axis, over all devices."""
    mean, var = _local_moments(x)
    if axis_name is None:
        return mean, var
    # Each device's own, gathered at once, as equal shares of the batch: Chan et al. 1979.
    means, variances = jnp.moveaxis(lax.all_gather(jnp.stack([mean, var]), axis_name), 1, 0)
    mean = jnp.mean(means, 0)
    return mean, jnp.mean(variances + jnp.square(means - per_channel(mean, means)), 0)


def _local_moments(x: Array) -> tuple[Array, Array]:
    if backend() == "cpu":
        axes = tuple(range(x.ndim - 1))
        mean = jnp.mean(x, axes)
        return mean, jnp.mean(jnp.square(x - per_channel(mean, x)), axes)
    # In one pass over x, about one of its pixels: about 0 a large mean would drown the variance.
    pixel, n = x[(0,) * (x.ndim - 1)], x.size // x.shape[-1]
    offset = x - per_channel(pixel, x)
    first, second = (total / n for total in _sums(offset, jnp.square(offset)))
    return pixel + first, jnp.maximum(second - jnp.square(first), 0)


def _sums(a: Array, b: Array) -> tuple[Array, Array]:
    """The sums of two arrays (..., C) over all axes but the last, at once but for the CPU."""
    axes = tuple(range(a.ndim - 1))
    if backend() == "cpu":
        return jnp.sum(a, axes), jnp.sum(b, axes)
    zero = jnp.zeros((), a.dtype)
    first, second = lax.reduce((a, b), (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]), axes)
    return first, second


def _normalise_forward(x, scale, bias, epsilon, axis_name):
    wide = at_least_float32(x)
    mean, var = _moments(wide, axis_name)
    inverse = lax.rsqrt(var + epsilon)
    factor = scale * inverse
    y = wide * per_channel(factor, x) + per_channel(bias - mean * factor, x)
    return (y.astype(x.dtype), mean, var), (x, mean, inverse, scale)


def _normalise_backward(epsilon, axis_name, residuals, cotangents):
    x, mean, inverse, scale = residuals
    wide, g = at_least_float32(x), at_least_float32(cotangents[0])
    dbias, along_x = _sums(g, g * wide)
    dscale = (along_x - mean * dbias) * inverse
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
