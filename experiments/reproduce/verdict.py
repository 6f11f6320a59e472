"""Whether what was trained has the published order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from experiments import paired
from experiments.reproduce.tables import Claim

HOLDS, REVERSED, OPEN = "holds", "reversed", "open"
CONFIRMED, CONTRADICTED, UNDECIDED = "order confirmed", "contradicted", "undecided"
Accuracies = Mapping[int, float]  # by seed
_NO_SPREAD = 1e-9  # percent; equal differences are so but for rounding


class Judged(NamedTuple):
    """A claim and what the accuracies say of it.

    Args:
      better: the row that is said to be better, and `worse` the other.
      difference: mean of the seeds that both have, and half of its 95 % interval, in percent.
      seeds: how many those are.
      outcome: `HOLDS`, `REVERSED` or `OPEN`.
    """

    better: str
    worse: str
    difference: paired.Difference | None
    seeds: int
    outcome: str


def outcome(difference: paired.Difference | None) -> str:
    """Of a claimed gain: decided only where its interval excludes zero.

    Differences that are all equal leave it open: so few say nothing of how they spread.
    """
    if difference is None or difference[1] is None or difference[1] < _NO_SPREAD:
        return OPEN
    mean, half = difference
    return HOLDS if mean - half > 0 else REVERSED if mean + half < 0 else OPEN


def judge(claims: Sequence[Claim], accuracies: Mapping[str, Accuracies]) -> list[Judged]:
    """Each claim by the accuracies of the rows, by their labels."""
    judged = []
    for better, worse in claims:
        one, other = accuracies[better], accuracies[worse]
        difference = paired.difference(one, other)
        seeds = len(one.keys() & other.keys())
        judged.append(Judged(better, worse, difference, seeds, outcome(difference)))
    return judged


def verdict(judged: Sequence[Judged], made_up: bool = False) -> str:
    """In words: confirmed only where every claim holds, contradicted where one is reversed.

    Args:
      judged: the claims.
      made_up: whether the images are, which decide nothing.
    """
    outcomes = [one.outcome for one in judged]
    if REVERSED in outcomes and not made_up:
        return CONTRADICTED
    if outcomes and set(outcomes) == {HOLDS} and not made_up:
        return CONFIRMED
    return f"{UNDECIDED} at n = {min((one.seeds for one in judged), default=0)}"
