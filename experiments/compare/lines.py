"""The lines of the comparison, and the table that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.table import Table

from experiments import paired
from experiments.compare.settings import DATASET, KD, PLAIN, SETTINGS
from experiments.compare.trained import Trained

HEADINGS = ("method", "paper", "ours", "over KD", "over plain", "step", "adapters")


class Line(NamedTuple):
    """A method; accuracies and differences in percent.

    Args:
      method: its name.
      seeds: how many.
      published: as found in the literature; None of another data set than its own.
      mean: of ours, and `deviation` over seeds.
      over_kd: mean difference of the same seed, (mean, half of its 95 % interval).
      over_plain: likewise.
      step: seconds of a step over those of one by KD; None where it was not measured.
      adapters: parameters that are trained beside the student.
    """

    method: str
    seeds: int
    published: float | None
    mean: float
    deviation: float | None
    over_kd: paired.Difference | None
    over_plain: paired.Difference | None
    step: float | None
    adapters: int


def lines_of(
    found: Sequence[Trained], seconds: Mapping[str, float], dataset: str = DATASET
) -> list[Line]:
    """A line each, of what includes plain training and KD.

    Args:
      found: what each method gave.
      seconds: of its step, by the method's name; empty where they were not measured.
      dataset: on which; published figures are of one alone.
    """
    by_method = {one.method: one for one in found}
    made = [_line(one, by_method[PLAIN], by_method[KD], seconds) for one in found]
    comparable = dataset.removeprefix("tfds:") == DATASET
    return made if comparable else [line._replace(published=None) for line in made]


def _line(one: Trained, plain: Trained, kd: Trained, seconds: Mapping[str, float]) -> Line:
    mean, deviation = paired.mean_and_deviation(one.accuracies)
    return Line(
        method=one.method,
        seeds=len(one.accuracies),
        published=SETTINGS[one.method].figure(one.pair),
        mean=mean,
        deviation=deviation,
        over_kd=_over(one, kd),
        over_plain=_over(one, plain),
        step=seconds[one.method] / seconds[KD] if seconds else None,
        adapters=one.adapters,
    )


def _over(one: Trained, other: Trained) -> paired.Difference | None:
    return None if one is other else paired.difference(one.accuracies, other.accuracies)


def cells(line: Line) -> tuple[str, ...]:
    """The line as text, in the order of `HEADINGS`."""
    return (
        line.method,
        "-" if line.published is None else f"{line.published:.2f}",
        paired.with_deviation(line.mean, line.deviation),
        paired.signed(line.over_kd),
        paired.signed(line.over_plain),
        "-" if line.step is None else f"{line.step:.2f}",
        f"{line.adapters:,}",
    )


def rich_table(
    table: Sequence[Line], pair: str, dataset: str, teacher_accuracy: float | None
) -> Table:
    """For a terminal of 80 columns."""
    teacher, _, student = pair.partition(":")
    known = "" if teacher_accuracy is None else f" ({100 * teacher_accuracy:.2f} %)"
    seeds = max(line.seeds for line in table)
    spread = "1 seed: paired differences, without an interval"
    if seeds > 1:
        spread = f"{seeds} seeds: mean ± deviation; paired differences ± half of the 95 % interval"
    return paired.rich_table(
        HEADINGS,
        [cells(line) for line in table],
        title=f"{student} taught by {teacher}{known}: test accuracy on {dataset}, %",
        caption=f"{spread}; step: its time, by KD 1",
    )


def markdown(table: Sequence[Line]) -> str:
    """For a document."""
    return paired.markdown(HEADINGS, [cells(line) for line in table])
