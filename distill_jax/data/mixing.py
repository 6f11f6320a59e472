"""Mixtures of two images: how much of each there is, and where; a pure function of a key."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from distill_jax import rng


def mixture(
    key: Array, step: Array, size: tuple[int, int], *, mixup: float, cutmix: float
) -> tuple[Array, Array]:
    """The weights of the first image in the mixtures of a mini-batch.

    mixup: λ of every pixel, drawn from Beta(α, α). cutmix: 1, and 0 in a box whose sides are
    sqrt(1 - λ) of the image's, as far as the box lies within it. Where both are asked for each
    mini-batch has one of them, either as often.

    Args:
      key: of which the streams "mixup", "cutmix" and "mixing" are used.
      step: of training.
      size: (H, W).
      mixup: α of mixup, 0 for none.
      cutmix: α of cutmix, 0 for none; one of both is above 0.

    Returns:
      (H, W) float32 weights, and () their mean, the share of the first image.

    References:
      Zhang et al., mixup, ICLR 2018, 1710.09412; Yun et al., CutMix, ICCV 2019, 1905.04899.
    """
    drawn = []
    if mixup:
        share = jax.random.beta(rng.stream(key, "mixup", step), mixup, mixup)
        drawn.append((jnp.full(size, share), share))
    if cutmix:
        drawn.append(_box(rng.stream(key, "cutmix", step), size, cutmix))
    if len(drawn) == 1:
        return drawn[0]
    coin = jax.random.bernoulli(rng.stream(key, "mixing", step))
    return jax.tree.map(lambda one, other: jnp.where(coin, one, other), *drawn)


def _box(key: Array, size: tuple[int, int], alpha: float) -> tuple[Array, Array]:
    share_key, *place_keys = jax.random.split(key, 3)
    side = jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha))

    def inside(length: int, key: Array) -> Array:
        half = jnp.floor(length * side).astype(jnp.int32) // 2
        places, centre = jnp.arange(length), jax.random.randint(key, (), 0, length)
        return (centre - half <= places) & (places < centre + half)

    rows, columns = map(inside, size, place_keys)
    weights = 1 - (rows[:, None] & columns[None]).astype(jnp.float32)
    return weights, jnp.mean(weights)
