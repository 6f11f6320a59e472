"""The results of a run, over seeds, as one table that fits where it is shown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, RenderableType
from rich.jupyter import JupyterMixin
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from distill_jax.report.summary import Row, summarise

LABEL = 30  # characters of a guidance for which other columns go, where it has as many
WRAPPED = 18  # of a list of teachers or branches, before it is wrapped
NARROWEST = 12  # lines into which a label is broken; where there is no room, there is no table


def title(rows: list[Row]) -> str:
    """What the table shows, and how its weights were chosen."""
    chosen = {
        "validation": "weights of the best validation epoch, test set scored once",
        "test": "weights of the best TEST epoch, as the papers' codes choose them: biased upwards",
        "last": "weights of the last epoch",
    }[rows[0]["selection"]]
    return f"Top-1 accuracy on the test set, protocol {rows[0]['protocol']}; {chosen}"


def results_table(rows: list[Row], title: str = "") -> ResultsTable:
    """The summary as a table for rich and for notebooks; accuracies in percent of the test set."""
    return ResultsTable(rows, title)


class Column(NamedTuple):
    """A column of the table.

    Args:
      name: what the note on columns that were left out calls it.
      heading: lines.
      cells: a text each line of the table.
      most: characters after which cells are wrapped; None never wraps them.
      justify: "left" or "right".
    """

    name: str
    heading: str
    cells: list[str]
    most: int | None = None
    justify: Any = "right"

    @property
    def longest(self) -> int:
        """The width of its widest cell; some characters take two places."""
        return max(map(cell_len, self.cells), default=0)

    @property
    def width(self) -> int:
        """The width that it takes."""
        cells = self.longest if self.most is None else min(self.longest, self.most)
        return max(cells, *map(cell_len, self.heading.splitlines()))


class ResultsTable(JupyterMixin):
    """The summary of results; which columns it has depends on the width that it is given.

    Args:
      rows: of `Results`.
      title: above it.
    """

    def __init__(self, rows: list[Row], title: str = ""):
        self.title, self.summary = title, summarise(rows)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        widest = _total(self._all()) + 1
        return Measurement(min(40, options.max_width), min(widest, options.max_width))

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        shown = self.columns(options.max_width)
        if self.title:
            yield Text(self.title, style="italic")
        room = options.max_width - _total(shown[1:])
        if room >= min(NARROWEST, shown[0].width) + 4:
            yield _rendered(shown, room - 4)
        else:
            yield from _listed(shown)
        for line in self.notes(options.max_width):
            yield Text(line)

    def columns(self, width: int) -> list[Column]:
        """Those that fit; guidance, network, accuracy and gain are among them at any width."""
        columns = self._all()
        names = [column.name for column in columns]
        for name in self._dispensable(names):
            if _total(columns) < width:
                break
            columns = [column for column in columns if column.name != name]
        flat = [column._replace(heading=" ".join(column.heading.split())) for column in columns]
        return flat if _total(flat) < width else columns

    def notes(self, width: int) -> list[str]:
        """What is to be known of the table at a width, a line each."""
        lines, counts = [], {row["gain_seeds"] for row in self.summary if row["gain_seeds"]}
        if max(counts, default=0) > 1:
            n = f"{max(counts)}" if len(counts) == 1 else "n"
            lines.append(
                f"gain: mean difference over {n} seeds ± half of its 95 % interval, Student's t"
            )
        if 1 in counts:
            lines.append("gain: one seed has no interval")
        if any(row["best"] for row in self.summary):
            lines.append("*: the best of its sweep by validation accuracy, the first of equals")
        shown = {column.name for column in self.columns(width)}
        if (failed := sum(row["failed"] for row in self.summary)) and "seeds" not in shown:
            lines.append(f"{failed} more could not be trained to the end")
        if left := [column.name for column in self._all() if column.name not in shown]:
            lines.append(f"left out, but in results.json: {', '.join(left)}")
        return lines

    def _dispensable(self, names: list[str]) -> list[str]:
        """The columns that may go, in the order in which they do."""
        # Seeds that failed are hidden last.
        failed = any(row["failed"] for row in self.summary)
        first = ["parameters", "last epoch", "teachers"]
        first.insert(len(first) if failed else 2, "seeds")
        measured = [name for name in reversed(names) if name.startswith("test ")]
        return [name for name in (*first, "branches", *measured) if name in names]

    def _all(self) -> list[Column]:
        summary = self.summary
        metrics = list(dict.fromkeys(name for row in summary for name in row["metrics"]))
        counts = {row["gain_seeds"] for row in summary if row["gain_seeds"]}
        gain = "gain over\nnone, 95 %" if max(counts, default=0) > 1 else "gain over\nnone"

        def column(name, heading, text, *others):
            return Column(name, heading, [text(row) for row in summary], *others)

        columns = [
            column("guidance", "guidance", lambda row: row["guidance"], LABEL, "left"),
            column("network", "network", lambda row: row["network"], None, "left"),
            column("teachers", "teachers", _teachers, WRAPPED, "left"),
            column("parameters", "parameters", _parameters),
            column("seeds", "seeds", _seeds),
            column("accuracy", "test\naccuracy %", _accuracy),
            column("last epoch", "last\nepoch %", lambda row: _percent(row["last_accuracy"])),
            column("gain", gain, lambda row: _gain(row, len(counts) > 1)),
            *(
                column(f"test {name}", f"test\n{name}", lambda row, name=name: _metric(row, name))
                for name in metrics
            ),
        ]
        if any(row["branches"] for row in summary):
            columns.append(column("branches", "branches %", _branches, WRAPPED))
        if any(row["best"] for row in summary):
            columns.insert(5, column("validation", "valid\naccuracy %", _validation))
        return columns


def _total(columns: list[Column]) -> int:
    """What columns take of a table's width: borders and padding are three characters each."""
    return sum(column.width + 3 for column in columns)


