"""Named random streams: a draw is a function of (root key, name, step), nothing is handed on."""

from __future__ import annotations

import zlib

import jax
from jax import Array


def stream(key: Array, name: str, step: Array | int = 0) -> Array:
    """The key of stream `name` at `step`; independent across names and steps.

    A run that stops and goes on draws what it would have drawn, since no key is ever stored.
    """
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name.encode())), step)


def per_example(key: Array, positions: Array) -> Array:
    """One key per example from its position in the whole batch, (B,) -> (B,) keys.

    A shard that knows its positions draws what the unsharded batch would have drawn.
    """
    return jax.vmap(lambda position: jax.random.fold_in(key, position))(positions)
