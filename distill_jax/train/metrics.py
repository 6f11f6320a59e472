"""Metrics as (sum, count) pairs: merged by addition on every device and host, divided once."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Pair = tuple[Array, Array]


class StepMetrics(NamedTuple):
    """What is counted of training steps.

    Args:
      loss: the loss.
      accuracy: top-1 of the network, then of its branches, deepest first.
      terms: the terms of the loss as they are.
      weighted: the terms as they stand in the loss, which is their sum.
      kept: the share of teachers that were kept; None where none is ever dropped.
      nonfinite: (steps that it spoilt, steps) of each possible cause.
    """

    loss: Pair
    accuracy: tuple[Pair, ...]
    terms: dict[str, Pair]
    weighted: dict[str, Pair]
    kept: Pair | None
    nonfinite: dict[str, Pair]


def mean_of(values: Array) -> Pair:
    """(sum, count) of per-example values (B,)."""
    values = jnp.asarray(values)
    if values.dtype == bool:
        values = values.astype(jnp.int32)
    return jnp.sum(values), jnp.asarray(values.size, jnp.int32)


def merge(a: Any, b: Any) -> Any:
    """Adds up the metrics of two parts."""
    return jax.tree.map(jnp.add, a, b)


def zeros_like(metrics: Any) -> Any:
    """The neutral element of `merge`; takes shapes too, as `jax.eval_shape` gives them."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)


def pack(tree: Any) -> dict[str, Array]:
    """Metrics as a vector for each type, so that one operation adds up all of it."""
    leaves = jax.tree.leaves(tree)
    kinds = sorted({str(leaf.dtype) for leaf in leaves})
    return {kind: jnp.stack([x for x in leaves if x.dtype == kind]) for kind in kinds}


def unpack(packed: dict[str, Array], like: Any) -> Any:
    """What `pack` made these vectors of; `like` has its structure."""
    left = {kind: iter(vector) for kind, vector in packed.items()}
    return jax.tree.map(lambda leaf: next(left[str(leaf.dtype)]), like)


def compute(metrics: dict[str, Pair]) -> dict[str, float]:
    """The means as Python floats; NaN where nothing was counted."""
    fetched = jax.device_get(metrics)
    return {k: float(s) / int(n) if n else float("nan") for k, (s, n) in fetched.items()}


def accuracy_names(exits: int) -> list[str]:
    """What the accuracy of a network is called, then those of its branches, deepest first."""
    return ["accuracy", *(f"branch{i}_accuracy" for i in range(1, exits))]


def record(metrics: StepMetrics) -> dict[str, float]:
    """The means by name, for the record of an epoch."""
    accuracies = zip(accuracy_names(len(metrics.accuracy)), metrics.accuracy, strict=True)
    pairs = {
        "loss": metrics.loss,
        **metrics.terms,
        **{f"weighted_{name}": pair for name, pair in metrics.weighted.items()},
        **dict(accuracies),
        **({} if metrics.kept is None else {"kept": metrics.kept}),
    }
    return compute(pairs)
