"""Progress of the stages: a live line on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import os
import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from distill_jax.train.reporter import Reporter

LOG_SECONDS = 10.0
WIDTH = 140  # of a file or a pipe


class _Lines(Reporter):
    """Log lines: the first of a stage, its epochs (every ten seconds at most), its end."""

    def __init__(self, console: Console):
        self.console, self.last = console, 0.0

    def stage_started(self, stages, step, steps, histories):
        epochs = stages[0].recipe.epochs
        self.total, self.last = steps * epochs, time.monotonic()
        going_on = f", going on at step {step}" if step else ""
        self.console.print(f"{describe(*stages)}: {epochs} epochs, {self.total} steps{going_on}")

    def notice(self, lines):
        for line in lines:
            self.console.print(line)

    def epoch_ended(self, stage, record):
        if time.monotonic() - self.last > LOG_SECONDS:
            self.last = time.monotonic()
            self.console.print(
                f"{describe(stage)}: step {record['step']}/{self.total}, {brief(record)}, "
                f"{record['images_per_second']:.0f} images/s"
            )

    def stage_ended(self, stage, record):
        self.console.print(f"{describe(stage)}: {ending(record)}")


class _Live(Reporter):
    """One live line a stage: step, epoch, loss, validation accuracy, images/s, time left."""

    def __init__(self, console: Console):
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[epoch]}{task.fields[found]}{task.fields[rate]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.bar.start()
        self.task = None

    def stage_started(self, stages, step, steps, histories):
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.steps, self.epochs = steps, stages[0].recipe.epochs
        self.task = self.bar.add_task(
            describe(*stages),
            total=steps * self.epochs,
            completed=step,
            epoch="",
            found=brief(histories[0][-1]) + " " if histories[0] else "",
            rate="",
        )

    def notice(self, lines):
        for line in lines:
            self.bar.console.print(line)

    def progress(self, step, images_per_second):
        epoch = min(step // self.steps + 1, self.epochs)
        self.bar.update(
            self.task,
            completed=step,
            epoch=f"epoch {epoch}/{self.epochs} ",
            rate=f"{images_per_second:.0f} images/s",
        )

    def epoch_ended(self, stage, record):
        self.bar.update(self.task, found=brief(record) + " ")

    def stage_ended(self, stage, record):
        self.bar.console.print(f"{describe(stage)}: {ending(record)}")

    def close(self):
        self.bar.stop()


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
    """The live line where the console is a terminal, log lines where it is not."""
    output = output or console()
    return _Live(output) if output.is_terminal else _Lines(output)


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
