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

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments.benchmark import cases, compared, machine, tables
from experiments.benchmark.cases import Case
from experiments.benchmark.measure import Worker, measure, pinned

CHAIN = flags.DEFINE_enum("chain", "plain", list(cases.CHAINS), "Which networks.")
PEER = flags.DEFINE_enum("peer", "none", ["none", "torch"], "What to compare with.")
DEVICES = flags.DEFINE_integer("devices", 2, "Of the row on several devices; 1 leaves it out.")
JSON = flags.DEFINE_string("json", "", "File for all numbers.")
ROUNDS = flags.DEFINE_integer("rounds", 15, "Turns of each variant.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 1.0, "Length of a turn, about.")
CORES = flags.DEFINE_integer("cores", 2, "To pin every process to; 0 pins none.", lower_bound=0)
BATCH = flags.DEFINE_integer("batch", 128, "Examples of a step.", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation.")
MATRIX = flags.DEFINE_integer("matrix", 2048, "Size of the matrices that give the peak.")
STARTS = flags.DEFINE_integer("starts", 3, "Starts with a filled compilation cache; 0 for none.")
MEMBERS = flags.DEFINE_list("members", "1,2,4,8,16", "Sizes of populations of the student.")
ONLY = flags.DEFINE_list("only", "", "Rows to measure, by name; all of them where empty.")
SMOKE = flags.DEFINE_bool("smoke", False, "Small networks, batches and turns: a test.")
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


def shrink() -> None:
    """What --smoke changes."""
    flags.FLAGS.rounds, flags.FLAGS.seconds, flags.FLAGS.batch = 2, 0.0, 8
    flags.FLAGS.matrix = 64


def benchmark(console: Console) -> dict[str, Any]:
    """Measures, prints, and returns all numbers."""
    if SMOKE.value:
        shrink()
    row = (cases.SMOKE if SMOKE.value else cases.CHAINS)[CHAIN.value]
    cores = pinned(CORES.value)
    how = {"rounds": ROUNDS.value, "seconds": SECONDS.value, "cores": cores}
    say = lambda text: print(text, file=sys.stderr)  # noqa: E731
    about = machine.describe(cores)
    console.print(machine.one_line(about), machine.busy(about), sep="\n")
    asked = compared.rows(
        row,
        peer=PEER.value,
        devices=DEVICES.value,
        dtype=DTYPE.value,
        batch=BATCH.value,
        matrix=MATRIX.value,
    )
    if ONLY.value:
        asked = {name: case for name, case in asked.items() if name in ONLY.value}
    found = measure(asked, **how, say=say)
    rows = tables.numbers(found)
    title = (
        f"{CHAIN.value}: {' '.join((*row[0], '->', row[1]))}, batch {BATCH.value}, {DTYPE.value}"
    )
    console.print(tables.steps_table(rows, title))
    differences = compared.fidelity(found)
    for line in tables.fidelity_lines(differences):
        console.print(line)
    judged = [compared.judge(one, found) for one in compared.targets(CHAIN.value, DEVICES.value)]
    verdicts = [verdict for verdict in judged if verdict]
    ours = found[compared.OURS]
    applies = ours.device.startswith("cpu") and len(cores) == 2 and not SMOKE.value
    if verdicts:
        console.print(tables.targets_table(verdicts, applies))
    written = {
        "machine": about,
        "chain": CHAIN.value,
        "rows": rows,
        "fidelity": differences,
        "targets": [{**v._asdict(), "target": v.target._asdict()} for v in verdicts],
    }
    if STARTS.value:
        starts = warm_starts(ours.case, cores, STARTS.value)
        said = "met" if max(starts[1:]) < WARM_START else "NOT met"
        console.print(
            f"start to the end of the first step: {starts[0]:.1f} s; with what was compiled before "
            f"{', '.join(f'{s:.1f}' for s in starts[1:])} s (under {WARM_START:.0f} s: {said})"
        )
        written["starts"] = starts
    if MEMBERS.value:
        student = Case("jax", "alone", row[1], (), BATCH.value, DTYPE.value)
        sizes = {n: Case(**{**vars(student), "members": int(n)}) for n in MEMBERS.value}
        written["members"] = tables.numbers(measure(sizes, **how, say=say))
        console.print(members_table(written["members"]))
    return written


def main(argv: list[str]) -> int:
    """Runs the benchmark of the flags."""
    if len(argv) > 1:
        print(f"error: unexpected argument {argv[1]!r}", file=sys.stderr)
        return 1
    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=140)
    written = benchmark(console)
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(written, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    app.run(main)
