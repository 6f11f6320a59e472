"""Plain CNNs of TAKD and DGKD: 3×3 convolutions with BatchNorm, max pools, linear layers.

The books below are the papers' networks; a number is a convolution's width, M a 2×2 max pool. The
book of CIFAR-100 serves every data set of more than ten classes, and the odd sizes, of which only
that book has any.
"""

from __future__ import annotations

from flax import linen as nn
from jax import Array

from distill_jax.models.basics import Mode, Outputs, on_top
from distill_jax.models.kernels.pools import flatten_channels_first, max_pool
from distill_jax.models.zoo.heads import Head, one_layer
from distill_jax.models.zoo.layers import Conv, Linear, conv_norm

M = "M"
Book = tuple[tuple[int | str, ...], tuple[int, ...]]  # convolutions and pools, hidden widths

CIFAR10: dict[int, Book] = {
    2: ((16, M, 16, M), ()),
    4: ((16, 16, M, 32, 32, M), ()),
    6: ((16, 16, M, 32, 32, M, 64, 64, M), ()),
    8: ((16, 16, M, 32, 32, M, 64, 64, M, 128, 128, M), (64,)),
    10: ((32, 32, M, 64, 64, M, 128, 128, M, 256, 256, 256, 256, M), (128,)),
}
CIFAR100: dict[int, Book] = {
    2: ((32, M, 32, M), ()),
    3: ((32, 32, M, 64, M), ()),
    4: ((32, 32, M, 64, 64, M), ()),
    5: ((32, 32, M, 64, 64, M, 128), ()),
    6: ((32, 32, M, 64, 64, M, 128, 128), ()),
    7: ((32, 32, M, 64, 64, M, 128, 128, M, 256, M), (64,)),
    8: ((32, 32, M, 64, 64, M, 128, 128, M, 256, 256, M), (64,)),
    9: ((32, 32, M, 64, 64, M, 128, 128, M, 256, 256, 256, M), (512,)),
    10: ((32, 32, M, 64, 64, M, 128, 128, M, 256, 256, 256, 256, M), (512,)),
}
SIZES = tuple(CIFAR100)


class PlainCNN(nn.Module):
    """A plain CNN from its book; stages end before each pool and at the last convolution."""

    layers: tuple[int | str, ...]
    hidden: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(self, images: Array, mode: Mode) -> Outputs:
        *ends, _ = self._ends
        maps, preacts = self._run(images, mode, 0, ends[-1] + 1)
        upper = self.upper(maps[-1], mode)
        return on_top(upper, maps[0], [maps[i] for i in ends], [preacts[i] for i in ends])

    @nn.nowrap
    def upper(self, x: Array, mode: Mode) -> Outputs:
        """Runs the last stage and what follows it, as layers of whichever module is called."""
        *_, before, last = self._ends
        maps, preacts = self._run(x, mode, before + 1, len(self.layers))
        feature = flatten_channels_first(maps[-1])
        for position, width in enumerate(self.hidden):
            feature = nn.relu(Linear(width, name=f"fc_layers.{2 * position}")(feature, mode))
        logits = self.head().run(feature, mode)
        place = last - before - 1
        return Outputs(logits, feature, (maps[place],), preacts=(preacts[place],))

    @property
    def _ends(self) -> list[int]:
        """The places of the layers that stages end with."""
        followed = zip(self.layers, (*self.layers[1:], M), strict=True)
        return [i for i, (layer, after) in enumerate(followed) if after == M != layer]

    @nn.nowrap
    def _run(self, x: Array, mode: Mode, start: int, end: int) -> tuple[list[Array], list[Array]]:
        """The maps after each of the layers from `start` to before `end`, and before its ReLU."""
        maps, preacts = [], []
        for place in range(start, end):
            # Of convolution, BatchNorm and ReLU each has its number.
            index = sum(1 if layer == M else 3 for layer in self.layers[:place])
            if self.layers[place] == M:
                preact = x = max_pool(x)
            else:
                conv = Conv(int(self.layers[place]), name=f"conv_layers.{index}")
                preact = conv_norm(x, mode, conv, f"conv_layers.{index + 1}")
                x = nn.relu(preact)
            maps.append(x)
            preacts.append(preact)
        return maps, preacts

    @nn.nowrap
    def head(self) -> Head:
        return one_layer(f"fc_layers.{2 * len(self.hidden)}", self.classes)


def build(size: int, classes: int, image_shape: tuple[int, int, int]) -> PlainCNN:
    """The plain CNN of `size` layers.

    Raises:
      ValueError: images too small for its pools.
    """
    books = CIFAR100 if classes > 10 or size not in CIFAR10 else CIFAR10
    layers, hidden = books[size]
    pools = layers.count(M)
    if min(image_shape[:2]) < 2**pools:
        raise ValueError(
            f"plane{size} has {pools} pools and needs images of {2**pools}×{2**pools} or more, "
            f"got {image_shape[0]}×{image_shape[1]}"
        )
    return PlainCNN(layers, hidden, classes)
