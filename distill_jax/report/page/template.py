"""The page: one HTML file that loads nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from distill_jax.report.page import charts, graph, search, sections, svg
from distill_jax.report.page.record import RunRecord
from distill_jax.report.page.search import SearchRecord
from distill_jax.report.page.sections import Table
from distill_jax.report.page.style import style
from distill_jax.report.page.svg import Key, Picture


def html_page(records: Sequence[RunRecord | SearchRecord]) -> str:
    """The page of one run or search, or several, the same text for the same records."""
    names = ", ".join(record.name for record in records)
    body = [f"<h1>{escape(names)}</h1>"]
    runs = [record for record in records if isinstance(record, RunRecord)]
    if len(runs) > 1:
        body += _pictures("Results of all", "results", charts.results(runs))
    for i, record in enumerate(records):
        prefix = f"run{i}-"
        if len(records) > 1:
            body.append(f"<h2>{escape(record.name)}</h2>")
        if isinstance(record, SearchRecord):
            body += _search(record, prefix)
        else:
            body += _run(record, prefix, len(runs) > 1)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(names)}</title>\n<style>\n{style()}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _run(run: RunRecord, prefix: str, several: bool) -> list[str]:
    parts = [f'<p class="state">{escape(sections.state(run))}</p>']
    add = parts.extend
    add(_pictures("Who teaches whom", f"{prefix}graph", graph.graphs(run), _GRAPH))
    own = [] if several else charts.results([run])
    shown = _grid([*own, *charts.efficiency(run)])
    if run.latency.seconds:
        shown.append(_note(f"Latency: a batch of one on {run.latency.device}, compiled."))
    if run.rows:
        title, table, notes = sections.results(run)
        shown = [_note(title), _table(table), *map(_note, notes), *shown]
    add(_section("Results", f"{prefix}results", shown))
    add(_pictures("Learning curves", f"{prefix}curves", charts.curves(run)))
    if run.rows:
        shown = _grid([*charts.agreement(run), *charts.reliability(run)])
        shown = [_table(sections.fidelity(run)), *shown]
        add(_section("Agreement and calibration", f"{prefix}fidelity", shown))
    add(_pictures("Stochastic teaching", f"{prefix}kept", charts.kept(run), _KEPT))
    add(_pictures("Terms of the loss", f"{prefix}terms", charts.terms(run), _TERMS))
    if run.stages:
        shown = [_table(sections.stages(run)), _note(_COSTS), *_grid(charts.costs(run))]
        add(_section("Stages, time and memory", f"{prefix}stages", shown))
    if lines := sections.missing(run):
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        add(_section("Not on this page", f"{prefix}missing", [f'<ul class="note">{items}</ul>']))
    made = [f"<h4>{escape(text)}</h4>{_pairs(table)}" for text, table in sections.made(run)]
    made.append(_config(sections.config(run)))
    add(_section("How it was made", f"{prefix}made", made))
    return _unique(parts, prefix)


def _search(record: SearchRecord, prefix: str) -> list[str]:
    parts = [f'<p class="state">{_text(search.state(record))}</p>']
    parts += _pictures("The search", f"{prefix}search", search.pictures(record), _SEARCH)
    if record.trials:
        parts += _section("Trials", f"{prefix}trials", [_table(search.table(record))])
    made = [_pairs(search.made(record)), _config(search.config(record))]
    return _unique([*parts, *_section("How it was made", f"{prefix}made", made)], prefix)


def _config(text: str) -> str:
    return f"<details><summary>Config</summary><pre>{escape(text)}</pre></details>"


def _unique(parts: list[str], prefix: str) -> list[str]:
    """The ids of a run's pictures, made those of its own."""
    return [
        part.replace('id="', f'id="{prefix}')
        .replace('href="#', f'href="#{prefix}')
        .replace("url(#", f"url(#{prefix}")
        if part.startswith("<figure")
        else part
        for part in parts
    ]


def _section(title: str, name: str, parts: list[str]) -> list[str]:
    return [f'<h3 id="{name}">{escape(title)}</h3>', *parts] if parts else []


def _pictures(title: str, name: str, pictures: list[Picture], note: str = "") -> list[str]:
    if not pictures:
        return []
    return _section(title, name, [_note(note)] * bool(note) + _grid(pictures))


def _grid(pictures: list[Picture]) -> list[str]:
    return ['<div class="pictures">', *map(_figure, pictures), "</div>"] if pictures else []


def _figure(picture: Picture) -> str:
    legend = "".join(map(_key, picture.legend))
    return (
        f'<figure id="{picture.name}"><figcaption>{_text(picture.title)}</figcaption>\n'
        f"{picture.svg}\n"
        + (f'<ul class="legend">{legend}</ul>' if legend else "")
        + (_note(picture.note) if picture.note else "")
        + "</figure>"
    )


def _key(key: Key) -> str:
    colour = "text" if key.colour is None else f"c{key.colour % len(svg.LIGHT)}"
    return f'<li><b style="color: var(--{colour})">{key.glyph}</b> {_text(key.text)}</li>'


def _text(text: str) -> str:
    """A text that may be broken after the marks of a guidance."""
    return re.sub(r"(\+|;|:|&lt;|&gt;)", r"\1<wbr>", escape(text, quote=False))


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        own = (
            f"<{tag}{' class=n' if i in table.numbers else ''}>{_text(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(own)}</tr>"

    rows = "\n".join(row(cells, "td") for cells in table.rows)
    head = row(table.headings, "th")
    return f'<div class="wide"><table><thead>{head}</thead>\n<tbody>{rows}</tbody></table></div>'


def _pairs(table: Table) -> str:
    rows = (f"<tr><th>{escape(a)}</th><td>{escape(b)}</td></tr>" for a, b in table.rows)
    return f'<div class="wide"><table class="pairs">{"".join(rows)}</table></div>'


_GRAPH = "Arcs lead from teachers to students; beside each network its accuracy on the test set."
_KEPT = "The share of all steps so far at which each teacher taught."
_TERMS = "Each term times its weight, as the loss adds them up; epochs of training."
_SEARCH = (
    "Every dot is a trial, its validation accuracy the mean over seeds. In a picture of one field "
    "the others differ from dot to dot."
)
_COSTS = (
    "Seconds: the mean over seeds, with what had to be compiled; each of several stages that were "
    "trained at once has the time of all of them. Memory: the most that the process or the device "
    "had in use so far, by other stages too."
)
