"""The networks that come with the library: families of names and what builds them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from distill_jax.models.indices import Indices
from distill_jax.models.zoo import (
    four_stage_resnet,
    links,
    mobilenet,
    plain,
    resnet,
    senet,
    shufflenet,
    text,
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
        size = _numbers(self.form, name)
        return size if self.any_size or size in self.sizes else None


class TaskFamily(NamedTuple):
    """Networks on other inputs than images: linen modules, of any size.

    Args:
      form: of their names, each {} a number.
      build: (*sizes, classes, dtype) -> the module, called with (inputs, train).
      takes: whether it can take a batch of one, of these shapes and types.
      inputs: what it takes, in words.
      sizes: what the numbers are called.
      stages: from the sizes, the paths of the submodules whose outputs are its stages.
      head: the path of the one that classifies.
    """

    form: str
    build: Callable[..., nn.Module]
    takes: Callable[[Any], bool]
    inputs: str
    sizes: str = "D"
    stages: Callable[..., tuple[str, ...]] = lambda *sizes: ()
    head: str | None = None

    def size(self, name: str) -> tuple[int, ...] | None:
        """The numbers in `name`, None where it is none of this family."""
        return _numbers(self.form, name)


def _numbers(form: str, name: str) -> tuple[int, ...] | None:
    match = re.fullmatch(form.replace("{}", "([1-9][0-9]*)"), name)
    return tuple(map(int, match.groups())) if match else None


def _are_tokens(inputs: Any) -> bool:
    """Whether a batch of one is (1, T) tokens."""
    return isinstance(inputs, Indices) and _is(inputs.values, 2)


def _is_question(inputs: Any) -> bool:
    """Whether a batch of one is a question (head, relation, ?)."""
    if not isinstance(inputs, dict) or inputs.keys() != {"head", "relation"}:
        return False
    return all(isinstance(x, Indices) and _is(x.values, 1) for x in inputs.values())


def _is(x: Any, axes: int) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct) and len(x.shape) == axes and x.dtype == jnp.int32


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
_TOKENS = "tokens, data.Indices of int32 (1, length)"
TASK_FAMILIES = (
    TaskFamily(
        "transformer_{}_{}",
        text.build_transformer,
        _are_tokens,
        _TOKENS,
        "LD",
        lambda layers, width: tuple(f"layer_{i}" for i in range(layers)),
        "classifier",
    ),
    TaskFamily("bilstm_{}", text.BiLSTM, _are_tokens, _TOKENS, head="classifier"),
    *(
        TaskFamily(
            f"{kind}_{{}}",
            functools.partial(links.LinkScorer, kind),
            _is_question,
            "{'head', 'relation'}, data.Indices of int32 (1,)",
        )
        for kind in ("complex", "distmult", "transe")
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
