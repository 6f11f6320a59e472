"""CIFAR ResNets of 6n+2 layers (He et al. 2016) and the residual blocks of every ResNet here.

TAKD and DGKD have a 1×1 convolution at transitions. State-dict names are those of their code and of
torchvision: conv1, bn1, layer1.0.conv1, layer2.0.downsample.0, fc.
"""

from __future__ import annotations

from flax import linen as nn
from jax import Array

from distill_jax.models.basics import Mode, Outputs, on_top
from distill_jax.models.kernels.pools import global_average_pool
from distill_jax.models.zoo.heads import Head, one_layer
from distill_jax.models.zoo.layers import Conv, conv_norm, he_fan_out
from distill_jax.models.zoo.stages import Staged

DEPTHS = (8, 14, 20, 26, 32, 44, 56, 110)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut, ReLU after the sum; projected where shapes change.

    Gives the block's output, and the sum before its ReLU. `features` is the width of the output
    over `expansion`, `widen` times it that between.
    """

    expansion = 1

    features: int
    stride: int = 1
    kernel_init: nn.initializers.Initializer = he_fan_out
    widen: int = 1

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> tuple[Array, Array]:
        def conv(features, kernel_size, stride, name):
            return Conv(
                features,
                kernel_size,
                stride,
                use_bias=False,
                kernel_init=self.kernel_init,
                name=name,
            )

        middle = self.widen * self.features
        y = nn.relu(conv_norm(x, mode, conv(middle, 3, self.stride, "conv1"), "bn1"))
        y = conv_norm(y, mode, conv(self.features, 3, 1, "conv2"), "bn2")
        if self.stride != 1 or x.shape[-1] != self.features:
            shortcut = conv(self.features, 1, self.stride, "downsample.0")
            x = conv_norm(x, mode, shortcut, "downsample.1")
        preact = x + y
        return nn.relu(preact), preact


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions and a shortcut; the stride is at the 3×3.

    Gives the block's output, and the sum before its ReLU. The output is four times `features`
    wide, the middle `widen` times, in `groups` groups.
    """

    expansion = 4

    features: int
    stride: int = 1
    kernel_init: nn.initializers.Initializer = he_fan_out
    widen: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> tuple[Array, Array]:
        def conv(features, kernel_size, name, stride=1, groups=1):
            return Conv(
                features,
                kernel_size,
                stride,
                use_bias=False,
                groups=groups,
                kernel_init=self.kernel_init,
                name=name,
            )

        middle, outputs = self.widen * self.features, self.expansion * self.features
        y = nn.relu(conv_norm(x, mode, conv(middle, 1, "conv1"), "bn1"))
        y = nn.relu(conv_norm(y, mode, conv(middle, 3, "conv2", self.stride, self.groups), "bn2"))
        y = conv_norm(y, mode, conv(outputs, 1, "conv3"), "bn3")
        if self.stride != 1 or x.shape[-1] != outputs:
            shortcut = conv(outputs, 1, "downsample.0", self.stride)
            x = conv_norm(x, mode, shortcut, "downsample.1")
        preact = x + y
        return nn.relu(preact), preact


class CifarResNet(Staged):
    """ResNet of 6n+2 layers: a 3×3 stem of `widths[0]`, three stages of `blocks` basic blocks."""

    widths: tuple[int, int, int, int]
    classes: int

    @nn.compact
    def __call__(self, images: Array, mode: Mode) -> Outputs:
        stem = Conv(self.widths[0], use_bias=False, kernel_init=he_fan_out, name="conv1")
        x = nn.relu(conv_norm(images, mode, stem, "bn1"))
        stages = self.run_stages(x, mode, BasicBlock, self.widths[1:-1])
        return on_top(self.upper(stages.ends[-1], mode), x, stages.ends, stages.last_preacts)

    @nn.nowrap
    def upper(self, x: Array, mode: Mode) -> Outputs:
        """Runs the last stage and what follows it, as layers of whichever module is called."""
        stages = self.run_stages(x, mode, BasicBlock, self.widths[-1:], start=3)
        feature = global_average_pool(stages.ends[-1])
        logits = self.head().run(feature, mode)
        return Outputs(logits, feature, stages.ends, preacts=stages.last_preacts)

    @nn.nowrap
    def head(self) -> Head:
        return one_layer("fc", self.classes)


def build(depth: int, classes: int, image_shape: tuple[int, int, int]) -> CifarResNet:
    """ResNet of `depth` = 6n+2 layers, widths 16/16/32/64."""
    return _of_depth(depth, (16, 16, 32, 64), classes)


def build_wide(
    depth: int, factor: int, classes: int, image_shape: tuple[int, int, int]
) -> CifarResNet:
    """ResNet-depth×factor of the distillation literature: a stem of 32, widths 16/32/64·factor.

    Raises:
      ValueError: depth not 6n+2, factor below two.
    """
    if factor < 2:
        raise ValueError(f"resnet{depth}x{factor}: the factor is two or more")
    return _of_depth(depth, (32, 16 * factor, 32 * factor, 64 * factor), classes)


def _of_depth(depth: int, widths: tuple[int, int, int, int], classes: int) -> CifarResNet:
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"a CIFAR ResNet has 6n+2 layers (8, 14, 20, ...), got {depth}")
    return CifarResNet((blocks,) * 3, widths, classes)
