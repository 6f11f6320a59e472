"""`distill_jax measure`: what networks in files cost on this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import jax
from rich import box
from rich.table import Table

from distill_jax import report
from distill_jax.commands.arguments import Command
from distill_jax.commands.plan import short
from distill_jax.commands.train import LOG
from distill_jax.runs.measure import MANY, Measured, measure

NAME = 24  # letters, for which there is room at 80 columns


def run_measure(given: SimpleNamespace) -> int:
    """Prints a line for each file."""
    found = measure([given.file, *given.files])
    if given.log == "json":
        for one in found:
            print(json.dumps(one._asdict(), allow_nan=False))
    else:
        report.console().print(_table(found))
    return 0


def _table(found: Sequence[Measured]) -> Table:
    table = Table(
        title=f"On {jax.devices()[0].device_kind}; ONNX on the CPU",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("file", overflow="fold")
    for heading in ("params", "FLOPs", "KiB", "test %", "ms\nfor 1", f"examples/s\nof {MANY}"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in found:
        table.add_row(
            _name(Path(one.file)),
            "-" if one.parameters is None else short(one.parameters),
            "-" if one.flops is None else short(one.flops),
            f"{one.bytes / 2**10:,.0f}",
            "-" if one.test_accuracy is None else f"{100 * one.test_accuracy:.2f}",
            f"{1e3 * one.seconds_for_one:.3f}",
            f"{one.examples_per_second:,.0f}",
        )
    return table


def _name(path: Path) -> str:
    """Of a file; a long one in two lines."""
    return path.name if len(path.name) <= NAME else f"{path.stem}\n{path.suffix}"


MEASURE = Command(
    about="Measures size, FLOPs and speed of networks that export wrote, in turns.",
    run=run_measure,
    words=("file",),
    more="files",
    flags=(LOG,),
)
