"""Measures a step of distillation here and in PyTorch, in turns.

  python -m experiments.benchmark --chain=plain --peer=torch --json=plain.json

A step is the student's forward and backward pass with cross-entropy and KL to its frozen teachers,
and the SGD update. Every variant has its own process, pinned to the same cores; they have their
turns one after the other, and a ratio is the median of the rounds' own ratios, beside its
quartiles. MB is the peak of resident memory while stepping (of the GPU's, on one), "start" goes
from the start of the process to the end of its first step, and "of peak" is to the product of two
matrices, measured in the same turns.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments.benchmark import compared, machine, options, tables
from experiments.benchmark.cases import Case
from experiments.benchmark.measure import Measured, Worker, measure

DEVICES = flags.DEFINE_integer("devices", 2, "Of the steps on several devices; 1 leaves them out.")
PARALLEL = flags.DEFINE_enum("parallel", "jit", ["jit", "pmap"], "How these are run.")
BATCH = flags.DEFINE_integer("batch", 128, "Examples of a step.", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation.")
MATRIX = flags.DEFINE_integer("matrix", 2048, "Size of the matrices that give the peak.")
STARTS = flags.DEFINE_integer("starts", 3, "Starts with a filled compilation cache; 0 for none.")
MEMBERS = flags.DEFINE_list("members", "1,2,4,8,16", "Sizes of populations of the student.")
WARM_START = 3.0  # seconds, at most


def warm_starts(case: Case, cores: list[int], starts: int) -> list[float]:
    """Seconds from process start to the end of the first step: cold, then from a filled cache."""
    with tempfile.TemporaryDirectory() as cache:
        return [Worker(case, cores, cache).end().start_seconds for _ in range(1 + starts)]


def members_table(rows: list[dict[str, Any]]) -> Table:
    """Populations against as many separate runs."""
    table = Table(title="Students trained at once", title_justify="left")
    for heading in ("members", "ms", "ms a member", "to separate runs"):
        table.add_column(heading, justify="right")
    alone = rows[0].get("seconds")
    for row in rows:
        members = row["case"]["members"]
        if "missing" in row:
            table.add_row(str(members), "-", "-", row["missing"])
            continue
        each = row["seconds"] / members
        ratio = f"{each / alone:.2f}" if alone else ""
        table.add_row(str(members), f"{1e3 * row['seconds']:.1f}", f"{1e3 * each:.1f}", ratio)
    return table


def chosen_cases() -> dict[str, Case]:
    """The cases of the flags, by name.

    Raises:
      ValueError: --only names a row that there is not.
    """
    small = options.SMOKE.value
    every = compared.rows(
        options.row(),
        peer=options.PEER.value,
        devices=DEVICES.value,
        parallel=PARALLEL.value,
        dtype=DTYPE.value,
        batch=8 if small else BATCH.value,
        matrix=64 if small else MATRIX.value,
    )
    if unknown := set(options.ONLY.value) - set(every):
        raise ValueError(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    return {
        name: case
        for name, case in every.items()
        if not options.ONLY.value or name in options.ONLY.value
    }


def targets_apply(found: Mapping[str, Measured]) -> bool:
    """Whether this is what the targets are about: full sizes on two CPU cores."""
    on_cpu = any(measured.device.startswith("cpu") for measured in found.values())
    return on_cpu and len(options.turns()["cores"]) == 2 and not options.SMOKE.value


def compare(chosen: dict[str, Case], console: Console) -> dict[str, Any]:
    """Measures the rows, prints their tables, and returns the numbers."""
    chain, case, how = options.CHAIN.value, next(iter(chosen.values())), options.turns()
    found = measure(chosen, **how)
    rows, differences = tables.numbers(found), compared.fidelity(found)
    names = " ".join((*case.teachers, "->", case.student))
    title = f"{chain}: {names}, batch {case.batch}, {case.dtype}"
    console.print(tables.steps_table(rows, title))
    for line in tables.fidelity_lines(differences):
        console.print(line)
    judged = [compared.judge(one, found) for one in compared.targets(chain, DEVICES.value)]
    verdicts = [verdict for verdict in judged if verdict]
    if verdicts:
        console.print(tables.targets_table(verdicts, targets_apply(found)))
    targets = [{**verdict._asdict(), "target": verdict.target._asdict()} for verdict in verdicts]
    return {"rows": rows, "fidelity": differences, "targets": targets}


def starts_line(starts: list[float]) -> str:
    """Starts with an empty compilation cache and then with a full one."""
    verdict = "met" if max(starts[1:]) < WARM_START else "NOT met"
    if options.SMOKE.value:
        verdict = "does not apply here"
    return (
        f"start to the end of the first step: {starts[0]:.1f} s; with what was compiled before "
        f"{', '.join(f'{s:.1f}' for s in starts[1:])} s (under {WARM_START:.0f} s: {verdict})"
    )


def benchmark(chosen: dict[str, Case], console: Console) -> dict[str, Any]:
    """Measures, prints, and returns all numbers."""
    how = options.turns()
    about = machine.describe(how["cores"])
    console.print(machine.one_line(about))
    if busy := machine.busy(about):
        console.print(busy)
    written = {"machine": about, "chain": options.CHAIN.value, **compare(chosen, console)}
    case = next(iter(chosen.values()))
    if STARTS.value:
        by_default = chosen.get(compared.MANY.format(DEVICES.value), case)
        written["starts"] = warm_starts(by_default, how["cores"], STARTS.value)
        console.print(starts_line(written["starts"]))
    if MEMBERS.value:
        alone = dataclasses.replace(case, variant="alone", teachers=())
        sizes = {n: dataclasses.replace(alone, members=int(n)) for n in MEMBERS.value}
        written["members"] = tables.numbers(measure(sizes, **how))
        console.print(members_table(written["members"]))
    return written


def main(argv: list[str]) -> int:
    """Runs the benchmark of the flags."""
    refused = options.refusal(argv)
    try:
        chosen = chosen_cases()
    except ValueError as error:
        refused = str(error)
    if refused:
        print(f"error: {refused}", file=sys.stderr)
        return 1
    options.save(benchmark(chosen, options.console()))
    return 0


if __name__ == "__main__":
    app.run(main)
