"""Trains a published table of TAKD, DGKD or TESKD and says whether its order holds.

  python -m experiments.reproduce --list
  python -m experiments.reproduce takd-plain-cifar10 --data_dir=DIR --seeds=5 --budget=short

Budgets: `smoke` trains the smallest networks on made-up images for one epoch, `short` follows the
paper's recipe in 30 epochs at most, `paper` in all of them. What has been trained is not trained
again: the same command goes on where it was stopped, more seeds are added, and tables share their
networks through WORKDIR/store. Networks that only teach have one seed, and students many;
--teachers=own trains them anew for each. Prints the table and writes TABLE.json and TABLE.md to
WORKDIR/TABLE-BUDGET, with -own or another protocol's name where that is asked for; --save writes
them to experiments/results/reproduce too.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import distill_jax
from distill_jax import report, traced
from distill_jax.commands.train import use_compilation_cache
from distill_jax.main import REFUSED
from distill_jax.report.summary import Row
from distill_jax.runs.config import PROTOCOLS, resolve
from experiments import paired
from experiments.reproduce import cost, page
from experiments.reproduce.budgets import BUDGETS, SHARED, SMOKE, TEACHERS, Group, frozen, groups
from experiments.reproduce.catalogue import TABLES
from experiments.reproduce.tables import Table

RESULTS = Path(__file__).parents[1] / "results" / "reproduce"
STANDARD = "standard"  # the protocol where none is named
SEEDS = 3  # where --seeds does not say; one in a smoke run


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message):
        """Ends the command with 2."""
        self.exit(2, f"error: {message}\n")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command's own.

    Raises:
      SystemExit: with 2; what is wrong has been printed.
    """
    parser = Parser(prog="python -m experiments.reproduce", allow_abbrev=False)
    parser.add_argument("table", nargs="?", help="one of --list")
    parser.add_argument("--list", action="store_true", help="name the tables and what they cost")
    parser.add_argument("--data_dir", default="", help="where the data set's files are")
    parser.add_argument("--seeds", type=int, help=f"how many, from 0 on ({SEEDS}; of smoke 1)")
    parser.add_argument(
        "--budget",
        default=SMOKE,
        help="; ".join(f"{name}: {about}" for name, about in BUDGETS.items()),
    )
    parser.add_argument("--workdir", default="runs/reproduce", help="where all is kept")
    parser.add_argument("--epochs", type=int, help="of every network, in place of the budget's")
    parser.add_argument("--dataset", default="", help="any other that config.dataset.name takes")
    parser.add_argument("--dtype", default="", help="float32 or bfloat16, where not the config's")
    parser.add_argument("--protocol", default=STANDARD, help=", ".join(PROTOCOLS))
    parser.add_argument(
        "--teachers",
        default=SHARED,
        help="shared: networks that only teach have seed 0, whatever the student's (default); "
        "own: each seed has its own",
    )
    parser.add_argument(
        "--rate", type=float, default=cost.GIGAFLOPS, help="GFLOP/s that the hours are for"
    )
    parser.add_argument(
        "--save",
        nargs="?",
        const=RESULTS,
        type=Path,
        metavar="DIR",
        help="write the results there too (experiments/results/reproduce)",
    )
    given = parser.parse_args(argv)
    if not (given.list or given.table):
        parser.error("name a table, or --list them")
    known = {"budget": BUDGETS, "protocol": PROTOCOLS, "teachers": TEACHERS}
    for name, values in known.items():
        if getattr(given, name) not in values:
            parser.error(f"--{name}: {getattr(given, name)!r} is none of {', '.join(values)}")
    if given.seeds is None:
        given.seeds = 1 if given.budget == SMOKE and not given.list else SEEDS
    for name in ("seeds", "epochs"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            parser.error(f"--{name} is at least 1, got {getattr(given, name)}")
    if not given.rate > 0:
        parser.error(f"--rate is above 0, got {given.rate:g}")
    if given.save and given.budget == SMOKE:
        parser.error("--save keeps results on real images, not those of --budget=smoke")
    if given.table and given.table not in TABLES:
        close = difflib.get_close_matches(given.table, TABLES, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        parser.error(f"there is no table {given.table!r}{hint} (--list names them)")
    return given


def main(argv: Sequence[str]) -> int:
    """Lists the tables, or trains what is missing of one, prints it and writes it."""
    given = arguments(argv)
    if given.list:
        print("\n".join(page.listed(TABLES, given)))
        return 0
    table, workdir = TABLES[given.table], Path(given.workdir)
    others = {given.teachers, given.protocol} - {SHARED, STANDARD}
    folder = workdir / "-".join([table.name, given.budget, *sorted(others)])
    try:
        runs = groups(table, given)
        for run in runs:  # all of them, before the first is trained
            resolve(run.config)
        use_compilation_cache(workdir)
        rows = {}
        for run in runs:
            rows |= trained(table, run, folder / run.name, workdir / "store")
        accuracies = {
            label: {row["seed"]: row["test_accuracy"] for row in own} for label, own in rows.items()
        }
        result = page.result_of(table, accuracies, about(table, runs, rows, given))
        write(result, accuracies, [folder, *filter(None, [given.save])])
    except KeyboardInterrupt:
        print(f"stopped and saved in {folder}; the same command goes on", file=sys.stderr)
        return 130
    except (*REFUSED, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        traced.keep_in(None)
    console = report.console()
    for part in page.shown(result):
        console.print(part)
    return 0


def trained(table: Table, run: Group, workdir: Path, store: Path) -> dict[str, list[Row]]:
    """What became of a run's rows, one of each seed, by their labels; trains what is missing."""
    print(f"== {table.name}: {', '.join(row.label for row in run.rows)}", file=sys.stderr)
    results = distill_jax.run(run.config, workdir=workdir, store=store)
    keys = {row.label: run.key(table, row) for row in run.rows}
    return {
        label: [row for row in results.rows if (row["guidance"], row["network"]) == key]
        for label, key in keys.items()
    }


def about(
    table: Table,
    runs: Sequence[Group],
    rows: dict[str, list[Row]],
    given: argparse.Namespace,
) -> dict[str, Any]:
    """How the table was trained, as JSON values."""
    experiment = resolve(runs[0].config)
    only = {name for run in runs for name in frozen(table, run.rows)}
    every = [row for own in rows.values() for row in own]
    return {
        "dataset": experiment.dataset["name"],
        "published_on": table.dataset,
        "budget": given.budget,
        "epochs": experiment.recipe["epochs"],
        "dtype": experiment.dtype,
        "protocol": experiment.protocol,
        "selection": experiment.selection,
        "seeds": given.seeds,
        "teachers": given.teachers,
        "only_teach": [name for name in table.networks if name in only],
        "networks": {name: run.names[name] for run in runs for name in table.networks},
        # Of the students, which a store may have from other machines.
        "trained_on": sorted({row.get("trained_on", "unknown") for row in every}),
    }


def write(
    result: page.Result, accuracies: dict[str, dict[int, float]], folders: list[Path]
) -> None:
    """Writes the numbers and the page, each whole or not at all."""
    numbers = json.dumps(result.numbers(accuracies), indent=1, ensure_ascii=False)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        paired.write_whole(folder / f"{result.table.name}.json", numbers + "\n")
        paired.write_whole(folder / f"{result.table.name}.md", page.markdown(result))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
