"""ResNets and ResNeXts of four stages: TESKD's for 32×32 images, torchvision's for ImageNet.

Widths 64, 128, 256, 512, times four in the bottleneck nets of 50 layers. State-dict names: conv1,
bn1, layer1.0.conv1, layer2.0.downsample.0, fc; the stem of ResNeXt is conv1.0.
"""

from __future__ import annotations

import functools
from typing import Any

from flax import linen as nn
from jax import Array

from distill_jax.models.basics import Mode, Outputs, on_top
from distill_jax.models.kernels.pools import global_average_pool, max_pool_overlapping
from distill_jax.models.zoo.heads import Head, one_layer
from distill_jax.models.zoo.layers import HE, TORCH, Conv, Init, conv_norm
from distill_jax.models.zoo.resnet import BasicBlock, Bottleneck
from distill_jax.models.zoo.stages import Block, Staged

WIDTHS = (64, 128, 256, 512)
COUNTS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class NextBasicBlock(BasicBlock):
    """TESKD's ResNeXt block of the 18 and 34 layer nets: twice as wide inside, not grouped."""

    widen: int = 2


class NextBottleneck(Bottleneck):
    """ResNeXt's block (Xie et al. 2017): twice as wide inside, in 32 groups."""

    widen: int = 2
    groups: int = 32


class FourStageResNet(Staged):
    """A stem, four stages of `blocks` residual blocks, average pool and classifier.

    `large_stem` is ImageNet's 7×7 convolution of stride 2 and 3×3 max pool, otherwise one 3×3.
    """

    block: Any  # the class of its residual blocks
    classes: int
    initial: Init
    large_stem: bool = False
    stem_name: str = "conv1"

    @nn.compact
    def __call__(self, images: Array, mode: Mode) -> Outputs:
        kernel_size, stride = (7, 2) if self.large_stem else (3, 1)
        stem = Conv(
            WIDTHS[0],
            kernel_size,
            stride,
            use_bias=False,
            kernel_init=self.initial.conv,
            name=self.stem_name,
        )
        first = nn.relu(conv_norm(images, mode, stem, "bn1"))
        x = max_pool_overlapping(first) if self.large_stem else first
        stages = self.run_stages(x, mode, self._block, WIDTHS[:-1])
        return on_top(self.upper(stages.ends[-1], mode), first, stages.ends, stages.last_preacts)

    @nn.nowrap
    def upper(self, x: Array, mode: Mode) -> Outputs:
        """Runs the last stage and what follows it, as layers of whichever module is called."""
        stages = self.run_stages(x, mode, self._block, WIDTHS[-1:], start=4)
        feature = global_average_pool(stages.ends[-1])
        logits = self.head().run(feature, mode)
        return Outputs(logits, feature, stages.ends, preacts=stages.last_preacts)

    @property
    def _block(self) -> Block:
        return functools.partial(self.block, kernel_init=self.initial.conv)

    @nn.nowrap
    def head(self) -> Head:
        return one_layer("fc", self.classes)


def build_cifar(depth: int, classes: int, image_shape: tuple[int, int, int]) -> FourStageResNet:
    """TESKD's ResNet of 18, 34 or 50 layers for small images, with PyTorch's initialisation."""
    block = Bottleneck if depth >= 50 else BasicBlock
    return FourStageResNet(COUNTS[depth], block, classes, TORCH)


def build_small(depth: int, classes: int, image_shape: tuple[int, int, int]) -> FourStageResNet:
    """The distillation literature's ResNet of 50 layers for small images.

    It is TESKD's, with other initial weights.
    """
    return build_cifar(depth, classes, image_shape).clone(initial=HE)


def build_cifar_next(
    depth: int, classes: int, image_shape: tuple[int, int, int]
) -> FourStageResNet:
    """TESKD's ResNeXt of 18, 34 or 50 layers for small images."""
    block = NextBottleneck if depth >= 50 else NextBasicBlock
    return FourStageResNet(COUNTS[depth], block, classes, HE, stem_name="conv1.0")


def build_imagenet(depth: int, classes: int, image_shape: tuple[int, int, int]) -> FourStageResNet:
    """ImageNet's ResNet of 18, 34 or 50 layers, names and arithmetic of torchvision's."""
    block = Bottleneck if depth >= 50 else BasicBlock
    return FourStageResNet(COUNTS[depth], block, classes, HE, large_stem=True)
