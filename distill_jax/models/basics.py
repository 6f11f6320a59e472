"""What all networks and their layers have in common: how they are run, and what they show.

Images and feature maps are NHWC, kernels HWIO. Parameters and statistics are float32, or float64
where that is the computation's type. Modules are named after the entries of the PyTorch state dict
that they hold, so that the path of a leaf joined by dots is its PyTorch name
(`interop.torch_weights`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

Variables = dict[str, Any]  # {"params", "batch_stats"} of a network
FROZEN = "frozen"  # the collection of what layers make of their weights for a frozen network


class Mode(NamedTuple):
    """How a network is run: what the layers need to know besides their inputs."""

    train: bool = False
    axis_name: str | None = None  # devices over which BatchNorm shares its statistics
    dtype: Any = jnp.float32
    freezing: bool = False  # make what a network that is not trained needs, and look at no image


class Outputs(NamedTuple):
    """All that a network shows; what a caller does not use, XLA does not compute.

    Args:
      logits: (B, C) float32.
      feature: (B, F), the vector before the classifier; None of an outside network that names none.
      stages: the NHWC feature map at the end of each stage, after its last activation. Of a network
        that normalises and activates before its convolutions (WideResNet) the sums themselves, of
        one whose blocks end without an activation (MobileNetV2) what they give.
      branches: outputs of the branches of a network that has some, deepest first.
      stem: the NHWC map after the stem's last activation, before any pool; None where there is no
        stem. Networks without one of their own show their first convolution's.
      preacts: the maps whose ReLU the stages are, or that follows them (WideResNet: normalised by
        the next BatchNorm). ShuffleNetV2's are not shuffled yet, MobileNetV2's are the stages.
      embeddings: (B, ...) of tables what each example looked up, or the moduli of it; what `n3` and
        `l2` weigh. () where there is no such thing.
    """

    logits: Array
    feature: Array
    stages: tuple[Array, ...]
    branches: tuple[Outputs, ...] = ()
    stem: Array | None = None
    preacts: tuple[Array, ...] = ()
    embeddings: tuple[Array, ...] = ()


def on_top(
    upper: Outputs, stem: Array, stages: Sequence[Array], preacts: Sequence[Array]
) -> Outputs:
    """The outputs of a network, of its upper part's and of what is below it."""
    return upper._replace(
        stem=stem, stages=(*stages, *upper.stages), preacts=(*preacts, *upper.preacts)
    )


def check_size(name: str, image_shape: tuple[int, ...], smallest: int) -> None:
    """Raises ValueError where images are lower or narrower than a network takes them."""
    if min(image_shape[:2]) < smallest:
        raise ValueError(
            f"{name} needs images of {smallest}×{smallest} or more, "
            f"got {image_shape[0]}×{image_shape[1]}"
        )


def per_channel(vector: Array, x: Array) -> Array:
    """`vector` (C,) shaped to act on the last axis of `x` (..., C)."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def at_least_float32(x: Array) -> Array:
    """Half precision widened to float32; float32 and float64 as they are."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def frozen(module: nn.Module, make: Callable[[], Any]) -> Any:
    """What `make` makes of the weights of `module`, or made of them when its network was frozen."""
    if module.has_variable(FROZEN, "made"):
        return module.get_variable(FROZEN, "made")
    made = make()
    if module.is_mutable_collection(FROZEN):
        module.put_variable(FROZEN, "made", made)
    return made
