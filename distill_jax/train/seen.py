"""What networks see of a batch: augmented, from other views, beside partners, or mixed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from distill_jax import rng
from distill_jax.data.mixing import mixture
from distill_jax.methods.base import MixedLabels
from distill_jax.train.state import Batch

Preprocess = Callable[[Array, Any], Any]  # (keys (B,), inputs) -> what networks see of them

ASKED_AGAIN = ("view", "partner")  # the data needs for which a network is run again, in this order


class Seen(NamedTuple):
    """What the networks of a step see.

    Args:
      inputs: of the batch; frozen teachers see these too.
      own: the same by the name of each network in training, from a view of its own where a method
        needs that.
      others: by network and data need what it is run on besides, in this order.
      mixed: the other labels of mixed images.
    """

    inputs: Any
    own: dict[str, Any]
    others: dict[str, dict[str, Any]]
    mixed: MixedLabels | None = None


def look(
    preprocess: Preprocess,
    needs: Mapping[str, tuple[str, ...]],
    batch: Batch,
    key: Array,
    step: Array,
    *,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    axis_name: str | None = None,
) -> Seen:
    """What networks see of a batch; each view is drawn from a key stream of its own.

    An image is mixed with the one after it in the whole batch, whose order is random.

    Args:
      preprocess: see `make_train_step`.
      needs: the data needs of each network in training.
      batch: this device's share.
      key: of the seed.
      step: of training.
      mixup: α of mixup; 0 for none.
      cutmix: α of cutmix; 0 for none.
      axis_name: the devices' axis.
    """

    def plain(stream: str, inputs: Any) -> Any:
        keys = rng.per_example(rng.stream(key, stream, step), batch.position)
        return preprocess(keys, inputs)

    view, mixed = plain, None
    if mixup or cutmix:
        size = jax.eval_shape(functools.partial(plain, "augment"), batch.inputs).shape[1:3]
        weights, share = mixture(key, step, size, mixup=mixup, cutmix=cutmix)
        mixed = MixedLabels(following(batch.labels, axis_name), share)

        def view(stream, inputs):
            images = plain(stream, inputs)
            own = weights[None, :, :, None].astype(images.dtype)
            return own * images + (1 - own) * following(images, axis_name)

    inputs, own, others = view("augment", batch.inputs), {}, {}
    second = None
    if any("view" in wanted for wanted in needs.values()):
        second = view("augment view", batch.inputs)
    partners = None
    if batch.partners is not None:
        partners = view("augment partner", batch.partners)
    for name, wanted in needs.items():
        alone = "own_view" in wanted
        own[name] = view(f"augment {name}", batch.inputs) if alone else inputs
        given = {"view": second, "partner": partners}
        others[name] = {need: given[need] for need in ASKED_AGAIN if need in wanted}
    return Seen(inputs, own, others, mixed)


def following(x: Array, axis_name: str | None) -> Array:
    """What is at the next place of the whole batch for each (B, ...); the first for the last."""
    first = x[:1]
    if axis_name is not None:
        count = lax.axis_size(axis_name)
        first = lax.ppermute(first, axis_name, [((i + 1) % count, i) for i in range(count)])
    return jnp.concatenate([x[1:], first])
