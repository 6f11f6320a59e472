"""TESKD's evolving network: a backbone that carries its own students as branches.

The branches share the backbone's stages in the manner of a feature pyramid and are thrown away
after training (Student Helping Teacher, arXiv 2110.00329). Variables hold the backbone's names at
top level, beside laterals.*, upsample.*, fuse_*, downsample* and fc_b*, as the authors' state dict
does.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from distill_jax.models.basics import Mode, Outputs
from distill_jax.models.kernels.pools import global_average_pool, resize_bilinear
from distill_jax.models.zoo import vgg
from distill_jax.models.zoo.branches import Branched, with_feature_of_last_stage
from distill_jax.models.zoo.four_stage_resnet import FourStageResNet
from distill_jax.models.zoo.layers import HE_VGG, TORCH, Conv, Init, Linear, conv_norm


class Evolving(Branched):
    """A backbone of S stages with S - 1 student branches; any module that shows its stages will do.

    With K the width of the last stage, "block" a 1×1 convolution to K without bias, BatchNorm and
    ReLU, and b the stages from 1:

      top-down    P_S = block(stage S),  U_b = block(resized P_{b+1}),
                  P_b = block([U_b + block(stage b), U_b])
      branch b    a k×k convolution of stride k and a 1×1, each with bias, BatchNorm and ReLU;
                  its average pool is the feature, a linear layer on it the logits

    where k doubles from `first_stride` at b = S-1 downwards, but is no more than the map. At S = 4
    these are the authors' branches. The backbone's feature is its own where that is K wide, as the
    feature term of the loss needs it, else the average of the last stage.
    """

    first_stride: int = 2
    initial: Init = TORCH

    @nn.compact
    def __call__(self, images: Array, mode: Mode) -> Outputs:
        outputs = self.backbone(images, mode)
        stages = outputs.stages
        last = len(stages)
        width = stages[-1].shape[-1]
        down = self._block(stages[-1], mode, width, f"laterals.{last - 1}")
        branches = []
        for b in range(last - 1, 0, -1):  # deepest first
            lateral = self._block(stages[b - 1], mode, width, f"laterals.{b - 1}")
            size = (lateral.shape[1], lateral.shape[2])
            up = self._block(down, mode, width, f"upsample.{b - 1}", first=1, size=size)
            both = jnp.concatenate([up + lateral, up], -1)
            down = self._block(both, mode, width, f"fuse_{b}")
            stride = min(self.first_stride * 2 ** (last - 1 - b), *size)
            branches.append(self._branch(down, mode, width, b, stride))
        return with_feature_of_last_stage(outputs)._replace(branches=tuple(branches))

    def _block(
        self,
        x: Array,
        mode: Mode,
        width: int,
        name: str,
        first: int = 0,
        size: tuple[int, int] | None = None,
    ) -> Array:
        """1×1 convolution, BatchNorm, ReLU; resized to `size` before the BatchNorm.

        The authors resize before the convolution. The two commute, as one mixes channels and the
        other pixels, and on the smaller map the convolution costs a quarter.
        """
        conv = Conv(width, 1, use_bias=False, kernel_init=self.initial.conv, name=f"{name}.{first}")
        norm = f"{name}.{first + 1}"
        if size is None:
            return nn.relu(conv_norm(x, mode, conv, norm))
        return nn.relu(conv_norm(x, mode, conv, norm, lambda y: resize_bilinear(y, size)))

    def _branch(self, x: Array, mode: Mode, width: int, b: int, stride: int) -> Outputs:
        def conv(kernel_size, index):
            return Conv(
                width,
                kernel_size,
                stride=kernel_size,
                padding=0,
                kernel_init=self.initial.conv,
                bias_init=self.initial.conv_bias,
                name=f"downsample{b}.{index}",
            )

        y = nn.relu(conv_norm(x, mode, conv(stride, 0), f"downsample{b}.1"))
        y = nn.relu(conv_norm(y, mode, conv(1, 3), f"downsample{b}.4"))
        feature = global_average_pool(y)
        classifier = Linear(
            self.classes,
            kernel_init=self.initial.linear,
            bias_init=self.initial.linear_bias,
            name=f"fc_b{b}",
        )
        return Outputs(classifier(feature, mode), feature, (x, y))


def build(backbone: nn.Module, classes: int) -> Evolving:
    """The evolving network of any backbone module; branches as the authors have them for theirs.

    Their VGG's strides start at one, as its last stages are small. Their VGG and ResNeXt draw the
    branches' weights as the backbone's, the others by PyTorch's defaults, ImageNet's included.
    """
    if isinstance(backbone, vgg.CifarVGG):
        return Evolving(backbone, classes, first_stride=1, initial=HE_VGG)
    if isinstance(backbone, FourStageResNet) and not backbone.large_stem:
        return Evolving(backbone, classes, initial=backbone.initial)
    return Evolving(backbone, classes)
