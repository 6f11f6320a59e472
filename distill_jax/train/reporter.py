"""What is told of the progress of stages, and to whom."""

from __future__ import annotations

from typing import Any


class Reporter:
    """Is told of everything that happens and says nothing; the others build on it."""

    def stage_started(
        self, stages: list[Any], step: int, steps: int, histories: list[list[dict]]
    ) -> None:
        """A stage of `steps` steps an epoch, or several at once, begin or go on at `step`."""

    def notice(self, lines: list[str]) -> None:
        """Something to know, such as what was found before the first step."""

    def progress(self, step: int, images_per_second: float) -> None:
        """`step` steps of the stage are done."""

    def epoch_ended(self, stage: Any, record: dict[str, Any]) -> None:
        """An epoch of a stage was measured."""

    def stage_ended(self, stage: Any, record: dict[str, Any]) -> None:
        """A stage was trained and its weights are safe."""

    def close(self) -> None:
        """Nothing more will come."""


class Several(Reporter):
    """Tells each of several reporters."""

    def __init__(self, *reporters: Reporter):
        self.reporters = reporters

    def stage_started(self, stages, step, steps, histories):
        """Passed on."""
        for reporter in self.reporters:
            reporter.stage_started(stages, step, steps, histories)

    def notice(self, lines):
        """Passed on."""
        for reporter in self.reporters:
            reporter.notice(lines)

    def progress(self, step, images_per_second):
        """Passed on."""
        for reporter in self.reporters:
            reporter.progress(step, images_per_second)

    def epoch_ended(self, stage, record):
        """Passed on."""
        for reporter in self.reporters:
            reporter.epoch_ended(stage, record)

    def stage_ended(self, stage, record):
        """Passed on."""
        for reporter in self.reporters:
            reporter.stage_ended(stage, record)

    def close(self):
        """Passed on."""
        for reporter in self.reporters:
            reporter.close()
