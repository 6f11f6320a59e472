"""What a trained network makes of inputs that are as its data set has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import data
from distill_jax.changed import until_changed
from distill_jax.data.task import Images, text_of
from distill_jax.models import Network, Variables
from distill_jax.refusals import kind_and_line
from distill_jax.runs.ambient import pinned

BATCH = 256  # examples of a compiled call, at most


def logits_of(
    network: Network,
    variables: Variables,
    inputs: Any,
    preprocess: Callable[[Any], Any],
    precision: str = "default",
) -> np.ndarray:
    """The logits of each example, (N, C) float32, in batches.

    Args:
      network: the network.
      variables: its own.
      inputs: (N, ...) as the data set has them.
      preprocess: makes of a batch of them what the network sees.
      precision: of matrix products and convolutions.

    Raises:
      ValueError: no examples, or such as the network does not take.
    """
    inputs = jax.tree.map(_array, inputs)
    with pinned(network.dtype):
        _check(network, inputs, preprocess)
    n = len(jax.tree.leaves(inputs)[0])
    size = min(BATCH, 1 << (n - 1).bit_length())  # few sizes, each of which is compiled once
    forward = _program(network, preprocess)
    with pinned(network.dtype, precision):
        parts = data.parts(inputs, size)
        logits = [jax.device_get(forward(variables, part)) for part in parts]
    return np.concatenate(logits)[:n]


def _array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, data.Streamed) else np.asarray(leaf)


def images_of(preprocess: Callable[[Any], Any]) -> Images | None:
    """How images are preprocessed; None where it is by something else."""
    images = getattr(preprocess, "__self__", None)
    return images if isinstance(images, Images) else None


@until_changed(maxsize=32)
def _program(network: Network, preprocess: Callable[[Any], Any]) -> Callable[..., jax.Array]:
    def forward(variables, inputs):
        return network.apply(variables, preprocess(inputs))[0].logits.astype(jnp.float32)

    return jax.jit(forward)


def _check(network: Network, inputs: Any, preprocess: Callable[[Any], Any]) -> None:
    """Raises ValueError for inputs that are not as the network's data set has them."""
    leaves, what = jax.tree.leaves(inputs), f"inputs are {text_of(inputs)}"
    counts = {x.shape[0] if x.shape else 0 for x in leaves}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"{what}: expected one example or more, as many in each array")
    images = images_of(preprocess)
    if images is not None:
        _check_images(network, inputs, images.value_range, what)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), inputs)
    try:
        seen = jax.eval_shape(preprocess, one)
    except Exception as error:  # whatever somebody's code raises
        raise ValueError(f"{what}: they cannot be preprocessed, {kind_and_line(error)}") from error
    if text_of(seen) != text_of(network.inputs):
        raise ValueError(
            f"{what}: expected such of which preprocessing makes {text_of(network.inputs)}, for "
            f"one example, not {text_of(seen)}"
        )


def _check_images(
    network: Network, images: Any, value_range: tuple[float, float] | None, what: str
) -> None:
    """Raises ValueError for images of another shape or range: scaling would not tell."""
    kind = "uint8" if value_range is None else f"floats from {value_range[0]} to {value_range[1]}"
    right = getattr(images, "shape", ())[1:] == network.image_shape
    if right and value_range is None:
        right = images.dtype == np.uint8
    elif right and value_range is not None:
        right = np.issubdtype(images.dtype, np.floating)
        right = right and bool(((images >= value_range[0]) & (images <= value_range[1])).all())
    if not right:
        shape = ", ".join(map(str, ("N", *network.image_shape)))
        raise ValueError(f"{what}: expected images, {kind} ({shape}), as the data set has them")
