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

from distill_jax.models import vgg
from distill_jax.models.four_stage_resnet import FourStageResNet
from distill_jax.models.layers import (
    HE,
    HE_VGG,
    TORCH,
    Conv,
    Init,
    Linear,
    Mode,
    Outputs,
    conv_norm,
    global_average_pool,
    resize_bilinear,
)


class Evolving(nn.Module):
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

    backbone: nn.Module
    classes: int
    first_stride: int = 2
    init: Init = TORCH

    def setup(self) -> None:
        nn.share_scope(self, self.backbone)  # the backbone's names at top level

    @nn.compact
    def __call__(self, images: Array, mode: Mode) -> Outputs:
        outputs = self.backbone(images, mode)
        stages, width = outputs.stages, outputs.stages[-1].shape[-1]
        top = self._block(stages[-1], mode, f"laterals.{len(stages) - 1}", 0)
        branches = []
        for b in range(len(stages) - 1, 0, -1):  # deepest first
            lateral = self._block(stages[b - 1], mode, f"laterals.{b - 1}", 0)
            up = self._block(top, mode, f"upsample.{b - 1}", 1, lateral.shape[1:3])
            both = jnp.concatenate([up + lateral, up], -1)
            top = self._block(both, mode, f"fuse_{b}", 0, width=width)
            stride = self.first_stride * 2 ** (len(stages) - 1 - b)
            branches.append(self._branch(top, mode, b, min(stride, *top.shape[1:3])))
        feature = outputs.feature
        if feature.shape[-1] != width:
            feature = global_average_pool(stages[-1])
        return outputs._replace(feature=feature, branches=tuple(branches))
