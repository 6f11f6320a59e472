"""MobileNetV2 (Sandler et al. 2018) at half its width for 32×32 images.

As the distillation literature has it: expansion 6, a stem of stride 2, and ImageNet's strides but
for that of the second stage. State-dict names: conv1.0, conv1.1, blocks.0.0.conv.0, conv2.0,
classifier.0.
"""

from __future__ import annotations

from flax import linen as nn
from jax import Array

from distill_jax.models.basics import Mode, Outputs, check_size, on_top
from distill_jax.models.kernels.pools import global_average_pool
from distill_jax.models.zoo.heads import Head
from distill_jax.models.zoo.layers import HE_VGG, Conv, conv_norm, he_fan_out
from distill_jax.models.zoo.stages import Staged

BLOCKS = (2, 3, 4, 3, 3, 1)  # of the stages after the first, which is a single block
WIDTHS = (12, 16, 32, 48, 80, 160)
STRIDES = (1, 2, 2, 1, 2, 1)
SHOWN = (0, 1, 3, 5)  # the stages at whose ends the field's feature losses take maps
UPPER = SHOWN[-2] + 1  # the first one after the last but one of these


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


def _conv(x: Array, mode: Mode, name: str, features: int, kernel_size: int, stride: int) -> Array:
    """A convolution, its BatchNorm and ReLU."""
    layer = Conv(
        features, kernel_size, stride, use_bias=False, kernel_init=he_fan_out, name=f"{name}.0"
    )
    return nn.relu(conv_norm(x, mode, layer, f"{name}.1"))


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
        stem = _conv(images, mode, "conv1", 16, 3, 2)
        x, _ = InvertedResidual(8, expand=1, name="blocks.0.0")(stem, mode)
        widths, strides = WIDTHS[:UPPER], STRIDES[:UPPER]
        ends = self.run_stages(x, mode, InvertedResidual, widths, strides).ends
        stages = [ends[i] for i in SHOWN[:-1]]
        return on_top(self.upper(stages[-1], mode), stem, stages, stages)

    @nn.nowrap
    def upper(self, x: Array, mode: Mode) -> Outputs:
        """Runs what follows the last but one map that is shown, as layers of the module called."""
        widths, strides = WIDTHS[UPPER:], STRIDES[UPPER:]
        ends = self.run_stages(x, mode, InvertedResidual, widths, strides, UPPER + 1).ends
        feature = global_average_pool(_conv(ends[-1], mode, "conv2", 1280, 1, 1))
        logits = self.head().run(feature, mode)
        return Outputs(logits, feature, ends[-1:], preacts=ends[-1:])

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
