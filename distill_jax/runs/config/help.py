"""The fields of a config as text: for the command's help and for docs/config.md."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill_jax.runs.config.defaults import FIELDS, SECTIONS, Field

WIDEST = 12  # a default that is longer stands on several lines, broken at its commas


def fields_help(width: int = 80) -> str:
    """Every field with its default and its line, by section.

    Args:
      width: columns of the terminal.

    Returns:
      Lines of at most that width, such as `--config.recipe.epochs  30  Epochs of training.`
    """
    console = Console(file=io.StringIO(), width=width, highlight=False, color_system=None)
    with console.capture() as capture:
        for section, fields in by_section():
            console.print(Text(f"\n{SECTIONS[section]}:"))
            console.print(_table(fields))
    return "\n".join(line.rstrip() for line in capture.get().strip("\n").splitlines())


def by_section() -> Iterator[tuple[str, list[Field]]]:
    """The sections in the order of `SECTIONS`, each with its fields."""
    for section in SECTIONS:
        yield section, [field for field in FIELDS if field.section == section]


def default_text(field: Field) -> str:
    """The default as a shell takes it behind `--config.FIELD=`; "unset" where there is none."""
    value = field.default
    if value is None:
        return "unset"
    if isinstance(value, dict):
        return shlex.quote(json.dumps(value))
    if isinstance(value, tuple) and value:
        return shlex.quote(",".join(map(str, value)))
    return shlex.quote(str(value))


def _table(fields: list[Field]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for field in fields:
        default = default_text(field)
        if len(default) > WIDEST:
            default = default.replace(",", ",\n")
        cells = f"  --config.{field.path}", default, field.about
        table.add_row(*(Text(cell) for cell in cells))
    return table
