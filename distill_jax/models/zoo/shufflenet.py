"""ShuffleNets for 32×32 images: V1 of three groups (Zhang et al. 2018), V2 ×1 (Ma et al. 2018).

As the distillation literature has them: a 1×1 stem of 24 and three stages, each of which halves the
map. State-dict names: conv1, bn1, layer1.0.conv1, layer1.0.bn1, linear; V2 has conv2 and bn2 too.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from distill_jax.models.basics import Mode, Outputs, check_size, on_top
from distill_jax.models.kernels.pools import average_pool_overlapping, global_average_pool
from distill_jax.models.zoo.heads import Head, one_layer
from distill_jax.models.zoo.layers import Conv, conv_norm
from distill_jax.models.zoo.stages import Block, Staged

STEM = 24
BLOCKS = (4, 8, 4)
WIDTHS = {1: (240, 480, 960), 2: (116, 232, 464)}
LAST = 1024  # channels of V2's last convolution
STRIDES = (2, 2, 2)


def shuffle_channels(x: Array, groups: int) -> Array:
    """(..., C) with the channels of the `groups` in turn: one of each, the next of each, ..."""
    return x.reshape(*x.shape[:-1], groups, -1).swapaxes(-1, -2).reshape(x.shape)


def _convs(mode: Mode) -> Callable[..., Array]:
    """The n-th convolution of a module with its BatchNorm, convN and bnN."""

    def conv(x, n, features, kernel_size=1, stride=1, groups=1):
        layer = Conv(features, kernel_size, stride, use_bias=False, groups=groups, name=f"conv{n}")
        return conv_norm(x, mode, layer, f"bn{n}")

    return conv


class ShuffleBlock(nn.Module):
    """V1's: 1×1, depthwise 3×3 and 1×1 convolutions in groups, channels shuffled after the first.

    ReLU follows the sum with the input, or where the block strides the two side by side, the input
    averaged. Gives the block's output, and what its last ReLU takes.
    """

    features: int
    stride: int = 1
    groups: int = 3

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> tuple[Array, Array]:
        conv, strided = _convs(mode), self.stride > 1
        outputs = self.features - x.shape[-1] if strided else self.features
        middle, groups = outputs // 4, 1 if x.shape[-1] == STEM else self.groups
        y = shuffle_channels(nn.relu(conv(x, 1, middle, groups=groups)), groups)
        y = nn.relu(conv(y, 2, middle, 3, self.stride, middle))
        y = conv(y, 3, outputs, groups=self.groups)
        preact = jnp.concatenate([y, average_pool_overlapping(x)], -1) if strided else y + x
        return nn.relu(preact), preact


class SplitBlock(nn.Module):
    """V2's: the second half of the channels through three convolutions, the middle one depthwise.

    Where the block strides all channels go through both ways. Then the channels are shuffled. Gives
    the block's output, and what it would be before its last ReLU and the shuffle.
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> tuple[Array, Array]:
        conv, half, first = _convs(mode), self.features // 2, 1
        one, other = x[..., :half], x[..., half:]
        if self.stride > 1:
            one = conv(x, 1, x.shape[-1], 3, self.stride, x.shape[-1])
            one, other, first = conv(one, 2, half), x, 3
        other = nn.relu(conv(other, first, half))
        other = conv(other, first + 1, half, 3, self.stride, half)
        preact = jnp.concatenate([one, conv(other, first + 2, half)], -1)
        return shuffle_channels(nn.relu(preact), 2), preact


class ShuffleNet(Staged):
    """A 1×1 stem, three stages of `blocks` blocks, in V2 another convolution, pool and classifier.

    V2's preactivations have their channels as they are before the last block shuffles them.
    """

    version: int
    classes: int

    @nn.compact
    def __call__(self, images: Array, mode: Mode) -> Outputs:
        stem = nn.relu(_convs(mode)(images, 1, STEM))
        widths = WIDTHS[self.version][:-1]
        stages = self.run_stages(stem, mode, self._block, widths, STRIDES[:-1])
        return on_top(self.upper(stages.ends[-1], mode), stem, stages.ends, stages.last_preacts)

    @nn.nowrap
    def upper(self, x: Array, mode: Mode) -> Outputs:
        """Runs the last stage and what follows it, as layers of whichever module is called."""
        widths = WIDTHS[self.version][-1:]
        stages = self.run_stages(x, mode, self._block, widths, STRIDES[-1:], start=3)
        x = stages.ends[-1]
        if self.version == 2:
            x = nn.relu(_convs(mode)(x, 2, LAST))
        feature = global_average_pool(x)
        logits = self.head().run(feature, mode)
        return Outputs(logits, feature, stages.ends, preacts=stages.last_preacts)

    @property
    def _block(self) -> Block:
        return ShuffleBlock if self.version == 1 else SplitBlock

    @nn.nowrap
    def head(self) -> Head:
        return one_layer("linear", self.classes)


def build(version: int, classes: int, image_shape: tuple[int, int, int]) -> ShuffleNet:
    """ShuffleNetV1 or V2.

    Raises:
      ValueError: images too small for its strides.
    """
    check_size(f"shufflenetv{version}", image_shape, 8)
    return ShuffleNet(BLOCKS, version, classes)
