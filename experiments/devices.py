"""From which batch on two CPU devices pay: what `devices=auto` goes by.

  python -m experiments.devices --json=experiments/results/devices.json

A training step of the --chain's student alone, and of the student with its teachers computed, on
one device and on two, in turns as in `experiments.benchmark`. A ratio is the time on two devices
over that on one, the median of the rounds.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from typing import Any

from absl import app
from rich.table import Table

from experiments.benchmark import cases, compared, machine, options
from experiments.benchmark.cases import Case
from experiments.benchmark.measure import measure

BATCHES = (32, 50, 128)


def steps(row: cases.Row, smoke: bool) -> list[Case]:
    """What is measured, each on one device and on two."""
    teachers, student = row
    batches = (8,) if smoke else BATCHES
    alone = [Case("jax", "alone", student, batch=batch) for batch in batches]
    if not teachers:
        return alone
    return alone + [Case("jax", "recomputing", student, teachers, batch) for batch in batches]


def compare(case: Case) -> dict[str, Any]:
    """The seconds of every round on one device and on two, and their ratio."""
    by_count = {str(n): dataclasses.replace(case, devices=n) for n in (1, 2)}
    found = measure(by_count, **options.turns())
    line: dict[str, Any] = {"teachers": len(case.teachers), "batch": case.batch}
    for n, one in found.items():
        line[f"seconds on {n}"] = one.seconds
        line["missing"] = line.get("missing", "") or one.missing
    line["ratio"] = None if line["missing"] else compared.ratio(found["2"], found["1"])
    return line


def table(lines: list[dict[str, Any]]) -> Table:
    """Milliseconds and ratios."""
    made = Table(title="A step on one CPU device and on two", title_justify="left")
    for heading in ("teachers", "batch", "ms on 1", "ms on 2", "ratio", "quartiles"):
        made.add_column(heading, justify="right")
    for line in lines:
        names = (str(line["teachers"]), str(line["batch"]))
        if line["missing"]:
            made.add_row(*names, "-", "-", "-", line["missing"])
            continue
        times = (f"{1e3 * statistics.median(line[f'seconds on {n}']):.1f}" for n in (1, 2))
        ratio = line["ratio"]
        made.add_row(*names, *times, f"{ratio.median:.2f}", f"{ratio.low:.2f} {ratio.high:.2f}")
    return made


def main(argv: list[str]) -> int:
    """Measures every step and prints the table."""
    if refused := options.refusal(argv):
        print(f"error: {refused}", file=sys.stderr)
        return 1
    about, lines = machine.describe(options.turns()["cores"]), []
    for case in steps(options.row(), options.SMOKE.value):
        options.say(f"{len(case.teachers)} teachers, batch {case.batch}")
        lines.append(compare(case))
    console = options.console()
    console.print(machine.one_line(about))
    if busy := machine.busy(about):
        console.print(busy)
    console.print(table(lines))
    options.save({"machine": about, "chain": options.CHAIN.value, "lines": lines})
    return 0


if __name__ == "__main__":
    app.run(main)
