"""Modules that a method trains beside the student: one a teacher, or one a place of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from distill_jax.methods.base import Context
from distill_jax.models.basics import Mode, at_least_float32

_KINDS = ("params", "batch_stats")


def drawn(key: Array, module: nn.Module, shape: tuple[int, ...]) -> Any:
    """Fresh variables of a module that takes (B, *shape) and a mode."""
    return module.init(key, jnp.zeros((1, *shape)), Mode(train=True))


def applied(module: nn.Module, own: Any, x: Array, context: Context) -> tuple[Array, Any]:
    """The output in float32 at least, and the statistics after it, {} where it has none."""
    mode = Mode(True, context.axis_name, x.dtype)
    y, updated = module.apply(own, x, mode, mutable=["batch_stats"])
    return at_least_float32(y), updated.get("batch_stats", {})


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
