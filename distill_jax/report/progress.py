"""Progress of a run: a live bar on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import importlib.util
import os
import time
from typing import Any

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from distill_jax.report.estimate import Estimate
from distill_jax.train.reporter import Reporter

LOG_SECONDS = 10.0
WIDTH = 140  # of a file or a pipe


class _Counted(Reporter):
    """Counts the stages of the run and times them."""

    def __init__(self) -> None:
        self.run = Estimate()

    def run_started(self, planned):
        self.run.run_started(planned)

    def stage_started(self, stages, step, steps, histories):
        self.run.stage_started(stages, step)

    def progress(self, step, examples_per_second):
        self.run.progress(step)

    def stage_ended(self, stage, record):
        self.run.settle([stage])

    def stage_failed(self, stages, why):
        super().stage_failed(stages, why)
        self.run.settle(stages)

    def named(self, *stages: Any) -> str:
        """Stages by their place in the run, and in words."""
        return f"{self.run.place(stages)}{describe(*stages)}"


class _Lines(_Counted):
    """Log lines: the first of a stage, its epochs (every ten seconds at most), its end."""

    def __init__(self, console: Console):
        super().__init__()
        self.console, self.last = console, 0.0

    def stage_started(self, stages, step, steps, histories):
        super().stage_started(stages, step, steps, histories)
        epochs = stages[0].recipe.epochs
        self.total, self.last = steps * epochs, time.monotonic()
        going_on = f", going on at step {step}" if step else ""
        length = f"{epochs} epochs, {self.total} steps{going_on}"
        self._say(f"{self.named(*stages)}: {length}{self._left()}")

    def notice(self, lines):
        for line in lines:
            self._say(line)

    def epoch_ended(self, stage, record):
        if time.monotonic() - self.last > LOG_SECONDS:
            self.last = time.monotonic()
            self._say(
                f"{self.named(stage)}: step {record['step']}/{self.total}, {brief(record)}, "
                f"{record['images_per_second']:.0f} examples/s{self._left()}"
            )

    def stage_ended(self, stage, record):
        super().stage_ended(stage, record)
        self._say(f"{self.named(stage)}: {ending(record)}")

    def _left(self) -> str:
        left = self.run.words()
        return f"; {left}" if left else ""

    def _say(self, line: str) -> None:
        self.console.print(shown(line, self.console), soft_wrap=True)  # one line, however long


class _ThreeLines(Progress):
    """A bar between a line above and one below, each cut to the width."""

    above = below = ""

    def get_renderable(self):
        if not self.tasks:
            return Group()
        above, below = (
            Text(line, no_wrap=True, overflow="ellipsis") for line in (self.above, self.below)
        )
        return Group(above, self.make_tasks_table(self.tasks), below)


class _Live(_Counted):
    """What is trained; how far it is; loss, validation accuracy, examples/s and the time left."""

    def __init__(self, console: Console):
        super().__init__()
        self.bar = _ThreeLines(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TextColumn("{task.fields[epoch]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self.bar.start()
        self.task = None
        self.found, self.rate = "", ""

    def stage_started(self, stages, step, steps, histories):
        super().stage_started(stages, step, steps, histories)
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.steps, self.epochs = steps, stages[0].recipe.epochs
        self.found, self.rate = brief(histories[0][-1]) if histories[0] else "", ""
        self.bar.above = shown(self.named(*stages), self.bar.console)
        self._below()
        self.task = self.bar.add_task("", total=steps * self.epochs, completed=step, epoch="")

    def notice(self, lines):
        for line in lines:
            self.bar.console.print(shown(line, self.bar.console))

    def progress(self, step, examples_per_second):
        super().progress(step, examples_per_second)
        self.rate = f"{examples_per_second:.0f} examples/s"
        self._below()
        epoch = min(step // self.steps + 1, self.epochs)
        self.bar.update(self.task, completed=step, epoch=f"epoch {epoch}/{self.epochs}")

    def epoch_ended(self, stage, record):
        self.found = brief(record)
        self._below()

    def stage_ended(self, stage, record):
        super().stage_ended(stage, record)
        self.notice([f"{self.named(stage)}: {ending(record)}"])

    def close(self):
        self.bar.stop()

    def _below(self) -> None:
        known = (self.found, self.rate, self.run.words())
        self.bar.below = ", ".join(text for text in known if text)


def console() -> Console:
    """Standard output; a file or a pipe is as wide as COLUMNS says, else wide enough for tables."""
    # Brackets in a path or a label are no markup.
    plain = Console(highlight=False, markup=False)
    if plain.is_terminal:
        return plain
    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdecimal() else 0
    return Console(highlight=False, markup=False, width=width or WIDTH)


def console_reporter(output: Console | None = None) -> Reporter:
    """A live bar where the console is a terminal or a notebook, log lines where it is not."""
    output = output or console()
    # In a notebook rich's live display needs these, and says nothing without.
    live = importlib.util.find_spec("ipywidgets") if output.is_jupyter else output.is_terminal
    return _Live(output) if live else _Lines(output)


def shown(text: str, console: Console) -> str:
    """The text with "?" for what the console's encoding does not have: no reason to end a run."""
    return text.encode(console.encoding, "replace").decode(console.encoding)


def describe(*stages: Any) -> str:
    """Stages that are trained at once, in words: networks, teachers, seeds."""
    names = list(dict.fromkeys(stage.network.name for stage in stages))
    teachers = dict.fromkeys(name for stage in stages for name in stage.taught_by)
    taught = f" taught by {'+'.join(teachers)}" if teachers else ""
    if len(names) > 1:
        frozen = [name for name in teachers if name not in names]
        taught = " teaching each other" + (f", taught by {'+'.join(frozen)}" if frozen else "")
    seeds, replicas = sorted({stage.seed for stage in stages}), len(stages) // len(names)
    at_once = "" if len(seeds) == replicas else f" ({replicas} at once)"
    listed = ", ".join(map(str, seeds))
    return f"{'+'.join(names)}{taught}, seed{'s' * (len(seeds) > 1)} {listed}{at_once}"


def brief(record: dict[str, Any]) -> str:
    """The epoch's loss and accuracy in a few words."""
    watched = "test" if "test_accuracy" in record else "valid"
    accuracy = record.get(f"{watched}_accuracy", record["train_accuracy"])
    name = watched if f"{watched}_accuracy" in record else "train"
    return f"loss {record['train_loss']:.4f}, {name} {100 * accuracy:.2f} %"


def ending(record: dict[str, Any]) -> str:
    """The stage's result in a few words."""
    valid = record["valid_accuracy"]
    first = "" if valid is None else f"valid {100 * valid:.2f} %, "
    if not record["epochs"]:
        return f"{first}test {100 * record['test_accuracy']:.2f} %, weights as they were given"
    return (
        f"{first}test {100 * record['test_accuracy']:.2f} %, best epoch {record['best_epoch']} "
        f"of {record['epochs']}, {record['seconds']:.1f} s"
    )
