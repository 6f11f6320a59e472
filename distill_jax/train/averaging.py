"""An exponential moving average of a network's variables: what is evaluated, kept and deployed.

Running statistics are averaged like the parameters. They are those of the weights of the last
steps, and what the averaged weights give has about the averaged statistics; timm and EfficientNet's
code do the same. Whatever of other collections is no floating-point number, such as a counter, is
the network's own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from distill_jax.models import Variables


def begin(variables: Variables) -> Variables:
    """The average before the first step: a copy of the variables, in float32 at least."""

    def copied(x: Any) -> Array:
        wide = jnp.promote_types(x.dtype, jnp.float32) if _is_averaged(x) else x.dtype
        return jnp.array(x, wide)

    return jax.tree.map(copied, variables)


def moved(average: Variables, variables: Variables, decay: Any, step: Any) -> Variables:
    """The average after a step: a + (1 - d) (v - a), d = min(decay, (1 + t) / (10 + t)).

    The decay grows with the step, so that the weights before the first steps are soon forgotten.

    Args:
      average: a, before it.
      variables: v, those of the network after it.
      decay: in (0, 1).
      step: t, the steps before it.
    """
    share = 1 - jnp.minimum(decay, (1 + step) / (10 + step))

    def move(old: Array, new: Array) -> Array:
        # By their difference, so that what does not move stays as it is to the bit.
        return old + share.astype(old.dtype) * (new.astype(old.dtype) - old)

    return jax.tree.map(
        lambda old, new: move(old, new) if _is_averaged(old) else new, average, variables
    )


def as_variables(average: Variables, variables: Variables) -> Variables:
    """The average in the types of the network's own variables."""
    return jax.tree.map(
        lambda own, like: own.astype(like.dtype) if _is_averaged(own) else own, average, variables
    )


def _is_averaged(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))
