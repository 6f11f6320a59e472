"""What training is given: which stages, and how they are computed."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from distill_jax import data
from distill_jax.data import Dataset
from distill_jax.models import LogitsTable
from distill_jax.train import sharding
from distill_jax.train.evaluation import StageResult
from distill_jax.train.reporter import Reporter
from distill_jax.train.stage import Stage, frozen_teachers, needs_of
from distill_jax.train.teachers import TeacherOutputs

CACHE_BYTES = 2**30  # the largest cache of teachers' outputs that is made unasked
TEACHER_LOGITS = ("auto", "graph", "table")


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


class StageInputs(NamedTuple):
    """A stage to be trained, with what it is trained from.

    Args:
      stage: what to train.
      teachers: the results of its frozen teachers' stages.
      plain_accuracy: validation accuracy of the same network trained alone, where known; a teacher
        below it is warned of.
      start: what it starts from: `StageResult.whole` of the phase before it, or of initial weights
        {"network": variables}, in which some may lack; what there is not is drawn.
    """

    stage: Stage
    teachers: tuple[StageResult, ...] = ()
    plain_accuracy: float | None = None
    start: dict[str, Any] = {}


class ReplicaInputs(NamedTuple):
    """What one step trains: a stage, or those of a cycle.

    Args:
      stages: they, with what each is trained from.
      checkpoints: where to save and restore them, as one; None saves nothing.
    """

    stages: tuple[StageInputs, ...]
    checkpoints: Checkpoints | None = None


class TrainOptions(NamedTuple):
    """How stages are computed; nothing here decides what they learn.

    Args:
      topology: on which devices.
      teacher_logits: "graph" computes teachers' outputs at every step; "table" once, before the
        first, which needs images that never change; "auto" caches them where they can be and fit.
      max_nonfinite_steps: steps whose numbers are not finite and may be passed over.
      should_save: whether to save, asked after every dispatch with the steps, epochs and seconds
        since the last save.
      reporter: told of progress.
      stop: asked after every dispatch.
      workers: processes that decode streamed images of training; 0 decodes them in threads.
    """

    topology: sharding.Topology = sharding.Topology()
    teacher_logits: str = "auto"
    max_nonfinite_steps: int = 0
    should_save: Callable[[int, float, float], bool] = lambda steps, epochs, seconds: False
    reporter: Reporter = Reporter()
    stop: Callable[[], bool] = lambda: False
    workers: int = 0


def caches_teachers(stages: Sequence[Stage], dataset: Dataset, teacher_logits: str) -> bool:
    """Whether stages that are trained together have a cache of their frozen teachers' outputs.

    Raises:
      ValueError: one is asked for where images change or the machine's memory would not hold it, or
        another value of `teacher_logits`.
    """
    if teacher_logits not in TEACHER_LOGITS:
        raise ValueError(f"teacher_logits is one of {TEACHER_LOGITS}, got {teacher_logits!r}")
    tables = [x.name for x in frozen_teachers(stages) if isinstance(x, LogitsTable)]
    if not frozen_teachers(stages) or (teacher_logits == "graph" and not tables):
        return False
    recipe = stages[0].recipe
    why = "" if recipe.augment == "none" else f"augment is {recipe.augment!r}"
    if dataset.task is not None and not dataset.task.is_fixed:
        why = "the task's preprocessing uses its key or tells training from evaluation"
    if recipe.mixup or recipe.cutmix:
        why = "they are mixed by recipe.mixup or recipe.cutmix"
    if isinstance(dataset.train.images, data.Streamed):
        why = "they are streamed, each epoch under other crops"
    if tables and (why or teacher_logits == "graph"):
        why = why or "teacher_logits is 'graph'"
        raise ValueError(
            f"{tables[0]} is a file of logits, one row an example as it is, but {why}: expected "
            "examples that never change, and teacher_logits 'table' or 'auto'"
        )
    if tables:
        return True
    if teacher_logits == "table" and why:
        raise ValueError(
            f"teacher_logits 'table' needs images that never change, but {why}; expected 'graph' "
            "or 'auto'"
        )
    if why:
        return False
    shapes = jax.tree.leaves(cache_shapes(stages, len(dataset.train.labels)))
    size = sum(x.size * x.dtype.itemsize for x in shapes)
    if teacher_logits == "table":
        _check_size(size)
        return True
    return recipe.epochs > 1 and size <= CACHE_BYTES


def _check_size(size: int) -> None:
    """Refuses a table for which this machine has not the memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise ValueError(
            f"teacher_logits 'table' would take {size / 2**30:.1f} GiB, and this machine has "
            f"{memory / 2**30:.1f} GiB of memory: expected 'graph' or 'auto'"
        )


def cache_shapes(stages: Sequence[Stage], examples: int) -> TeacherOutputs:
    """The shapes of the frozen teachers' outputs for a training split of `examples` images."""
    teachers, needs = frozen_teachers(stages), needs_of(stages)
    size = examples, len(teachers), stages[0].network.classes
    logits: Any = jax.ShapeDtypeStruct(size, np.float32)
    if not needs:
        return TeacherOutputs(logits, ({},) * len(teachers))
    features = tuple(
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((examples, *x.shape[1:]), x.dtype),
            {name: getattr(teacher.output_shapes, name) for name in needs},
        )
        for teacher in teachers
    )
    return TeacherOutputs(logits, features)
