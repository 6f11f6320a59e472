"""MobileNetV2 (Sandler et al. 2018) at half its width for 32×32 images.

As the distillation literature has it: expansion 6, a stem of stride 2, and ImageNet's strides but
for that of the second stage. State-dict names: conv1.0, conv1.1, blocks.0.0.conv.0, conv2.0,
classifier.0.
"""

from __future__ import annotations

from flax import linen as nn
from jax import Array

from distill_jax.models.basics import Mode, Outputs, check_size
from distill_jax.models.kernels.pools import global_average_pool
from distill_jax.models.zoo.heads import Head
from distill_jax.models.zoo.layers import HE_VGG, Conv, conv_norm, he_fan_out
from distill_jax.models.zoo.stages import Staged

BLOCKS = (2, 3, 4, 3, 3, 1)  # of the stages after the first, which is a single block
WIDTHS = (12, 16, 32, 48, 80, 160)
STRIDES = (1, 2, 2, 1, 2, 1)
SHOWN = (0, 1, 3, 5)  # the stages at whose ends the field's feature losses take maps


class InvertedResidual(nn.Module):
    """1×1, depthwise 3×3 and 1×1 convolutions, the middle `expand` times as wide as the input.

    There is no activation after the last, nor after the sum with the input where shapes allow one.
    Gives the block's output, twice.
    """

    features: int
    stride: int = 1
    expand: int = 6

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> tuple[Array, Array]:
        middle = self.expand * x.shape[-1]

        def conv(y, index, features, kernel_size=1, stride=1, groups=1):
            layer = Conv(
                features,
                kernel_size,
                stride,
                use_bias=False,
                groups=groups,
                kernel_init=he_fan_out,
                name=f"conv.{index}",
            )
            return conv_norm(y, mode, layer, f"conv.{index + 1}")

        y = nn.relu(conv(x, 0, middle))
        y = nn.relu(conv(y, 3, middle, 3, self.stride, middle))
        y = conv(y, 6, self.features)
        y = x + y if x.shape == y.shape else y
        return y, y


class MobileNetV2(Staged):
    """A 3×3 stem of 16, seven stages of blocks, a 1×1 convolution to 1280, pool and classifier.

    Maps are taken at the ends of four stages, whose blocks end without an activation.
    """

    classes: int

    @staticmethod
    def block_name(stage: int, index: int) -> str:
        return f"blocks.{stage}.{index}"

    @nn.compact
    def __call__(self, images: Array, mode: Mode) -> Outputs:
        def conv(features, kernel_size, stride, name):
            return Conv(
                features,
                kernel_size,
                stride,
                use_bias=False,
                kernel_init=he_fan_out,
                name=f"{name}.0",
            )

        stem = nn.relu(conv_norm(images, mode, conv(16, 3, 2, "conv1"), "conv1.1"))
        x, _ = InvertedResidual(8, expand=1, name="blocks.0.0")(stem, mode)
        ends = self.run_stages(x, mode, InvertedResidual, WIDTHS, STRIDES).ends
        x = nn.relu(conv_norm(ends[-1], mode, conv(1280, 1, 1, "conv2"), "conv2.1"))
        feature = global_average_pool(x)
        logits = self.head().run(feature, mode)
        stages = tuple(ends[i] for i in SHOWN)
        return Outputs(logits, feature, stages, stem=stem, preacts=stages)

    @nn.nowrap
    def head(self) -> Head:
        return Head(
            ("classifier.0",), (self.classes,), HE_VGG.linear, HE_VGG.linear_bias, parent=None
        )


def build(version: int, classes: int, image_shape: tuple[int, int, int]) -> MobileNetV2:
    """MobileNetV2 of half width; `version` is two.

    Raises:
      ValueError: images too small for its strides.
    """
    check_size(f"mobilenetv{version}", image_shape, 16)
    return MobileNetV2(BLOCKS, classes)
