"""Metrics of a task's own, over a whole split."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.data.task import Metric, sum_and_count

Measured = dict[str, tuple[float, float]]  # by name a mean, and of how much it is one


def measure(
    metrics: Mapping[str, Metric], logits: np.ndarray, labels: np.ndarray, inputs: Any
) -> Measured:
    """Each metric's sum divided by its count, and the count; NaN where it counts nothing.

    Args:
      metrics: by name, (logits, labels), or with inputs too, -> (sum, count).
      logits: (N, C) of examples, each once.
      labels: (N,).
      inputs: of the examples, as the data set has them.

    Raises:
      DataError: a metric gives no pair of numbers.
    """
    pairs = {name: sum_and_count(name, x, logits, labels, inputs) for name, x in metrics.items()}
    return {k: (total / count if count else math.nan, count) for k, (total, count) in pairs.items()}


def combined(parts: Sequence[Measured]) -> dict[str, float]:
    """The means over all parts, from those of each; of one part they are its own."""
    if len(parts) == 1:
        return {name: value for name, (value, _) in parts[0].items()}
    means = {}
    for name in parts[0]:
        pairs = [part[name] for part in parts if part[name][1]]
        count = sum(own for _, own in pairs)
        means[name] = sum(value * own for value, own in pairs) / count if count else math.nan
    return means
