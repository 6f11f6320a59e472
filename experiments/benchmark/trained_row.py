"""Trains a whole row once, and says where its time went and how many operations it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import logging as absl_logging

import distill_jax
from distill_jax import data
from distill_jax.train.reporter import Reporter
from experiments.benchmark import flops, jax_steps

OFTEN = 5.0  # seconds between two epochs that are told of


class Timeline(Reporter):
    """Seconds by part of a run, without those of compilation, which are a part of their own.

    Args:
      begun: when the process was started, on the clock of `time.monotonic`.
      tell: told of the first step, of an epoch now and then, and of each stage.
    """

    def __init__(self, begun: float, tell: Callable[..., None]):
        self.begun, self.tell = begun, tell
        self.parts: dict[str, float] = {}
        self.stages: list[tuple[Any, int, bool]] = []  # with the steps done here, and its table
        self.since, self.compiled, self.told = begun, 0.0, 0.0
        self.steps, self.at, self.first = 0, 0, True
        self.cached: dict[str, bool] = {}
        self.resumed = False  # whether another process has done a part of the run

    @property
    def wall(self) -> float:
        """Seconds since the process was started."""
        return time.monotonic() - self.begun

    def mark(self, part: str) -> None:
        """What passed since the last mark belongs to `part`."""
        now, compiled = time.monotonic(), jax_steps.compiled_seconds()
        passed = now - self.since - (compiled - self.compiled)
        self.parts[part] = self.parts.get(part, 0.0) + passed
        self.since, self.compiled = now, compiled

    def run_started(self, planned):
        self.cached = {stage.id: one.cached for one in planned for stage in one.stages}
        self.resumed = any(one.done for one in planned)
        self.mark("set-up")

    def stage_started(self, stages, step, steps, histories):
        self.mark("set-up")
        self.steps, self.at = steps, step
        self.resumed |= step > 0
        about = {"stage": stages[0].network.name, "members": len(stages), "from_step": step}
        self.tell(wall=self.wall, resumed=self.resumed, **about)

    def notice(self, lines):
        self.mark("look at teachers and loss")

    def progress(self, step, images_per_second):
        self.mark("training")
        if self.first:
            self.first = False
            self.tell(wall=self.wall, first_step=self.wall)

    def epoch_ended(self, stage, record):
        self.mark("evaluation")
        if self.wall - self.told > OFTEN:
            self.told = self.wall
            kept = ("epoch", "train_accuracy", "valid_accuracy", "images_per_second")
            values = {key: record[key] for key in kept if key in record}
            self.tell(wall=self.wall, stage=stage.network.name, seed=stage.seed, **values)

    def stage_ended(self, stage, record):
        self.mark("end of stage")
        done = stage.recipe.epochs * self.steps - self.at
        self.stages.append((stage, done, self.cached[stage.id]))
        self.tell(
            wall=self.wall,
            stage=stage.network.name,
            seed=stage.seed,
            test_accuracy=record["test_accuracy"],
        )


def operations(timeline: Timeline, dataset: data.Dataset) -> dict[str, float]:
    """Floating-point operations of what was really run here, by kind.

    Steps look their teachers up where these were cached; each table is made in one pass over the
    training images; the validation images are seen once an epoch.
    """
    found = {"steps": 0.0, "tables": 0.0, "evaluation": 0.0}
    images = len(dataset.train.labels)
    for stage, steps, cached in timeline.stages:
        recipe, teachers = stage.recipe, stage.teachers
        found["steps"] += steps * flops.step(
            stage.network, () if cached else tuple(teachers), recipe.batch_size
        )
        if cached:
            found["tables"] += images * sum(flops.forward(teacher) for teacher in teachers)
        epochs = steps / timeline.steps
        seen = epochs * len(dataset.valid.labels) + len(dataset.test.labels)
        found["evaluation"] += seen * flops.forward(stage.network)
    return found


def train(
    config: Any, workdir: Path, cache: Path, begun: float, tell: Callable[..., None]
) -> dict[str, Any]:
    """Trains what a config asks for, or goes on with it, and tells of it; the last that it told.

    Args:
      config: of the run.
      workdir: of the run.
      cache: a folder for what is compiled.
      begun: when this process was started, on the clock of `time.monotonic`.
      tell: takes what is known, as keywords.
    """
    timeline = Timeline(begun, tell)
    jax_steps.set_up(str(cache))
    absl_logging.set_verbosity(absl_logging.WARNING)  # JAX tells of every platform it looks for
    timeline.mark("start")
    dataset = data.load(**config.dataset.to_dict())
    timeline.mark("data")
    results = distill_jax.run(config, workdir=workdir, dataset=dataset, reporter=timeline)
    timeline.mark("end of stage")
    found = {
        "wall": timeline.wall,
        "done": True,
        "resumed": timeline.resumed,
        "parts": {**timeline.parts, "compilation": timeline.compiled},
        "test_accuracy": [row["test_accuracy"] for row in results.rows],
        "flops": operations(timeline, dataset),
        "device": jax_steps.described(jax.devices()[0]),
    }
    tell(**found)
    return found
