"""Filtered ranks: where the right class stands among those that are not known to be right too."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class KnownAnswers:
    """All right classes of each question (head, relation), and the ranks that are left by them.

    Args:
      keys: (M,) of the questions, in order, see `known_answers`.
      answers: (M,) a right class of each.
      relations: how many there are.
    """

    keys: np.ndarray
    answers: np.ndarray
    relations: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "_last", {})  # the ranks of the logits that were seen last

    def ranks(
        self, logits: np.ndarray, labels: np.ndarray, inputs: Mapping[str, Any]
    ) -> np.ndarray:
        """The rank of each label, (N,) float64 from 1; of equals the mean rank.

        Other right answers to the same question do not count. NaN where a logit is not finite.

        Args:
          logits: (N, C).
          labels: (N,).
          inputs: {"head", "relation"}, `Indices` of (N,).
        """
        last: dict[str, Any] = self._last  # type: ignore[attr-defined]
        if last and last["logits"]() is logits:
            return last["ranks"]
        rows = np.arange(len(labels))
        own = logits[rows, labels][:, None]
        higher = np.sum(logits > own, -1)
        equal = np.sum(logits == own, -1)
        keys = _keys(inputs["head"].values, inputs["relation"].values, self.relations)
        first, end = (np.searchsorted(self.keys, keys, side) for side in ("left", "right"))
        counts = end - first
        row = np.repeat(rows, counts)
        place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        known = self.answers[np.repeat(first, counts) + place]
        row, known = (x[known != labels[row]] for x in (row, known))
        others, of_label = logits[row, known], own[row, 0]
        higher = higher - np.bincount(row[others > of_label], minlength=len(rows))
        equal = equal - np.bincount(row[others == of_label], minlength=len(rows))
        finite = np.isfinite(logits).all(-1)
        ranks = np.where(finite, 1 + higher + (equal - 1) / 2, np.nan)
        last.update(logits=weakref.ref(logits), ranks=ranks)
        return ranks


def known_answers(
    heads: np.ndarray, kinds: np.ndarray, answers: np.ndarray, relations: int
) -> KnownAnswers:
    """Sorts the right answers, (M,) classes, to questions of (M,) heads and relations."""
    keys = _keys(heads, kinds, relations)
    pairs = np.unique(np.stack([keys, answers.astype(np.int64)], 1), axis=0)
    return KnownAnswers(pairs[:, 0].copy(), pairs[:, 1].copy(), relations)


def _keys(heads: Any, kinds: Any, relations: int) -> np.ndarray:
    return np.asarray(heads, np.int64) * relations + np.asarray(kinds, np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class ReciprocalRank:
    """The mean of 1 / rank, a metric of a task."""

    known: KnownAnswers

    def __call__(self, logits: np.ndarray, labels: np.ndarray, inputs: Any) -> tuple[float, int]:
        """(sum, count)."""
        return float(np.sum(1 / self.known.ranks(logits, labels, inputs))), len(labels)


@dataclasses.dataclass(frozen=True, eq=False)
class Hits:
    """The share of ranks of at most `most`, a metric of a task."""

    known: KnownAnswers
    most: int

    def __call__(self, logits: np.ndarray, labels: np.ndarray, inputs: Any) -> tuple[float, int]:
        """(sum, count)."""
        ranks = self.known.ranks(logits, labels, inputs)
        hits = np.where(np.isnan(ranks), np.nan, ranks <= self.most)
        return float(np.sum(hits)), len(labels)


def rank_metrics(known: KnownAnswers) -> dict[str, Any]:
    """MRR and Hits@1, 3 and 10."""
    return {"mrr": ReciprocalRank(known), **{f"hits{k}": Hits(known, k) for k in (1, 3, 10)}}
