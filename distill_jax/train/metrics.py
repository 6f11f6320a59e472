"""Metrics as (sum, count) pairs: merged by addition on every device and host, divided once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

Metrics = dict[str, tuple[Array, Array]]


def mean_of(values: Array) -> tuple[Array, Array]:
    """(sum, count) of per-example values (B,)."""
    values = jnp.asarray(values)
    if values.dtype == bool:
        values = values.astype(jnp.int32)
    return jnp.sum(values), jnp.asarray(values.size, jnp.int32)


def merge(a: Metrics, b: Metrics) -> Metrics:
    """The metrics of both parts together."""
    return jax.tree.map(jnp.add, a, b)


def zeros_like(metrics: Metrics) -> Metrics:
    """The neutral element of `merge`; takes shapes too, as `jax.eval_shape` gives them."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)


def compute(metrics: Metrics) -> dict[str, float]:
    """The means as Python floats; NaN where nothing was counted."""
    fetched = jax.device_get(metrics)
    return {k: float(s) / int(n) if n else float("nan") for k, (s, n) in fetched.items()}
