"""Networks by name. What leaves this floor is `Network`: its `init` and its `apply`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from distill_jax.models.basics import FROZEN, Mode, Outputs, Variables
from distill_jax.models.zoo import (
    evolving,
    four_stage_resnet,
    plain,
    resnet,
    senet,
    vgg,
    wide_resnet,
)
from distill_jax.models.zoo.stages import BLOCKS, draw_stages, stack_blocks

Builder = Callable[..., nn.Module]  # (*sizes, classes, image_shape)


class Family(NamedTuple):
    """Networks that differ in the numbers of their names, each {} of `form` a number."""

    form: str
    builder: Builder
    sizes: tuple[tuple[int, ...], ...]  # those that the papers have
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
    Family("plane{}", plain.build, _one(plain.SIZES)),
    Family("resnet{}", resnet.build, _one(resnet.DEPTHS)),
    Family("resnet{}x{}", resnet.build_wide, ((8, 4), (32, 4)), any_size=True),
    Family(
        "wrn_{}_{}",
        wide_resnet.build,
        ((16, 1), (16, 2), (40, 1), (40, 2), (28, 10)),
        any_size=True,
    ),
    Family("vgg{}", vgg.build, _one(vgg.COUNTS)),
    Family("cifar_resnet{}", four_stage_resnet.build_cifar, _one(four_stage_resnet.COUNTS)),
    Family("cifar_resnext{}", four_stage_resnet.build_cifar_next, _one(four_stage_resnet.COUNTS)),
    Family("cifar_senet{}", senet.build_cifar, _one(four_stage_resnet.COUNTS)),
    Family("cifar_vgg{}", vgg.build_cifar, _one(vgg.CIFAR_DEPTHS)),
    Family("imagenet_resnet{}", four_stage_resnet.build_imagenet, _one(four_stage_resnet.COUNTS)),
)
MODELS: dict[str, Builder] = {
    family.name(size): functools.partial(family.builder, *size)
    for family in FAMILIES
    for size in family.sizes
}
EVOLVING = "evolving:"  # before any name: that network with TESKD's branches
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network as a pair of pure functions; hashable, holds no arrays."""

    name: str
    module: nn.Module
    classes: int
    image_shape: tuple[int, int, int]
    dtype: str = "float32"

    @property
    def backbone(self) -> Network:
        """The network that stays when an evolving one's branches go; any other is its own."""
        if not isinstance(self.module, evolving.Evolving):
            return self
        name = self.name.removeprefix(EVOLVING)
        return dataclasses.replace(self, name=name, module=self.module.backbone)

    @property
    def branches(self) -> int:
        """Student branches of an evolving network, 0 of any other."""
        return 0 if self.backbone is self else _branches(self)

    @property
    def shapes(self) -> Variables:
        """The shapes and types of what `init` gives, without computing any of it."""
        return _shapes(self)

    def init(self, key: Array) -> Variables:
        """Fresh {"params", "batch_stats"}, float32, in one compiled call."""
        return _init(self, key)

    def freeze(self, variables: Variables, size: tuple[int, int] | None = None) -> Variables:
        """`variables` with what running the network untrained makes of them, for `apply`.

        BatchNorms are folded into the convolutions, kernels brought into the form in which they are
        fastest, equal blocks stacked. Where it is run often, do this once, before.

        Args:
          variables: {"params", "batch_stats"}; what was made of such comes back as it is.
          size: of the images, where it is not that of `image_shape`.
        """
        if FROZEN in variables:
            return variables
        if BLOCKS not in variables:
            variables = stack_blocks(self.backbone.module, variables)
        mode = Mode(dtype=DTYPES[self.dtype], freezing=True)
        nothing = jnp.zeros((1, *(size or self.image_shape[:2]), self.image_shape[2]), mode.dtype)
        made = self.module.apply(variables, nothing, mode, mutable=(FROZEN, BLOCKS))[1]
        return {**variables, FROZEN: {}, **made}

    def apply(
        self,
        variables: Variables,
        images: Array,
        *,
        train: bool = False,
        axis_name: str | None = None,
    ) -> tuple[Outputs, Any]:
        """Runs the network.

        Args:
          variables: {"params", "batch_stats"}, or what `freeze` made of them.
          images: (B, H, W, channels), normalised.
          train: normalise by the batch and update the running statistics; else by these.
          axis_name: the devices' axis over which the batch's statistics are shared.

        Returns:
          Its outputs, and the batch statistics after it.
        """
        mode = Mode(train, axis_name, DTYPES[self.dtype])
        if not train:
            frozen = self.freeze(variables, (images.shape[1], images.shape[2]))
            outputs = cast(Outputs, self.module.apply(frozen, images, mode))
            return outputs, variables["batch_stats"]
        outputs, updated = self.module.apply(variables, images, mode, mutable=["batch_stats"])
        return cast(Outputs, outputs), updated["batch_stats"]


