"""Modules that a method trains beside the student: one a teacher, or one a place of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from distill_jax.methods.base import Context
from distill_jax.models.basics import Mode, at_least_float32

_KINDS = ("params", "batch_stats")


def drawn(key: Array, module: nn.Module, shape: Any) -> Any:
    """Fresh variables of a module that takes (B, *shape), or a list of such, and a mode."""
    zeros = jax.tree.map(
        lambda one: jnp.zeros((1, *one)), shape, is_leaf=lambda one: isinstance(one, tuple)
    )
    return module.init(key, zeros, Mode(train=True))


def applied(module: nn.Module, own: Any, x: Any, context: Context) -> tuple[Any, Any]:
    """The outputs in float32 at least, and the statistics after them, {} where there are none.

    Args:
      module: takes `x` and a mode.
      own: its variables.
      x: an array or a list of such; the first one's type is that of the computation.
      context: of the step.
    """
    mode = Mode(True, context.axis_name, jax.tree.leaves(x)[0].dtype)
    y, updated = module.apply(own, x, mode, mutable=["batch_stats"])
    return jax.tree.map(at_least_float32, y), updated.get("batch_stats", {})


def by_kind(modules: Mapping[str, Any]) -> dict[str, Any]:
    """{module: variables} as a method's: {"params": {module: ...}, "batch_stats": ...}."""
    return {
        kind: {name: own[kind] for name, own in modules.items()}
        for kind in _KINDS
        if all(kind in own for own in modules.values())
    }


def of_module(variables: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The variables of one module among a method's."""
    return {kind: tree[name] for kind, tree in variables.items()}
