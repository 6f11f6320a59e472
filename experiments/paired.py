"""Accuracies by seed, their paired differences, and the tables and files that show them."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from distill_jax.report.summary import half_width

Difference = tuple[float, float | None]  # the mean, and half of its 95 % interval


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """The mean difference of the seeds that both have, and half of its interval, in percent.

    The interval is by Student's t; None of one seed, and all of it is None where there is none.
    """
    seeds = one.keys() & other.keys()
    if not seeds:
        return None
    differences = [100 * (one[seed] - other[seed]) for seed in seeds]
    return statistics.fmean(differences), half_width(differences)


def mean_and_deviation(accuracies: Mapping[int, float]) -> tuple[float, float | None]:
    """Over seeds, in percent; the deviation is that of a sample, None of one seed."""
    values = [100 * value for value in accuracies.values()]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def with_deviation(mean: float, deviation: float | None) -> str:
    """Such as "65.00 ± 5.00"."""
    return f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def signed(found: Difference | None) -> str:
    """Such as "+5.00 ± 12.42"; a dash of none."""
    if found is None:
        return "-"
    mean, half = found
    return f"{mean:+.2f}" + ("" if half is None else f" ± {half:.2f}")


def rich_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", caption: str = ""
) -> Table:
    """For a terminal of 80 columns; the first column is of names."""
    made = Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for i, heading in enumerate(headings):
        made.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """For a document."""
    lines = [headings, ("---", *("---:",) * (len(headings) - 1)), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole, or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)
