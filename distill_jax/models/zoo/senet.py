"""TESKD's SE-ResNets (Hu et al. 2018) for 32×32 images.

Convolutions carry a bias, weights start with PyTorch's defaults. State-dict names: pre.0, pre.1,
stage1.0.residual.0, stage1.0.shortcut.0, stage1.0.excitation.0, linear.
"""

from __future__ import annotations

from typing import ClassVar

from flax import linen as nn
from jax import Array

from distill_jax.models.basics import Mode, Outputs, on_top
from distill_jax.models.kernels.pools import global_average_pool
from distill_jax.models.zoo.four_stage_resnet import COUNTS, WIDTHS
from distill_jax.models.zoo.heads import Head, one_layer
from distill_jax.models.zoo.layers import Conv, Linear, conv_norm
from distill_jax.models.zoo.stages import Block, Staged

REDUCTION = 16


class SEBlock(nn.Module):
    """Convolutions, each with BatchNorm and ReLU, scaled per channel by what their mean excites.

    `layers` lists (kernel size, width over `features`, whether it carries the stride). The last one
    has its ReLU before the scaling, and the block another after the sum. Gives the block's output,
    and the sum.
    """

    layers: ClassVar[tuple[tuple[int, int, bool], ...]] = ((3, 1, True), (3, 1, False))

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> tuple[Array, Array]:
        y = x
        for index, (kernel_size, widen, strided) in enumerate(self.layers):
            stride = self.stride if strided else 1
            conv = Conv(widen * self.features, kernel_size, stride, name=f"residual.{3 * index}")
            y = nn.relu(conv_norm(y, mode, conv, f"residual.{3 * index + 1}"))
        outputs = y.shape[-1]
        if self.stride != 1 or x.shape[-1] != outputs:
            shortcut = Conv(outputs, 1, self.stride, name="shortcut.0")
            x = conv_norm(x, mode, shortcut, "shortcut.1")
        squeezed = Linear(outputs // REDUCTION, name="excitation.0")(global_average_pool(y), mode)
        scale = nn.sigmoid(Linear(outputs, name="excitation.2")(nn.relu(squeezed), mode))
        preact = y * scale[:, None, None].astype(y.dtype) + x
        return nn.relu(preact), preact


class SEBottleneck(SEBlock):
    """The block of three convolutions, four times wider at its end."""

    layers = ((1, 1, False), (3, 1, True), (1, 4, False))


class SENet(Staged):
    """A 3×3 stem of 64, four stages of `blocks` blocks, average pool and classifier."""

    bottleneck: bool
    classes: int

    @staticmethod
    def block_name(stage: int, index: int) -> str:
        return f"stage{stage}.{index}"

    @nn.compact
    def __call__(self, images: Array, mode: Mode) -> Outputs:
        x = nn.relu(conv_norm(images, mode, Conv(WIDTHS[0], name="pre.0"), "pre.1"))
        stages = self.run_stages(x, mode, self._block, WIDTHS[:-1])
        return on_top(self.upper(stages.ends[-1], mode), x, stages.ends, stages.last_preacts)

    @nn.nowrap
    def upper(self, x: Array, mode: Mode) -> Outputs:
        """Runs the last stage and what follows it, as layers of whichever module is called."""
        stages = self.run_stages(x, mode, self._block, WIDTHS[-1:], start=4)
        feature = global_average_pool(stages.ends[-1])
        logits = self.head().run(feature, mode)
        return Outputs(logits, feature, stages.ends, preacts=stages.last_preacts)

    @property
    def _block(self) -> Block:
        return SEBottleneck if self.bottleneck else SEBlock

    @nn.nowrap
    def head(self) -> Head:
        return one_layer("linear", self.classes)


def build_cifar(depth: int, classes: int, image_shape: tuple[int, int, int]) -> SENet:
    """TESKD's SE-ResNet of 18, 34 or 50 layers."""
    return SENet(COUNTS[depth], depth >= 50, classes)
