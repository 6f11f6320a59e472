"""How faithful a student is to its teachers, and how honest about itself; on logits, in NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

ECE_BINS = 15


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The fraction of examples whose largest logit is their label's; logits (N, C), labels (N,)."""
    return float(np.mean(np.argmax(logits, -1) == labels))


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log p(label), in nats; logits (N, C), labels (N,). NaN where a logit is not."""
    return float(np.mean(-_log_softmax(logits)[np.arange(len(labels)), labels]))


def agreement(logits: np.ndarray, others: np.ndarray) -> float:
    """Top-1 agreement: the fraction of examples to which both give the same class; (N, C) each.

    References:
      Stanton et al., Does Knowledge Distillation Really Work?, NeurIPS 2021.
    """
    return float(np.mean(np.argmax(logits, -1) == np.argmax(others, -1)))


def kl(teacher_logits: np.ndarray, logits: np.ndarray) -> float:
    """Mean KL(teacher || student) over examples at T = 1, in nats; (N, C) each."""
    log_p, log_q = _log_softmax(teacher_logits), _log_softmax(logits)
    p = np.exp(log_p)
    return float(np.mean(np.sum(np.where(p > 0, p * (log_p - log_q), 0.0), -1)))


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """Σ_bins (n_b/N) |accuracy_b - confidence_b| over 15 equal bins of the largest probability.

    NaN where a logit is not finite.

    References:
      Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    return error_of(reliability(logits, labels), len(labels))


def error_of(bins: dict[str, list[float]], examples: int) -> float:
    """The expected calibration error of what `reliability` gives for so many examples."""
    if not bins:
        return math.nan
    gaps = np.subtract(bins["right"], bins["confidence"])
    return float(np.sum(np.abs(gaps)) / examples)


def added(parts: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """What `reliability` gives for all, from what it gave for parts; empty where it is of one."""
    if len(parts) == 1 or not all(parts):
        return parts[0] if all(parts) else {}
    return {name: np.sum([part[name] for part in parts], 0).tolist() for name in parts[0]}


def reliability(logits: np.ndarray, labels: np.ndarray) -> dict[str, list[float]]:
    """What a reliability diagram is drawn of, sums over 15 equal bins of the largest probability.

    Returns:
      "count": examples, "right": those that are right, "confidence": the sum of their largest
      probabilities; empty where a logit is not finite.
    """
    probabilities = np.exp(_log_softmax(logits))
    if not np.isfinite(probabilities).all():
        return {}
    confidence, right = probabilities.max(-1), np.argmax(logits, -1) == labels
    # Bins are (a, b]: a confidence on an edge belongs to the bin below it.
    bins = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    sums = {"count": np.ones_like(confidence), "right": right, "confidence": confidence}
    return {name: np.bincount(bins, x, ECE_BINS).tolist() for name, x in sums.items()}


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # NaN out of what is not finite, and no warning
        shifted = np.asarray(logits, np.float64) - np.max(logits, -1, keepdims=True)
        return shifted - np.log(np.sum(np.exp(shifted), -1, keepdims=True))
