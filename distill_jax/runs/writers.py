"""Tells writers of a run: functions of typed records, TensorBoard's among them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_jax.report import tensorboard
from distill_jax.report.page.record import StageRecord, stage_record
from distill_jax.report.writers import (
    EpochEnded,
    Record,
    StageEnded,
    StageInfo,
    StageStarted,
    Writer,
)
from distill_jax.runs.config import ConfigError
from distill_jax.runs.given import folder_name
from distill_jax.runs.plan import Plan
from distill_jax.runs.provenance import planned
from distill_jax.runs.records import guidance_of
from distill_jax.train.evaluation import StageResult
from distill_jax.train.reporter import Reporter
from distill_jax.train.stage import Stage

log = logging.getLogger("distill_jax")
FOLDER = "tensorboard"  # of the working directory
_OF_TEACHERS = ("temperature", "kd_weight", "survival")


class Writers(Reporter):
    """Tells each of several writers; one that fails is warned of once, and training goes on.

    Args:
      plan: the stages.
      writers: functions of a record.
    """

    def __init__(self, plan: Plan, writers: Sequence[Writer]):
        self.writers = writers
        guidance = guidance_of(plan)
        self.about = {x: _about(stage, guidance[x]) for x, stage in plan.stages.items()}
        self.begun: set[str] = set()
        self.warned: set[int] = set()

    def stage_started(self, stages, step, steps, histories):
        """Each stage with the epochs that it goes on after."""
        for stage, history in zip(stages, histories, strict=True):
            self.begun.add(stage.id)
            epochs = (self._epoch(stage, record) for record in history)
            self._tell(StageStarted(self.about[stage.id], tuple(epochs)))

    def epoch_ended(self, stage, record):
        """The numbers of the epoch."""
        self._tell(self._epoch(stage, record))

    def stage_ended(self, stage, record):
        """The numbers of the result; weights that were given begin and end at once."""
        if stage.id not in self.begun:
            self.stage_started([stage], 0, 0, [[]])
        tables = {
            f"{name}_{teacher}": value
            for name in ("agreement", "kl")
            for teacher, value in record.get(name, {}).items()
        }
        self._tell(StageEnded(self.about[stage.id], _numbers({**record, **tables})))

    def tell_again(self, stage: Stage, result: StageResult) -> None:
        """All that was known of a finished stage."""
        self.stage_started([stage], 0, 0, [result.history])
        self.stage_ended(stage, result.record)

    def _epoch(self, stage: Stage, record: Mapping[str, Any]) -> EpochEnded:
        left = {name: value for name, value in record.items() if name not in ("epoch", "step")}
        return EpochEnded(self.about[stage.id], record["epoch"], record["step"], _numbers(left))

    def _tell(self, record: Record) -> None:
        for i, writer in enumerate(self.writers):
            try:
                writer(record)
            except Exception as error:
                if i not in self.warned:
                    self.warned.add(i)
                    log.warning(
                        "the writer %s failed (%s: %s); training goes on, and what it fails at "
                        "from here on is not warned of again",
                        getattr(writer, "__name__", type(writer).__name__),
                        type(error).__name__,
                        error,
                    )


def check_writers(writers: Sequence[Writer]) -> None:
    """Raises ConfigError where what is given as writers is no list of functions."""
    if not isinstance(writers, list | tuple) or not all(map(callable, writers)):
        raise ConfigError(f"writers is a list of functions of one record, got {writers!r}")


def check_tensorboard(workdir: str | Path | None) -> None:
    """Raises ConfigError where there is no place for TensorBoard's files, or no tensorboardX."""
    if workdir is None:
        raise ConfigError("tensorboard is True and there is no workdir: expected one to write to")
    try:
        import tensorboardX  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"tensorboard is True and tensorboardX cannot be imported ({error}): expected it to be "
            "installed, as by pip install 'distill_jax[tensorboard]'"
        ) from error


@contextlib.contextmanager
def board(
    folder: Path | None, plan: Plan, done: Mapping[str, StageResult]
) -> Iterator[list[Reporter]]:
    """TensorBoard's files of a run, written while the context lasts.

    Args:
      folder: the working directory; None writes nothing.
      plan: the stages.
      done: the results of those that are finished; where their files are not, they are written.

    Yields:
      Who is to be told; nobody where nothing is written.
    """
    if folder is None:
        yield []
        return
    place = folder / FOLDER
    with tensorboard.tensorboard_writer(place, _teaching(plan)) as write:
        writers = Writers(plan, [write])
        for stage_id, result in done.items():
            if not tensorboard.is_complete(place / writers.about[stage_id].folder):
                writers.tell_again(plan.stages[stage_id], result)
        yield [writers]


def _teaching(plan: Plan) -> dict[str, list[StageRecord]]:
    """Of each stage itself and all that teach it or its teachers, in the order of training."""
    records = {about["stage"]: stage_record(about, None, []) for about in planned(plan)}
    teaching = {}
    for stage_id in plan.stages:
        found, left = set[str](), [stage_id]
        while left:
            if (own := left.pop()) not in found:
                found.add(own)
                left += (*plan.together[own], *plan.teachers[own])
        teaching[stage_id] = [record for x, record in records.items() if x in found]
    return teaching


def _about(stage: Stage, guidance: tuple[str, ...]) -> StageInfo:
    recipe = {**vars(stage.recipe), **vars(stage.recipe.optim)}
    hyper = {
        name: " ".join(map(str, value)) if isinstance(value, tuple) else value
        for name, value in recipe.items()
        if name not in ("optim", "dropping") and (stage.taught_by or name not in _OF_TEACHERS)
    }
    weights = zip((name for name, _ in stage.methods), stage.weights, strict=True)
    hyper |= {f"methods.{name}": weight for name, weight in weights}
    return StageInfo(
        stage.id,
        folder_name(stage.network.name, stage.id),
        stage.network.name,
        tuple(stage.taught_by),
        guidance,
        stage.seed,
        {} if stage.file else hyper,
    )


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """What of a record is a number."""
    return {
        name: float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
