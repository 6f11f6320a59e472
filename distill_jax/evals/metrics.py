"""Metrics of a task's own, over a whole split."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from distill_jax.data.task import Metric, sum_and_count


def measure(
    metrics: Mapping[str, Metric], logits: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Each metric's sum divided by its count; NaN where it counts nothing.

    Args:
      metrics: by name, (logits, labels) -> (sum, count).
      logits: (N, C) of every example of the split, each once.
      labels: (N,).

    Raises:
      DataError: a metric gives no pair of numbers.
    """
    pairs = {name: sum_and_count(name, x, logits, labels) for name, x in metrics.items()}
    return {name: total / count if count else math.nan for name, (total, count) in pairs.items()}
