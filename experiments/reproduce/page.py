"""What is printed and written: the list of tables, a table's lines, its verdict and its numbers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rich.table import Table as RichTable

from experiments import paired
from experiments.reproduce.budgets import BUDGETS, OWN, SMOKE
from experiments.reproduce.cost import hours
from experiments.reproduce.tables import Table
from experiments.reproduce.verdict import OPEN, Accuracies, Judged, judge, verdict

HEADINGS = ("row", "published", "ours", "over the one before", "order")
SHOWN = 3  # figures of a table in the list; of more the first and the last


class Line(NamedTuple):
    """A row; accuracies and differences in percent.

    Args:
      label: its name.
      published: accuracy, where a figure is at hand.
      mean: of ours, and `deviation` over seeds.
      over_last: mean difference of the same seed from the row before, half of its 95 % interval.
      order: what became of the published order of these two; "" where there is none.
    """

    label: str
    published: float | None
    mean: float
    deviation: float | None
    over_last: paired.Difference | None
    order: str


class Result(NamedTuple):
    """What a table came to.

    Args:
      table: the table.
      lines: its rows.
      judged: its claims.
      verdict: in words.
      about: how it was trained, as JSON values.
    """

    table: Table
    lines: list[Line]
    judged: list[Judged]
    verdict: str
    about: dict[str, Any]

    def numbers(self, accuracies: Mapping[str, Accuracies]) -> dict[str, Any]:
        """All of it as JSON values, with the accuracies by seed."""
        return {
            "table": self.table.name,
            "verdict": self.verdict,
            **self.about,
            "note": self.table.note,
            "accuracies": accuracies,
            "lines": [line._asdict() for line in self.lines],
            "claims": [one._asdict() for one in self.judged],
        }


def result_of(table: Table, accuracies: Mapping[str, Accuracies], about: dict[str, Any]) -> Result:
    """The lines, the claims and the verdict of the accuracies of a table's rows, by label."""
    judged = judge(table.claims, accuracies)
    by_pair = {frozenset(one[:2]): one.outcome for one in judged}
    lines, before = [], None
    for row in table.rows:
        own = accuracies[row.label]
        mean, deviation = paired.mean_and_deviation(own)
        over = paired.difference(own, accuracies[before]) if before else None
        order = by_pair.get(frozenset((row.label, before)), "")
        lines.append(Line(row.label, row.published, mean, deviation, over, order))
        before = row.label
    words = verdict(judged, made_up=about["budget"] == SMOKE)
    return Result(table, lines, judged, words, about)


def cells(line: Line) -> tuple[str, ...]:
    """The line as text, in the order of `HEADINGS`."""
    return (
        line.label,
        "-" if line.published is None else f"{line.published:.2f}",
        paired.with_deviation(line.mean, line.deviation),
        paired.signed(line.over_last),
        line.order,
    )


def shown(result: Result) -> Iterator[RichTable | str]:
    """For a terminal of 80 columns."""
    yield f"{result.table.name}: test accuracy on {result.about['dataset']}, %"
    yield paired.rich_table(HEADINGS, [cells(line) for line in result.lines])
    yield from said(result)


def markdown(result: Result) -> str:
    """A page of its own."""
    rows = [cells(line) for line in result.lines]
    listed = "".join(f"- {line}\n" for line in (*said(result), *claimed(result)))
    return f"# {result.table.name}\n\n{paired.markdown(HEADINGS, rows)}\n{listed}"


def said(result: Result) -> Iterator[str]:
    """What is to be known of the numbers, and the verdict, a line each."""
    about, table = result.about, result.table
    seeds = about["seeds"]
    yield (
        f"{seeds} seed{'s' * (seeds != 1)}: mean ± deviation; paired differences"
        + (" ± half of the 95 % interval" if seeds > 1 else ", without an interval")
    )
    yield (
        f"budget {about['budget']}, {about['epochs']} epochs, {about['dtype']}, "
        f"protocol {about['protocol']}, weights by {about['selection']}"
    )
    if about["only_teach"]:
        shared = "one training (seed 0) for all seeds of the student"
        how = "one training for each seed" if about["teachers"] == OWN else shared
        yield f"teachers and assistants {', '.join(about['only_teach'])}: {how}"
    if about["dataset"] != table.dataset:
        yield f"published on {table.dataset}, run on {about['dataset']}"
    yield f"students trained on {' and '.join(about['trained_on'])}"
    yield from filter(None, [table.note])
    yield f"{result.verdict}: {_counted(result)}"


def _counted(result: Result) -> str:
    """How many of the claims hold."""
    if result.about["budget"] == SMOKE:
        return "made-up images decide nothing"
    counts = {name: 0 for name in ("holds", "reversed", OPEN)}
    for one in result.judged:
        counts[one.outcome] += 1
    n = len(result.judged)
    holds = counts["holds"]
    return f"of {n} published order{'s' * (n != 1)} {holds} hold{'s' * (holds == 1)}, " + (
        f"{counts['reversed']} reversed, {counts[OPEN]} open"
    )


def claimed(result: Result) -> Iterator[str]:
    """Every claim and what became of it, a line each."""
    for one in result.judged:
        yield f"{one.better} over {one.worse}: {paired.signed(one.difference)}, {one.outcome}"


def listed(tables: Mapping[str, Table], given: argparse.Namespace) -> Iterator[str]:
    """A line for each table, of 80 columns at most, below a line of headings."""
    yield _columns("table", "data set", "published", *BUDGETS)
    for table in tables.values():
        known = (_hours(hours(table, given, budget)) for budget in BUDGETS)
        dataset = table.dataset.removeprefix("tfds:").removesuffix("2012")
        yield _columns(table.name, dataset, figures(table), *known)
    teachers = "teachers of their own" if given.teachers == OWN else "the same teachers"
    yield f"hours of {given.seeds} seeds with {teachers}, by the operations of the training steps"
    yield f"at {given.rate:g} GFLOP/s, two idle cores of an AMD EPYC (--rate): compilation, which a"
    yield "smoke run is mostly, evaluation and other work on the machine come on top"


def figures(table: Table) -> str:
    """The published figures in short."""
    known = [f"{row.published:g}" for row in table.rows if row.published is not None]
    if len(known) > SHOWN:
        return f"{known[0]} .. {known[-1]} ({len(known)})"
    return " ".join(known) or "the order"


def _columns(name: str, dataset: str, published: str, *numbers: str) -> str:
    return f"{name:<30}{dataset:<9} {published:<18}" + "".join(f"{x:>7}" for x in numbers)


def _hours(value: float | None) -> str:
    if value is None:
        return "-"
    return "<0.1" if value < 0.05 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
