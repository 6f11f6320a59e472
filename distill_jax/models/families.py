"""The networks that come with the library: families of names and what builds them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from flax import linen as nn

from distill_jax.models.zoo import (
    four_stage_resnet,
    mobilenet,
    plain,
    resnet,
    senet,
    shufflenet,
    vgg,
    wide_resnet,
)

Builder = Callable[..., nn.Module]  # (*sizes, classes, image_shape)


class Family(NamedTuple):
    """Networks that differ in the numbers of their names, each {} of `form` a number."""

    form: str
    builder: Builder
    sizes: tuple[tuple[int, ...], ...]  # those that the papers have
    rate: float  # of SGD with momentum 0.9, which they were published with
    any_size: bool = False  # the builder judges other sizes; else there are none

    def name(self, size: tuple[int, ...]) -> str:
        return self.form.format(*size)

    def size(self, name: str) -> tuple[int, ...] | None:
        """The numbers in `name`, None where it is none of this family."""
        match = re.fullmatch(self.form.replace("{}", "([1-9][0-9]*)"), name)
        size = tuple(map(int, match.groups())) if match else None
        return size if self.any_size or size in self.sizes else None


def _one(sizes: Iterable[int]) -> tuple[tuple[int, ...], ...]:
    return tuple((size,) for size in sizes)


FAMILIES = (
    Family("plane{}", plain.build, _one(plain.SIZES), 0.01),
    Family("resnet{}", resnet.build, _one(resnet.DEPTHS), 0.1),
    Family("resnet{}x{}", resnet.build_wide, ((8, 4), (32, 4)), 0.05, any_size=True),
    Family(
        "wrn_{}_{}",
        wide_resnet.build,
        ((16, 1), (16, 2), (40, 1), (40, 2), (28, 10)),
        0.1,
        any_size=True,
    ),
    Family("vgg{}", vgg.build, _one(vgg.COUNTS), 0.05),
    Family("resnet{}_cifar", four_stage_resnet.build_small, ((50,),), 0.05),
    Family("mobilenetv{}", mobilenet.build, ((2,),), 0.01),
    Family("shufflenetv{}", shufflenet.build, _one(shufflenet.WIDTHS), 0.01),
    Family("cifar_resnet{}", four_stage_resnet.build_cifar, _one(four_stage_resnet.COUNTS), 0.1),
    Family(
        "cifar_resnext{}", four_stage_resnet.build_cifar_next, _one(four_stage_resnet.COUNTS), 0.1
    ),
    Family("cifar_senet{}", senet.build_cifar, _one(four_stage_resnet.COUNTS), 0.1),
    Family("cifar_vgg{}", vgg.build_cifar, _one(vgg.CIFAR_DEPTHS), 0.1),
    Family(
        "imagenet_resnet{}", four_stage_resnet.build_imagenet, _one(four_stage_resnet.COUNTS), 0.1
    ),
)
MODELS: dict[str, Builder] = {
    family.name(size): functools.partial(family.builder, *size)
    for family in FAMILIES
    for size in family.sizes
}


def published_rate(name: str) -> float:
    """The learning rate that a network's family was published with; 0.05 of those from outside."""
    return next((family.rate for family in FAMILIES if family.size(name)), 0.05)
