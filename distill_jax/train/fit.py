"""Stages from the first step to the best weights: one, or a population at once."""

from __future__ import annotations

import time
from collections.abc import Sequence

from distill_jax import data
from distill_jax.train.options import Asked, Means, check_table
from distill_jax.train.recipe import check
from distill_jax.train.scoring import Trained
from distill_jax.train.trainer import Group


class Interrupted(Exception):
    """Training was asked to stop; what it had is saved where there is a place for it."""


def train(asked: Sequence[Asked], dataset: data.Dataset, means: Means = Means()) -> list[Trained]:
    """Trains stages, or goes on where their newest common checkpoint is.

    Several are a population: they share network, teachers' networks and the structure of the
    recipe, and are trained at once with the results that each would have had alone.

    Args:
      asked: the stages.
      dataset: on what.
      means: how.

    Raises:
      ValueError: a stage cannot be trained, see `recipe.check` and `asked.check_table`.
      NotFiniteError: more steps were not finite than may be skipped; the last good state is saved.
      Interrupted: `means.stop` said so; the state is saved first.
    """
    for one in asked:
        check(one.job, dataset, means.topology)
        check_table(one.job, dataset, means.teacher_logits)
    group = Group(asked, dataset, means)
    group.restore()
    histories = [member.history for member in group.members]
    means.reporter.stage_started([one.job for one in asked], group.step, group.steps, histories)
    if not group.step:
        group.look_before()
    saver = _Saver(group, means)
    while group.epochs_done < group.recipe.epochs:
        for steps in group.train_epoch():
            saver.after(steps)
    return group.finish()


class _Saver:
    """Saves when it is due, and when training is asked to stop."""

    def __init__(self, group: Group, means: Means):
        self.group, self.means = group, means
        self.steps, self.since = 0, time.monotonic()

    def after(self, steps: int) -> None:
        """Told of steps just done."""
        self.steps += steps
        seconds, stopped = time.monotonic() - self.since, self.means.stop()
        if self.means.due(self.steps, self.steps / self.group.steps, seconds) or stopped:
            self.group.save()
            self.steps, self.since = 0, time.monotonic()
        if stopped:
            raise Interrupted
