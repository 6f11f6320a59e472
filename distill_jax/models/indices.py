"""Integers as inputs: tokens of a vocabulary, entities of a graph, or what else is looked up."""

from __future__ import annotations

from typing import Any

from flax import struct


@struct.dataclass
class Indices:
    """Integers that say which of so many things an input is; a pytree of one array.

    How many there are is part of its structure, so that a network knows how large a table to make,
    and data, networks and weights of different tables are told apart wherever structures are
    compared.

    Args:
      values: int32, of any shape, in [0, size).
      size: how many things there are.
      source: what they are, such as the digest of a vocabulary; indices of different sources do not
        fit together. "" where that is not asked.
    """

    values: Any
    size: int = struct.field(pytree_node=False)
    source: str = struct.field(pytree_node=False, default="")


def is_indices(x: Any) -> bool:
    """Whether something is `Indices`; a leaf, for `jax.tree`."""
    return isinstance(x, Indices)
