"""Trials as runs: what training gave, and when it is not worth going on."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna

import distill_jax
from distill_jax.identity import plain
from distill_jax.runs.config import resolve, swept_fields
from distill_jax.runs.runner import StagesFailed
from distill_jax.train.fit import Interrupted
from distill_jax.train.reporter import Reporter, Several
from experiments.search.space import Fields, Point, config_of


class Outcome(NamedTuple):
    """What became of a trial.

    Args:
      accuracies: on the validation split, by seed; empty where it was not trained to the end.
      failed: why it could not be.
      pruned: whether it was ended early.
    """

    accuracies: dict[int, float] = {}
    failed: str = ""
    pruned: bool = False

    @property
    def value(self) -> float:
        """What is searched for: the mean over seeds."""
        return statistics.fmean(self.accuracies.values())


class Watch(Reporter):
    """Reports a trial's accuracy after each epoch of each seed, and notes when to end it.

    The value is the mean over the seeds so far, of each the best so far.

    Args:
      trial: of the study.
      network: whose accuracy counts.
    """

    def __init__(self, trial: optuna.Trial, network: str):
        self.trial, self.network = trial, network
        self.best: dict[int, float] = {}
        self.epochs, self.prune = 0, False

    def stage_started(self, stages, step, steps, histories):
        """Takes in the epochs that were trained before."""
        for stage, history in zip(stages, histories, strict=True):
            for record in history:
                self.epoch_ended(stage, record)

    def epoch_ended(self, stage, record):
        """Reports an epoch of the network."""
        value = record.get("valid_accuracy")
        if stage.network.name != self.network or stage.phase or value is None:
            return
        self.best[stage.seed] = max(value, self.best.get(stage.seed, 0.0))
        self.epochs += 1
        self.trial.report(statistics.fmean(self.best.values()), self.epochs)
        if record["epoch"] < stage.recipe.epochs:  # then little is saved by ending it
            self.prune = self.prune or self.trial.should_prune()


def train(
    fields: Fields,
    points: Sequence[Point],
    folder: Path,
    *,
    stop: Callable[[], bool],
    watch: Watch | None = None,
    reporter: Reporter | None = None,
    config_file: str = "",
) -> list[Outcome]:
    """Trains points of the space, several at once; teachers once for all trials of a folder.

    Args:
      fields: of the config that they share.
      points: one; several where the config can sweep them.
      folder: of the search.
      stop: asked now and then; where it says true the run saves and ends.
      watch: of a single point.
      reporter: told of the training.
      config_file: as `distill_jax.run` takes it.

    Raises:
      Interrupted: `stop` said so; what there is was saved.
      ConfigError, and others of `distill_jax.run`: it cannot be trained.
    """
    tell = Several(*filter(None, (watch, reporter)))
    pruned = (lambda: watch.prune) if watch is not None else (lambda: False)
    try:
        results = distill_jax.run(
            config_of(fields, points),
            workdir=place(folder, points),
            store=folder / "store",
            reporter=tell,
            stop=lambda: stop() or pruned(),
            config_file=config_file,
        )
    except StagesFailed as error:
        results = error.results
    except Interrupted:
        if stop() or not pruned():
            raise
        return [Outcome(pruned=True)]
    return [_outcome(results.rows, fields, point) for point in points]


def place(folder: Path, points: Sequence[Point]) -> Path:
    """Where points are trained: the same for the same, so that they go on there."""
    text = json.dumps(plain(points), sort_keys=True)
    return folder / "trials" / hashlib.sha256(text.encode()).hexdigest()[:12]


def network_of(fields: Fields, point: Point) -> str:
    """The network whose accuracy counts in a trial."""
    return resolve(config_of(fields, [point])).networks[-1]


def _outcome(rows: Sequence[Mapping[str, Any]], fields: Fields, point: Point) -> Outcome:
    swept = {name: value for name, value in point.items() if name in swept_fields(fields)}
    network = network_of(fields, point)
    own = [x for x in rows if x["network"] == network and plain(x["changes"]) == plain(swept)]
    if failed := [row["failed"] for row in own if row.get("failed")]:
        return Outcome(failed=failed[0])
    return Outcome({row["seed"]: row["valid_accuracy"] for row in own})
