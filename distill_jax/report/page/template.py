"""The page: one HTML file that loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from distill_jax.report.page import charts, graph, sections, svg
from distill_jax.report.page.record import RunRecord
from distill_jax.report.page.sections import Table
from distill_jax.report.page.style import style
from distill_jax.report.page.svg import Key, Picture


def html_page(runs: Sequence[RunRecord]) -> str:
    """The page of one run or several, the same text for the same records."""
    names = ", ".join(run.name for run in runs)
    body = [f"<h1>{escape(names)}</h1>"]
    if len(runs) > 1:
        body += _pictures("Results of all", "results", charts.results(runs))
    for i, run in enumerate(runs):
        body += _run(run, f"run{i}-", len(runs) > 1)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(names)}</title>\n<style>\n{style()}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _run(run: RunRecord, prefix: str, several: bool) -> list[str]:
    parts = [f"<h2>{escape(run.name)}</h2>"] if several else []
    parts.append(f'<p class="state">{escape(sections.state(run))}</p>')
    add = parts.extend
    add(_pictures("Who teaches whom", f"{prefix}graph", graph.graphs(run), _GRAPH))
    if run.rows:
        title, table, notes = sections.results(run)
        add(_section("Results", f"{prefix}table", [_note(title), _table(table)]))
        parts += [_note(note) for note in notes]
    if not several:
        add(_pictures("Accuracy of each guidance", f"{prefix}results", charts.results([run])))
    add(_pictures("Learning curves", f"{prefix}curves", charts.curves(run)))
    measured = f"latency on {run.latency.device}, a batch of one" if run.latency.seconds else ""
    add(_pictures("Accuracy and size", f"{prefix}size", charts.efficiency(run), measured))
    if run.rows:
        own = [_table(sections.fidelity(run))]
        add(_section("Agreement and calibration", f"{prefix}fidelity", own))
    add(_pictures("Agreement with teachers", f"{prefix}agreement", charts.agreement(run)))
    add(_pictures("Reliability", f"{prefix}reliability", charts.reliability(run), _RELIABILITY))
    add(_pictures("Stochastic teaching", f"{prefix}kept", charts.kept(run), _KEPT))
    add(_pictures("Terms of the loss", f"{prefix}terms", charts.terms(run), _TERMS))
    if run.stages:
        own = [_table(sections.stages(run)), _note(_COSTS)]
        add(_section("Stages", f"{prefix}stages", own))
    add(_pictures("Time and memory", f"{prefix}costs", charts.costs(run)))
    if lines := sections.missing(run):
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        add(_section("Not on this page", f"{prefix}missing", [f'<ul class="note">{items}</ul>']))
    made = [f"<h4>{escape(text)}</h4>{_pairs(table)}" for text, table in sections.made(run)]
    made.append(
        f"<details><summary>Config</summary><pre>{escape(sections.config(run))}</pre></details>"
    )
    add(_section("How it was made", f"{prefix}made", made))
    return _unique(parts, prefix)


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
    figures = ['<div class="pictures">', *map(_figure, pictures), "</div>"]
    return _section(title, name, [_note(note)] * bool(note) + figures)


def _figure(picture: Picture) -> str:
    legend = "".join(map(_key, picture.legend))
    return (
        f'<figure id="{picture.name}"><figcaption>{escape(picture.title)}</figcaption>\n'
        f"{picture.svg}\n"
        + (f'<ul class="legend">{legend}</ul>' if legend else "")
        + (_note(picture.note) if picture.note else "")
        + "</figure>"
    )


def _key(key: Key) -> str:
    colour = "text" if key.colour is None else f"c{key.colour % len(svg.LIGHT)}"
    return f'<li><b style="color: var(--{colour})">{key.glyph}</b> {escape(key.text)}</li>'


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        own = (
            f"<{tag}{' class=n' if i in table.numbers else ''}>{escape(cell)}</{tag}>"
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
_RELIABILITY = "Of the test set, in 15 bins of confidence; on the diagonal it is as sure as right."
_KEPT = "How many of an epoch's steps each teacher taught at."
_TERMS = "Each term times its weight, as the loss adds them up; epochs of training."
_COSTS = (
    "Seconds: the mean over seeds; stages that were trained at once share them. Memory: the most "
    "that the process or the device had in use so far, by other stages too."
)