def _listed(columns: list[Column]) -> Iterator[RenderableType]:
    """The lines one below the other, for where there is no room for a table."""
    for i, label in enumerate(columns[0].cells):
        others = (
            f"{' '.join(column.heading.split())}: {column.cells[i].strip()}"
            for column in columns[1:]
            if column.cells[i].strip()
        )
        yield Text(f"{label}; {'; '.join(others)}")


def _rendered(columns: list[Column], room: int) -> Table:
    """The columns as rich's table; the labels are wrapped in the room that is left to them."""
    guidance, *others = columns
    labels = ["\n".join(_wrapped(label, room)) for label in guidance.cells]
    table = Table(show_lines=labels != guidance.cells)
    table.add_column(guidance.heading, no_wrap=True)
    for column in others:
        table.add_column(
            column.heading,
            justify=column.justify,
            width=column.width,
            no_wrap=column.most is None,
        )
    for cells in zip(labels, *(column.cells for column in others), strict=True):
        table.add_row(*map(Text, cells))
    return table


def _wrapped(label: str, width: int) -> list[str]:
    """A label in lines: broken after its clauses, within one only where it is longer than that."""
    lines = [""]
    for clause in re.findall(r"[^;,]+[;,]*\s*", label):
        whole = cell_len(clause.rstrip()) <= width
        for part in [clause] if whole else re.findall(r"[^+<>]+[+<>]*", clause):
            if lines[-1] and cell_len(lines[-1] + part.rstrip()) > width:
                lines.append("")
            lines[-1] += part
    return [part for line in lines for part in chop_cells(line.rstrip(), width)]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _teachers(row: Row) -> str:
    return " ".join(row["teachers"]) or "-"


def _parameters(row: Row) -> str:
    return "" if row["parameters"] is None else f"{row['parameters']:,}"


def _seeds(row: Row) -> str:
    return f"{row['seeds']}" + (f" ({row['failed']} failed)" if row["failed"] else "")


def _accuracy(row: Row) -> str:
    spread = "" if row["deviation"] is None else f" ± {_percent(row['deviation'])}"
    return f"{_percent(row['accuracy'])}{spread}" if row["seeds"] else "failed"


def _validation(row: Row) -> str:
    """With a mark, or the room of one."""
    return f"{_percent(row['valid_accuracy'])}{'*' if row['best'] else ' '}"


def _gain(row: Row, counted: bool) -> str:
    """With its interval, and the number of seeds where that differs between lines."""
    if row["gain"] is None:
        return ""
    half = row["gain_interval"]
    interval = "" if half is None else f" ± {_percent(half)}"
    seeds = f" (n={row['gain_seeds']})" if counted else ""
    return f"{100 * row['gain']:+.2f}{interval}{seeds}"


def _metric(row: Row, name: str) -> str:
    return f"{row['metrics'][name]:.4g}" if name in row["metrics"] else ""


def _branches(row: Row) -> str:
    return " ".join(map(_percent, row["branches"]))
