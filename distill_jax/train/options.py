"""What training is asked: which stages, and by which means."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol

from distill_jax import data
from distill_jax.data import Dataset
from distill_jax.train import sharding
from distill_jax.train.recipe import Job
from distill_jax.train.reporter import Reporter
from distill_jax.train.scoring import Trained


class Checkpoints(Protocol):
    """Where a stage's state is saved and restored from; `runs.checkpoint.Checkpoints` is one."""

    def steps(self) -> list[int]:
        """Returns the steps that have a finished checkpoint, oldest first."""

    def save(self, step: int, arrays: Any, meta: dict[str, Any]) -> None:
        """Writes the checkpoint of `step`."""

    def restore(
        self, template: Any, among: Collection[int] | None = None
    ) -> tuple[Any, dict[str, Any]] | None:
        """Returns the newest checkpoint that can be believed, of the steps `among`; or None."""


TABLE_BYTES = 2**30  # the largest logit table that is made unasked
TEACHER_LOGITS = ("auto", "graph", "table")


class Asked(NamedTuple):
    """A stage to be trained.

    Args:
      job: what to train.
      teachers: what its teachers' stages gave.
      checkpoints: where to save and restore; None saves nothing.
      plain_accuracy: validation accuracy of the same network trained alone, where known; a teacher
        below it is warned of.
    """

    job: Job
    teachers: tuple[Trained, ...] = ()
    checkpoints: Checkpoints | None = None
    plain_accuracy: float | None = None


class Means(NamedTuple):
    """How stages are trained; nothing here decides what they learn.

    Args:
      topology: on which devices.
      teacher_logits: "graph" computes them at every step; "table" once, before the first, which
        needs images that never change; "auto" makes the table where it can be and is small.
      may_skip: steps whose numbers are not finite and may be passed over.
      due: whether to save, asked after every dispatch with the steps, epochs and seconds since the
        last save.
      reporter: told of progress.
      stop: asked after every dispatch.
    """

    topology: sharding.Topology = sharding.Topology()
    teacher_logits: str = "auto"
    may_skip: int = 0
    due: Callable[[int, float, float], bool] = lambda steps, epochs, seconds: False
    reporter: Reporter = Reporter()
    stop: Callable[[], bool] = lambda: False


def check_table(job: Job, dataset: Dataset, teacher_logits: str) -> bool:
    """Whether the stage is trained with a logit table.

    Raises:
      ValueError: one is asked for where images change, or another value of `teacher_logits`.
    """
    if teacher_logits not in TEACHER_LOGITS:
        raise ValueError(f"teacher_logits is one of {TEACHER_LOGITS}, got {teacher_logits!r}")
    if not job.teachers or teacher_logits == "graph":
        return False
    why = "" if job.recipe.augment == "none" else f"augment is {job.recipe.augment!r}"
    if isinstance(dataset.train.images, data.Streamed):
        why = "they are streamed, each epoch under other crops"
    if teacher_logits == "table" and why:
        raise ValueError(
            f"teacher_logits 'table' needs images that never change, but {why}; expected 'graph' "
            "or 'auto'"
        )
    numbers = len(dataset.train.labels) * len(job.teachers) * dataset.classes
    small = 4 * numbers <= TABLE_BYTES and job.recipe.epochs > 1
    return not why and (small or teacher_logits == "table")
