"""The page without its pictures, as Markdown."""

from __future__ import annotations

import html
from collections.abc import Sequence

from distill_jax.report.page import search, sections
from distill_jax.report.page.record import RunRecord
from distill_jax.report.page.search import SearchRecord
from distill_jax.report.page.sections import Table


def markdown(records: Sequence[RunRecord | SearchRecord]) -> str:
    """The tables of runs and searches, and how they were made."""
    every = (_searched(x) if isinstance(x, SearchRecord) else _blocks(x) for x in records)
    return "\n\n".join(block for blocks in every for block in blocks) + "\n"


def _searched(record: SearchRecord) -> list[str]:
    blocks = [f"# {_text(record.name)}", _text(search.state(record))]
    if record.trials:
        blocks += ["## Trials", _table(search.table(record))]
    blocks += ["## How it was made", _table(search.made(record))]
    return [*blocks, *_config(search.config(record))]


def _blocks(run: RunRecord) -> list[str]:
    blocks = [f"# {_text(run.name)}", _text(sections.state(run))]
    if run.rows:
        title, table, notes = sections.results(run)
        blocks += ["## Results", _text(title), _table(table), *map(_text, notes)]
        blocks += ["## Agreement and calibration", _table(sections.fidelity(run))]
    if run.stages:
        blocks += ["## Stages", _table(sections.stages(run))]
    if lines := sections.missing(run):
        blocks += ["## Not here", "\n".join(f"- {_text(line)}" for line in lines)]
    for title, table in sections.made(run):
        blocks += [f"## How it was made: {title}", _table(table)]
    return [*blocks, *_config(sections.config(run))]


def _config(text: str) -> list[str]:
    fence = "```"
    while fence in text:
        fence += "`"
    return ["## Config", f"{fence}json\n{text}\n{fence}"]


def _table(table: Table) -> str:
    rule = ["---:" if i in table.numbers else "---" for i in range(len(table.headings))]
    rows = [map(_text, table.headings), rule, *(map(_text, row) for row in table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _text(text: str) -> str:
    """Shown as it is: neither HTML, nor marks of Markdown."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    for mark in "\\`*_[]|#~":
        escaped = escaped.replace(mark, f"\\{mark}")
    return escaped
