"""Networks by name. What leaves this floor is `Network`: its `init` and its `apply`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from distill_jax.models import plain, resnet
from distill_jax.models.layers import Mode, Outputs

Variables = dict[str, Any]
Builder = Callable[[int, tuple[int, int, int]], nn.Module]

MODELS: dict[str, Builder] = {
    **{f"plane{size}": functools.partial(plain.build, size) for size in plain.SIZES},
    **{f"resnet{depth}": functools.partial(resnet.build, depth) for depth in resnet.DEPTHS},
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network as a pair of pure functions; hashable, holds no arrays."""

    name: str
    module: nn.Module
    classes: int
    image_shape: tuple[int, int, int]
    dtype: str = "float32"

    def init(self, key: Array) -> Variables:
        """Fresh {"params", "batch_stats"}, float32, in one compiled call."""
        return _init(self, key)

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
          variables: {"params", "batch_stats"}.
          images: (B, H, W, channels), normalised.
          train: normalise by the batch and update the running statistics; else by these.
          axis_name: the devices' axis over which the batch's statistics are shared.

        Returns:
          Its outputs, and the batch statistics after it.
        """
        mode = Mode(train, axis_name, DTYPES[self.dtype])
        if not train:
            return self.module.apply(variables, images, mode), variables["batch_stats"]
        outputs, updated = self.module.apply(variables, images, mode, mutable=["batch_stats"])
        return outputs, updated["batch_stats"]


def build(
    name: str, classes: int, image_shape: tuple[int, int, int], dtype: str = "float32"
) -> Network:
    """The network called `name`, for (H, W, channels) images of `classes` classes.

    Raises:
      ValueError: unknown name or dtype, fewer than two classes, images that it cannot take.
    """
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown network {name!r}{hint} There are {', '.join(MODELS)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}")
    if classes < 2:
        raise ValueError(f"a classifier needs two classes or more, got {classes}")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape is (height, width, channels), got {image_shape}")
    return Network(name, MODELS[name](classes, image_shape), classes, tuple(image_shape), dtype)


def count_parameters(network: Network) -> int:
    """Trainable parameters, without building any of them."""
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


@functools.partial(jax.jit, static_argnums=0)
def _init(network: Network, key: Array) -> Variables:
    images = jnp.zeros((1, *network.image_shape))
    return dict(network.module.init(key, images, Mode(train=True)))
