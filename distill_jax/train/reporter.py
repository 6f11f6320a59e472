"""What is told of the progress of a run and of its stages, and to whom."""

from __future__ import annotations

from typing import Any, NamedTuple


class Planned(NamedTuple):
    """What one step trains, as a run has planned it.

    Args:
      stages: a stage, or those of a cycle.
      guidance: of each of them the labels of the guidances that use it.
      steps: of an epoch.
      cached: whether the teachers' outputs are computed once, not at every step.
      done: whether it was found finished.
    """

    stages: tuple[Any, ...]
    guidance: tuple[tuple[str, ...], ...]
    steps: int
    cached: bool
    done: bool


class Reporter:
    """Is told of everything that happens and says nothing; the others build on it."""

    def run_started(self, planned: list[Planned]) -> None:
        """A run begins or goes on; first of all."""

    def stage_started(
        self, stages: list[Any], step: int, steps: int, histories: list[list[dict]]
    ) -> None:
        """A stage of `steps` steps an epoch, or several at once, begin or go on at `step`."""

    def notice(self, lines: list[str]) -> None:
        """Something to know, such as what was found before the first step."""

    def progress(self, step: int, examples_per_second: float) -> None:
        """`step` steps of the stage are done."""

    def epoch_ended(self, stage: Any, record: dict[str, Any]) -> None:
        """An epoch of a stage was measured."""

    def stage_ended(self, stage: Any, record: dict[str, Any]) -> None:
        """A stage was trained and its weights are safe."""

    def stage_failed(self, stages: list[Any], why: str) -> None:
        """A stage cannot be trained to the end, nor those that need it; a notice by default."""
        self.notice([f"  failed: {why}"])

    def run_ended(self, rows: list[dict[str, Any]]) -> None:
        """All is done, or failed; the rows of the results."""

    def close(self) -> None:
        """Nothing more will come."""


class Several(Reporter):
    """Tells each of several reporters."""

    def __init__(self, *reporters: Reporter):
        self.reporters = reporters

    def _tell(self, hook: str, *arguments: Any) -> None:
        for reporter in self.reporters:
            getattr(reporter, hook)(*arguments)

    def run_started(self, planned):
        """Passed on."""
        self._tell("run_started", planned)

    def stage_started(self, stages, step, steps, histories):
        """Passed on."""
        self._tell("stage_started", stages, step, steps, histories)

    def notice(self, lines):
        """Passed on."""
        self._tell("notice", lines)

    def progress(self, step, examples_per_second):
        """Passed on."""
        self._tell("progress", step, examples_per_second)

    def epoch_ended(self, stage, record):
        """Passed on."""
        self._tell("epoch_ended", stage, record)

    def stage_ended(self, stage, record):
        """Passed on."""
        self._tell("stage_ended", stage, record)

    def stage_failed(self, stages, why):
        """Passed on."""
        self._tell("stage_failed", stages, why)

    def run_ended(self, rows):
        """Passed on."""
        self._tell("run_ended", rows)

    def close(self):
        """Passed on."""
        self._tell("close")
