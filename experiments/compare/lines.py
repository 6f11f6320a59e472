"""The lines of the comparison, and the table that they make."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich import box
from rich.table import Table

from distill_jax.report.summary import half_width
from experiments.compare.settings import KD, PLAIN, SETTINGS
from experiments.compare.trained import Trained

HEADINGS = ("method", "paper", "ours", "over KD", "over plain", "step", "adapters")


class Line(NamedTuple):
    """A method; accuracies and differences in percent.

    Args:
      method: its name.
      seeds: how many.
      published: as found in the literature.
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
    over_kd: tuple[float, float | None] | None
    over_plain: tuple[float, float | None] | None
    step: float | None
    adapters: int


def lines_of(found: Sequence[Trained], seconds: Mapping[str, float]) -> list[Line]:
    """A line each, of what includes plain training and KD.

    Args:
      found: what each method gave.
      seconds: of its step, by the method's name; empty where they were not measured.
    """
    by_method = {one.method: one for one in found}
    return [_line(one, by_method[PLAIN], by_method[KD], seconds) for one in found]


def _line(one: Trained, plain: Trained, kd: Trained, seconds: Mapping[str, float]) -> Line:
    values = [100 * x for x in one.accuracies.values()]
    return Line(
        method=one.method,
        seeds=len(values),
        published=SETTINGS[one.method].figure(one.pair),
        mean=statistics.fmean(values),
        deviation=statistics.stdev(values) if len(values) > 1 else None,
        over_kd=difference(one, kd),
        over_plain=difference(one, plain),
        step=seconds[one.method] / seconds[KD] if seconds else None,
        adapters=one.adapters,
    )


def difference(one: Trained, other: Trained) -> tuple[float, float | None] | None:
    """The mean difference of the seeds that both have, and half of its interval, in percent."""
    seeds = one.accuracies.keys() & other.accuracies.keys()
    if one.method == other.method or not seeds:
        return None
    differences = [100 * (one.accuracies[seed] - other.accuracies[seed]) for seed in seeds]
    return statistics.fmean(differences), half_width(differences)


def cells(line: Line) -> tuple[str, ...]:
    """The line as text, in the order of `HEADINGS`."""

    def signed(pair):
        if pair is None:
            return "-"
        mean, half = pair
        return f"{mean:+.2f}" + ("" if half is None else f" ± {half:.2f}")

    spread = "" if line.deviation is None else f" ± {line.deviation:.2f}"
    return (
        line.method,
        "-" if line.published is None else f"{line.published:.2f}",
        f"{line.mean:.2f}{spread}",
        signed(line.over_kd),
        signed(line.over_plain),
        "-" if line.step is None else f"{line.step:.2f}",
        f"{line.adapters:,}",
    )


def rich_table(table: Sequence[Line], pair: str, teacher_accuracy: float | None) -> Table:
    """For a terminal of 80 columns."""
    teacher, _, student = pair.partition(":")
    known = "" if teacher_accuracy is None else f" ({100 * teacher_accuracy:.2f} %)"
    seeds = max(line.seeds for line in table)
    made = Table(
        title=f"{student} taught by {teacher}{known}: accuracy on the test set, %",
        caption=f"{seeds} seeds: mean ± deviation; paired differences ± half of the 95 % interval; "
        "step: its time, by KD 1",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for heading in HEADINGS:
        made.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for line in table:
        made.add_row(*cells(line))
    return made


def markdown(table: Sequence[Line]) -> str:
    """For a document."""
    rows = [HEADINGS, ("---", *("---:",) * (len(HEADINGS) - 1)), *map(cells, table)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
