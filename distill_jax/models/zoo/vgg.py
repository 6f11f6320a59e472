"""VGG with BatchNorm for small images: the distillation literature's form and TESKD's.

Both take the counts of convolutions per block from Simonyan and Zisserman (2015), at widths 64,
128, 256, 512, 512, all 3×3 with a bias.
"""

from __future__ import annotations

from flax import linen as nn
from jax import Array

from distill_jax.models.basics import Mode, Outputs, check_size, on_top
from distill_jax.models.kernels.pools import global_average_pool, max_pool
from distill_jax.models.zoo.heads import Head
from distill_jax.models.zoo.layers import HE_VGG, Conv, conv_norm

WIDTHS = (64, 128, 256, 512, 512)
COUNTS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
CIFAR_DEPTHS = (16, 19)


def _conv(x: Array, mode: Mode, width: int, name: str, norm: str) -> Array:
    """A convolution and its BatchNorm, before the ReLU."""
    conv = Conv(width, kernel_init=HE_VGG.conv, bias_init=HE_VGG.conv_bias, name=name)
    return conv_norm(x, mode, conv, norm)


def _layers(x: Array, mode: Mode, block: str, width: int, count: int) -> Array:
    """Convolutions with BatchNorms and ReLUs, but for the last ReLU."""
    for index in range(count):
        x = nn.relu(x) if index else x
        x = _conv(x, mode, width, f"{block}.{3 * index}", f"{block}.{3 * index + 1}")
    return x


def _head(names: tuple[str, ...], widths: tuple[int, ...]) -> Head:
    return Head(names, widths, HE_VGG.linear, HE_VGG.linear_bias, parent=None)


class VGG(nn.Module):
    """Five blocks with pools after the first three, average pool and one linear layer.

    At 32×32 the last two blocks both see 4×4 maps; images of 64×64 or more are pooled once more
    between them. The first block is the stem, the others are the stages, as the field's feature
    losses take them. State-dict names: block0.0, block0.1, ..., classifier.
    """

    counts: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(self, images: Array, mode: Mode) -> Outputs:
        maps, preacts = [images], []
        for block in range(4):
            x = max_pool(maps[-1]) if block else images
            preacts.append(_layers(x, mode, f"block{block}", WIDTHS[block], self.counts[block]))
            maps.append(nn.relu(preacts[-1]))
        return on_top(self.upper(maps[-1], mode), maps[1], maps[2:], preacts[1:])

    @nn.nowrap
    def upper(self, x: Array, mode: Mode) -> Outputs:
        """Runs the last block and what follows it, as layers of whichever module is called."""
        x = max_pool(x) if min(x.shape[1:3]) >= 8 else x  # an eighth of the images
        preact = _layers(x, mode, "block4", WIDTHS[4], self.counts[4])
        x = nn.relu(preact)
        feature = global_average_pool(x)
        logits = self.head().run(feature, mode)
        return Outputs(logits, feature, (x,), preacts=(preact,))

    @nn.nowrap
    def head(self) -> Head:
        return _head(("classifier",), (self.classes,))


class CifarVGG(nn.Module):
    """TESKD's VGG: two convolutions, a pool, four blocks ending in a pool, three linear layers.

    Stages end after the pools, 8, 4, 2 and 1 pixels wide at 32×32; the feature is the average of
    the last, before all linear layers. State-dict names: conv1, bn1, conv2, bn2, layer1.0,
    layer1.1, ..., classifier.0.
    """

    counts: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(self, images: Array, mode: Mode) -> Outputs:
        x, stages, preacts = images, [], []
        for index in range(1, self.counts[0] + 1):
            x = nn.relu(_conv(x, mode, WIDTHS[0], f"conv{index}", f"bn{index}"))
        stem, x = x, max_pool(x)
        for layer in range(1, 4):
            x, preact = self._pooled(x, mode, layer)
            stages.append(x)
            preacts.append(preact)
        return on_top(self.upper(x, mode), stem, stages, preacts)

    @nn.nowrap
    def upper(self, x: Array, mode: Mode) -> Outputs:
        """Runs the last block and what follows it, as layers of whichever module is called."""
        x, preact = self._pooled(x, mode, 4)
        feature = global_average_pool(x)
        logits = self.head().run(feature, mode)
        return Outputs(logits, feature, (x,), preacts=(preact,))

    @nn.nowrap
    def _pooled(self, x: Array, mode: Mode, layer: int) -> tuple[Array, Array]:
        """A block and its pool, after the last ReLU and before it: a pool and a ReLU commute."""
        preact = _layers(x, mode, f"layer{layer}", WIDTHS[layer], self.counts[layer])
        return max_pool(nn.relu(preact)), max_pool(preact)

    @nn.nowrap
    def head(self) -> Head:
        return _head(("classifier.0", "classifier.2", "classifier.4"), (512, 512, self.classes))


def build(depth: int, classes: int, image_shape: tuple[int, int, int]) -> VGG:
    """VGG of `depth` layers (the literature's numbers count three linear layers; here is one).

    Raises:
      ValueError: images too small for its pools.
    """
    check_size(f"vgg{depth}", image_shape, 8)
    return VGG(COUNTS[depth], classes)


def build_cifar(depth: int, classes: int, image_shape: tuple[int, int, int]) -> CifarVGG:
    """TESKD's VGG of `depth` layers.

    Raises:
      ValueError: images too small for its pools.
    """
    check_size(f"cifar_vgg{depth}", image_shape, 32)
    return CifarVGG(COUNTS[depth], classes)
