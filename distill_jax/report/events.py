"""A run for programs to read: one JSON object a line."""

from __future__ import annotations

import datetime
import json
import sys
from typing import Any, TextIO

from distill_jax.identity import finite
from distill_jax.report.estimate import Estimate
from distill_jax.train.reporter import Reporter


def json_reporter(stream: TextIO | None = None) -> Reporter:
    """Writes what happens as one JSON object a line, each as soon as it happens.

    Every object has "event" and "time" (ISO 8601, UTC). The events are run_started, stage_started,
    notice, epoch, stage_ended, failed and results. Those of a stage have its "stage" (id),
    "network", "teachers", "guidance" (the labels that use it) and "seed". A number that is not
    finite is null.

    Args:
      stream: where to; standard output where not given.
    """
    return _Events(sys.stdout if stream is None else stream)


class _Events(Reporter):
    def __init__(self, stream: TextIO):
        self.stream, self.run = stream, Estimate()
        self.guidance: dict[str, tuple[str, ...]] = {}

    def run_started(self, planned):
        self.run.run_started(planned)
        pairs = [
            pair for group in planned for pair in zip(group.stages, group.guidance, strict=True)
        ]
        self.guidance = {stage.id: labels for stage, labels in pairs}
        stages = [
            {**self._about(stage), **_length(stage, group.steps), "done": group.done}
            for group in planned
            for stage in group.stages
        ]
        self._write("run_started", {"stages": stages})

    def stage_started(self, stages, step, steps, histories):
        self.run.stage_started(stages, step)
        for stage in stages:
            numbers = {"step": step, **_length(stage, steps), "seconds_left": self._left()}
            self._write("stage_started", {**self._about(stage), **numbers})

    def notice(self, lines):
        self._write("notice", {"lines": [line.strip() for line in lines]})

    def progress(self, step, examples_per_second):
        self.run.progress(step)

    def epoch_ended(self, stage, record):
        self._write("epoch", {**self._about(stage), **record, "seconds_left": self._left()})

    def stage_ended(self, stage, record):
        self.run.settle([stage])
        self._write("stage_ended", {**self._about(stage), **record})

    def stage_failed(self, stages, why):
        self.run.settle(stages)
        for stage in stages:
            self._write("failed", {**self._about(stage), "why": why})

    def run_ended(self, rows):
        self._write("results", {"rows": rows})

    def _left(self) -> float | None:
        seconds = self.run.seconds_left()
        return None if seconds is None else round(seconds, 1)

    def _about(self, stage: Any) -> dict[str, Any]:
        return {**stage_fields(stage), "guidance": list(self.guidance.get(stage.id, ()))}

    def _write(self, event: str, fields: dict[str, Any]) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = finite({"event": event, "time": now, **fields})
        print(json.dumps(line, allow_nan=False), file=self.stream, flush=True)


def stage_fields(stage: Any) -> dict[str, Any]:
    """What tells a stage from others, for files and programs."""
    return {
        "stage": stage.id,
        "network": stage.network.name,
        "teachers": list(stage.taught_by),
        "seed": stage.seed,
    }


def _length(stage: Any, steps: int) -> dict[str, int]:
    epochs = stage.recipe.epochs
    return {"epochs": epochs, "steps": steps * epochs}