def build(
    name: str, classes: int, image_shape: tuple[int, int, int], dtype: str = "float32"
) -> Network:
    """The network called `name`, for (H, W, channels) images of `classes` classes.

    Raises:
      ValueError: unknown name or dtype, fewer than two classes, images that it cannot take.
    """
    check_name(name)
    if dtype not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}")
    if classes < 2:
        raise ValueError(f"a classifier needs two classes or more, got {classes}")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape is (height, width, channels), got {image_shape}")
    module = _builder(name.removeprefix(EVOLVING))(classes, image_shape)
    if name.startswith(EVOLVING):
        module = evolving.build(module, classes)
    height, width, channels = image_shape
    return Network(name, module, classes, (height, width, channels), dtype)


def check_name(name: str) -> None:
    """Raises an error unless there is a network called `name`.

    Raises:
      ValueError: there is none, and the message lists those there are; or its size is no legal one.
    """
    _builder(name.removeprefix(EVOLVING))(2, (224, 224, 3))  # images that all of them take


def _builder(name: str) -> Builder:
    for family in FAMILIES:
        size = family.size(name)
        if size is not None:
            return functools.partial(family.builder, *size)
    close = difflib.get_close_matches(name, MODELS, 1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    rules = ", ".join(family.form.format("D", "K") for family in FAMILIES if family.any_size)
    raise ValueError(
        f"unknown network {name!r}{hint} There are {', '.join(MODELS)}, other sizes of {rules}, "
        f"and {EVOLVING}NAME for each"
    )


def deploy(network: Network, variables: Variables) -> Variables:
    """The variables of `network.backbone` alone, from those of an evolving network.

    Its logits are those of the whole. Any other network's variables come back as they are.
    """
    return {
        collection: {name: variables[collection][name] for name in modules}
        for collection, modules in network.backbone.shapes.items()
    }


def count_parameters(network: Network) -> int:
    """Trainable parameters, without building any of them."""
    return sum(leaf.size for leaf in jax.tree.leaves(network.shapes["params"]))


@functools.lru_cache(maxsize=128)
def _shapes(network: Network) -> Variables:
    return jax.eval_shape(lambda: network.init(jax.random.key(0)))


@functools.lru_cache(maxsize=128)
def _branches(network: Network) -> int:
    images = jax.ShapeDtypeStruct((1, *network.image_shape), jnp.float32)
    return len(jax.eval_shape(network.apply, network.shapes, images)[0].branches)


def _init(network: Network, key: Array) -> Variables:
    if isinstance(key, jax.core.Tracer):  # part of a larger program, or asked for its shapes
        return _draw(network, key)
    return _compiled_draw(jax.default_backend())(network, key)


def _draw(network: Network, key: Array) -> Variables:
    images = jnp.zeros((1, *network.image_shape))
    return draw_stages(
        network.module, key, lambda module, key: dict(module.init(key, images, Mode(train=True)))
    )


@functools.cache
def _compiled_draw(backend: str) -> Callable[[Network, Array], Variables]:
    return jax.jit(_draw, static_argnums=0, compiler_options=run_once(backend))


def run_once(backend: str) -> dict[str, Any] | None:
    """Options to compile what runs once: on a CPU unoptimised, in a third of the time or less."""
    return {"xla_backend_optimization_level": 0} if backend == "cpu" else None
