"""How time and memory grow: linear where they must, flat where they can.

  python -m experiments.growth --json=growth.json

A training step of this library against the number of its teachers, the batch, the number of
resident images and of devices (forced on the CPU). All variants of one line are measured in turns,
as in `experiments.benchmark`. "grows as" is the slope between the first and the last on a
logarithmic scale: 1 is linear, 0 is flat.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from typing import Any, NamedTuple

from absl import app
from rich.table import Table

from experiments.benchmark import cases, machine, options
from experiments.benchmark.cases import Case
from experiments.benchmark.measure import Measured, measure


class Line(NamedTuple):
    """One quantity that grows, its cases by value, and how the time of a step should follow."""

    what: str
    cases: dict[int, Case]
    expected: str


def lines(row: cases.Row, smoke: bool) -> list[Line]:
    """What is measured."""
    teachers, student = row
    step = Case("jax", "recomputing", student, teachers, 8 if smoke else 128)
    # Smallest first, so that each further teacher is a larger one.
    taught = {
        k: dataclasses.replace(
            step,
            teachers=tuple(teachers[len(teachers) - k :]),
            variant="recomputing" if k else "alone",
        )
        for k in range(len(teachers) + 1)
    }
    batches = (8, 16) if smoke else (32, 64, 128, 256, 512)
    images = (64, 128) if smoke else (1024, 8192, 50000)
    devices = (1, 2) if smoke else (1, 2, 4)
    return [
        Line("teachers", taught, "with their FLOPs"),
        Line("batch", {n: dataclasses.replace(step, batch=n) for n in batches}, "1 or less"),
        Line("images", {n: dataclasses.replace(step, examples=n) for n in images}, "0"),
        Line("devices", {n: dataclasses.replace(step, devices=n) for n in devices}, "0 or less"),
    ]


def slope(values: list[int], sizes: list[float]) -> float:
    """Of log(size) over log(value), between the first and the last."""
    return math.log(sizes[-1] / sizes[0]) / math.log(values[-1] / values[0])


def grown(line: Line, found: dict[str, Measured]) -> dict[str, Any]:
    """The numbers of a line."""
    there = [(n, found[str(n)]) for n in line.cases if not found[str(n)].missing]
    seconds = [statistics.median(measured.seconds) for _, measured in there]
    values = [n for n, _ in there]
    return {
        "what": line.what,
        "values": values,
        "seconds": seconds,
        "step_bytes": [measured.step_bytes for _, measured in there],
        "flops": [measured.flops for _, measured in there],
        "exponent": slope(values, seconds) if len(values) > 1 and values[0] else None,
        "expected": line.expected,
        "missing": {n: found[str(n)].missing for n in line.cases if found[str(n)].missing},
    }


def table(results: list[dict[str, Any]]) -> Table:
    """Time and memory of every variant."""
    made = Table(title="How a step grows", title_justify="left")
    for heading in ("what", "", "ms", "to the first", "FLOPs to the first", "MB", "grows as"):
        made.add_column(heading, justify="right", no_wrap=True)
    for one in results:
        columns = zip(one["values"], one["seconds"], one["flops"], one["step_bytes"], strict=True)
        for i, (value, seconds, flops, size) in enumerate(columns):
            made.add_row(
                "" if i else one["what"],
                f"{value:,}",
                f"{1e3 * seconds:.1f}",
                f"{seconds / one['seconds'][0]:.2f}",
                f"{flops / one['flops'][0]:.2f}",
                f"{size / 1e6:,.0f}",
                "" if i else _growth(one),
            )
        for value, why in one["missing"].items():
            made.add_row(one["what"], f"{value:,}", "-", why)
        made.add_section()
    return made


def _growth(one: dict[str, Any]) -> str:
    found = "" if one["exponent"] is None else f"{one['exponent']:.2f}, "
    return f"{found}asked: {one['expected']}"


def main(argv: list[str]) -> int:
    """Measures every line and prints the table."""
    if refused := options.refusal(argv):
        print(f"error: {refused}", file=sys.stderr)
        return 1
    how, results = options.turns(), []
    about, console = machine.describe(how["cores"]), options.console()
    for line in lines(options.row(), options.SMOKE.value):
        options.say(f"growth with {line.what}")
        by_name = {str(n): case for n, case in line.cases.items()}
        results.append(grown(line, measure(by_name, **how)))
    console.print(machine.one_line(about))
    if busy := machine.busy(about):
        console.print(busy)
    console.print(table(results))
    options.save({"machine": about, "chain": options.CHAIN.value, "lines": results})
    return 0


if __name__ == "__main__":
    app.run(main)
