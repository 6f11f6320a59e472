"""What writers are told: typed records of the stages of a run and of their epochs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class StageInfo(NamedTuple):
    """A stage, as writers know it.

    Args:
      id: a digest of all that determines it, the same when the run goes on.
      folder: the name of its folder in the working directory, NETWORK-ID.
      network: whose it is.
      teachers: the names of its teachers.
      guidance: the labels of the guidances that use it.
      seed: of its weights, order and draws.
      hyper: its recipe, and the weights of its methods as "methods.NAME"; empty of given weights.
    """

    id: str
    folder: str
    network: str
    teachers: tuple[str, ...]
    guidance: tuple[str, ...]
    seed: int
    hyper: dict[str, bool | int | float | str]


class EpochEnded(NamedTuple):
    """An epoch of a stage was measured.

    Args:
      stage: which.
      epoch: from 1.
      step: the steps of the stage so far.
      values: what `metrics.jsonl` has of it, such as "train_loss" and "valid_accuracy"; NaN and
        infinities as they are.
    """

    stage: StageInfo
    epoch: int
    step: int
    values: dict[str, float]


class StageStarted(NamedTuple):
    """A stage begins, or goes on.

    Args:
      stage: which.
      history: the epochs that it goes on after; an earlier run told of them, and of others perhaps
        that were lost with it and are trained again.
    """

    stage: StageInfo
    history: tuple[EpochEnded, ...] = ()


class StageEnded(NamedTuple):
    """A stage was trained and its weights are safe, or they were given and are evaluated.

    Args:
      stage: which.
      values: the numbers that `results.json` has of it, such as "test_accuracy", "ece" and
        "agreement_TEACHER".
    """

    stage: StageInfo
    values: dict[str, float]


Record = StageStarted | EpochEnded | StageEnded
Writer = Callable[[Record], None]
