"""The flags that the benchmark, growth and the GPU row share, and the file of their numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from experiments.benchmark import cases
from experiments.benchmark.measure import pinned

CHAIN = flags.DEFINE_enum("chain", "plain", list(cases.CHAINS), "Which networks.")
PEER = flags.DEFINE_enum("peer", "none", ["none", "torch"], "What to compare with.")
ROUNDS = flags.DEFINE_integer("rounds", 15, "Turns of each variant.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 2.0, "Length of a turn, about; as training dispatches.")
CORES = flags.DEFINE_integer("cores", 2, "To pin every process to; 0 pins none.", lower_bound=0)
JSON = flags.DEFINE_string("json", "", "File for all numbers.")
ONLY = flags.DEFINE_list("only", "", "Rows, or parts, by name; all of them where empty.")
SMOKE = flags.DEFINE_bool("smoke", False, "In miniature, on any machine: a test.")


def row() -> cases.Row:
    """The teachers and the student of --chain."""
    return (cases.SMOKE if SMOKE.value else cases.CHAINS)[CHAIN.value]


def turns() -> dict[str, Any]:
    """How `measure` is to measure."""
    rounds, seconds = (2, 0.0) if SMOKE.value else (ROUNDS.value, SECONDS.value)
    return {"rounds": rounds, "seconds": seconds, "cores": pinned(CORES.value), "say": say}


def say(text: str) -> None:
    """Tells of progress, beside the tables."""
    print(text, file=sys.stderr)


def console() -> Console:
    """Standard output; wide enough for the tables where it is a file or a pipe."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(width=140, highlight=False)


def refusal(argv: list[str]) -> str:
    """What is wrong with the command, before anything is measured; empty where nothing is."""
    if len(argv) > 1:
        return f"unexpected argument {argv[1]!r}"
    if JSON.value and not Path(JSON.value).parent.is_dir():
        return f"--json={JSON.value}: there is no folder {Path(JSON.value).parent}"
    return ""


def save(numbers: dict[str, Any]) -> None:
    """Writes the numbers where --json says."""
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(numbers, indent=1) + "\n")
