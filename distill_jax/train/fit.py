"""A stage, or a population of stages, from the first step to the best weights."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

from distill_jax import data, processes
from distill_jax.train.evaluation import StageResult
from distill_jax.train.options import ReplicaInputs, TrainOptions
from distill_jax.train.trainer import Trainer


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop; what it had is saved where there is a place for it."""


def train(
    inputs: Sequence[ReplicaInputs], dataset: data.Dataset, options: TrainOptions = TrainOptions()
) -> list[list[StageResult]]:
    """Trains replicas, or goes on where their newest common checkpoint is.

    Several are a population: they share networks, teachers' networks, methods and the structure of
    the recipes, and are trained at once with the results that each would have had alone.

    Args:
      inputs: each a stage or those of a cycle, which `checks.check` has passed.
      dataset: on what.
      options: how.

    Raises:
      ValueError: a cache of teachers' outputs is asked for that cannot be.
      NotFiniteError: more steps were not finite than may be skipped; the last good state is saved.
      Interrupted: `options.stop` said so; the state is saved first.

    Returns:
      Of each replica the results of its stages.
    """
    trainer = Trainer(inputs, dataset, options)
    with contextlib.closing(trainer.feed):
        return _train(trainer, options)


def _train(trainer: Trainer, options: TrainOptions) -> list[list[StageResult]]:
    trainer.restore()
    networks = [progress for replica in trainer.replicas for progress in replica.networks]
    histories = [progress.history for progress in networks]
    stages = [progress.stage for progress in networks]
    options.reporter.stage_started(stages, trainer.step, trainer.steps, histories)
    if not trainer.step:
        trainer.preflight()
    saver = _Saver(trainer, options)
    while trainer.epochs_done < trainer.recipe.epochs:
        for steps in trainer.train_epoch():
            saver.after(steps)
    trainer.feed.close()  # before the test set is decoded
    return trainer.finish()


class _Saver:
    """Saves when it is time to, and when training is asked to stop."""

    def __init__(self, trainer: Trainer, options: TrainOptions):
        self.trainer, self.options = trainer, options
        self.steps, self.since = 0, time.monotonic()

    def after(self, steps: int) -> None:
        """Counts steps just done, and saves where it is time."""
        self.steps += steps
        seconds = processes.largest(time.monotonic() - self.since)
        stopped = self.options.stop()
        epochs = self.steps / self.trainer.steps
        if self.options.should_save(self.steps, epochs, seconds) or stopped:
            self.trainer.save()
            self.steps, self.since = 0, time.monotonic()
        if stopped:
            raise Interrupted
