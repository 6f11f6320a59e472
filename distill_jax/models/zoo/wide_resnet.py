"""WideResNet-d-k (Zagoruyko and Komodakis 2016), d = 6n+4, as the distillation literature has it.

State-dict names: conv1, block1.layer.0.bn1, block1.layer.0.convShortcut, bn1, fc.
"""

from __future__ import annotations

from flax import linen as nn
from jax import Array

from distill_jax.models.basics import Mode, Outputs, on_top
from distill_jax.models.kernels.batch_norm import BatchNorm
from distill_jax.models.kernels.pools import global_average_pool
from distill_jax.models.zoo.heads import Head, one_layer
from distill_jax.models.zoo.layers import Conv, conv_norm, he_fan_out
from distill_jax.models.zoo.stages import Staged


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3×3 convolutions, nothing after the sum.

    Where the width changes, the shortcut is a 1×1 convolution of the activated input; a block that
    only strides does not occur. Gives the sum, and its normalised input before the first ReLU.
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> tuple[Array, Array]:
        def conv(kernel_size, stride, name):
            return Conv(
                self.features,
                kernel_size,
                stride,
                use_bias=False,
                kernel_init=he_fan_out,
                name=name,
            )

        preact = BatchNorm(x.shape[-1], name="bn1")(x, mode)
        active = nn.relu(preact)
        y = nn.relu(conv_norm(active, mode, conv(3, self.stride, "conv1"), "bn2"))
        y = conv(3, 1, "conv2")(y, mode)
        if x.shape[-1] != self.features:
            x = conv(1, self.stride, "convShortcut")(active, mode)
        return x + y, preact


class WideResNet(Staged):
    """A 3×3 stem of 16, three stages of `blocks` blocks, BatchNorm, ReLU, pool and classifier.

    The stages end before the next BatchNorm, where the field's feature losses take them.
    """

    factor: int
    classes: int

    @staticmethod
    def block_name(stage: int, index: int) -> str:
        return f"block{stage}.layer.{index}"

    @nn.compact
    def __call__(self, images: Array, mode: Mode) -> Outputs:
        x = Conv(16, use_bias=False, kernel_init=he_fan_out, name="conv1")(images, mode)
        stages = self.run_stages(x, mode, PreActivationBlock, self._widths[:-1])
        # A stage's end is normalised by the block after it: the first one of the next stage.
        upper = self.upper(stages.ends[-1], mode)
        return on_top(upper, x, stages.ends, stages.first_preacts[1:])

    @nn.nowrap
    def upper(self, x: Array, mode: Mode) -> Outputs:
        """Runs the last stage and what follows it, as layers of whichever module is called.

        The first of its preactivations is that of the stage before.
        """
        stages = self.run_stages(x, mode, PreActivationBlock, self._widths[-1:], start=3)
        preact = BatchNorm(self._widths[-1], name="bn1")(stages.ends[-1], mode)
        feature = global_average_pool(nn.relu(preact))
        logits = self.head().run(feature, mode)
        return Outputs(logits, feature, stages.ends, preacts=(*stages.first_preacts, preact))

    @property
    def _widths(self) -> tuple[int, ...]:
        return tuple(width * self.factor for width in (16, 32, 64))

    @nn.nowrap
    def head(self) -> Head:
        return one_layer("fc", self.classes, bias_init=nn.initializers.zeros)


def build(depth: int, factor: int, classes: int, image_shape: tuple[int, int, int]) -> WideResNet:
    """WideResNet of `depth` = 6n+4 layers and widths 16/32/64·factor.

    Raises:
      ValueError: depth not 6n+4, factor below one.
    """
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1:
        raise ValueError(f"a WideResNet has 6n+4 layers (10, 16, 22, ...), got {depth}")
    if factor < 1:
        raise ValueError(f"wrn_{depth}_{factor}: the factor is one or more")
    return WideResNet((blocks,) * 3, factor, classes)
