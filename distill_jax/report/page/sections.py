"""What the page says in words and tables, the same in HTML and in Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from distill_jax.report.page.record import Group, RunRecord, mean, number, percent
from distill_jax.report.tables import ResultsTable, title

_WIDE = 10**6  # characters, in which every column has room
_STARTED = {
    "command": "command",
    "config_file": "config",
    "date": "started",
    "distill_jax": "distill_jax",
    "distill_jax_git": "revision of distill_jax",
    "git": "revision of the folder it was started in",
    "jax": "JAX",
    "python": "Python",
    "device": "device",
    "host": "machine",
}


class Table(NamedTuple):
    """A table of texts; the columns of numbers are set to the right."""

    headings: list[str]
    rows: list[list[str]]
    numbers: tuple[int, ...] = ()


def state(run: RunRecord) -> str:
    """How far the run is, in a line."""
    done = sum(bool(stage.record) or stage.given for stage in run.stages)
    parts = [f"{done} of {len(run.stages)} stages are done"]
    if failed := sum(bool(row.get("failed")) for row in run.rows):
        parts.append(f"{failed} of {len(run.rows)} results failed")
    if run.at_work:
        parts.append("a run is at work")
    elif done < len(run.stages) and not failed:
        parts.append("no run is at work")
    return "; ".join(parts)


def results(run: RunRecord) -> tuple[str, Table, list[str]]:
    """The title, the table that `show` prints, and its notes; of a run with rows."""
    table = ResultsTable(run.rows)
    columns = table.columns(_WIDE)
    cells = [list(row) for row in zip(*(column.cells for column in columns), strict=True)]
    right = tuple(i for i, column in enumerate(columns) if column.justify == "right")
    failures = {row["failed"]: None for row in run.rows if row.get("failed")}
    headings = [" ".join(column.heading.split()) for column in columns]
    return title(run.rows), Table(headings, cells, right), [*table.notes(_WIDE), *failures]


def fidelity(run: RunRecord) -> Table:
    """Calibration of each network, and its agreement with each teacher, over seeds."""
    headings = ["guidance", "network", "ECE %", "teacher", "agreement %", "KL, nats"]
    lines: dict[tuple[str, str], list[dict]] = {}
    for row in run.trained:
        lines.setdefault((row["guidance"], row["network"]), []).append(row)
    rows = []
    for (guidance, network), own in lines.items():
        error = f"{100 * mean(number(row, 'ece') for row in own):.2f}" if "ece" in own[0] else ""
        about = [guidance, network, error]
        for teacher in own[0]["teachers"] or [""]:
            values = [
                [number(row[name], teacher) for row in own if teacher in row.get(name, {})]
                for name in ("agreement", "kl")
            ]
            shares, kl = values
            rows.append(
                [
                    *about,
                    teacher or "-",
                    percent(shares).removesuffix(" %") if shares else "",
                    f"{mean(kl):.4f}" if kl else "",
                ]
            )
            about = ["", "", ""]
    return Table(headings, rows, (2, 4, 5))


def stages(run: RunRecord) -> Table:
    """Each way of training a network: how far it is, what teaches it, its time and memory."""
    headings = ["network", "guidance", "taught by", "methods", "done"]
    headings += ["test accuracy", "seconds", "MiB"]
    rows = [
        [
            group.network,
            group.label,
            taught(group) or "-",
            ", ".join(group.stages[0].methods),
            _done(group, run),
            percent(group.accuracies) if group.done else "",
            f"{mean(number(x.record, 'seconds') for x in group.done):.1f}" if group.done else "",
            _memory(group),
        ]
        for group in run.groups
    ]
    return Table(headings, rows, (5, 6, 7))


def missing(run: RunRecord) -> list[str]:
    """What the page has not, and why; a line each."""
    rows = [row for row in run.rows if not row.get("failed")]
    lines = []
    if not run.rows:
        lines.append("no stage that was asked for is finished: there are no results yet")
    without = [network for network in _networks(run) if network not in run.latency.seconds]
    if without:
        lines.append(f"latency of {', '.join(without)}: {run.latency.why}")
    if any("reliability" not in row for row in rows):
        lines.append("reliability: stages of earlier versions did not record it")
    if any("edges" not in stage for stage in run.started.get("stages", [])):
        lines.append("methods on edges: runs of earlier versions did not record them")
    if rows and not any(row["teachers"] for row in rows):
        lines.append("agreement: no network of the table has a teacher")
    if any(name not in row.get("agreement", {}) for row in rows for name in row["teachers"]):
        lines.append("agreement: it is measured with frozen teachers alone")
    dropped = any("+drop" in label for label in run.labels)
    if dropped and not any(group.names("train_kept_") for group in run.groups):
        lines.append("how often each teacher was kept: it was not recorded, or not yet")
    if any(stage.history and not stage.memory for stage in run.stages):
        lines.append("memory: some stages were copied from a store, or are of earlier versions")
    if not run.started:
        lines.append("how it was started: there is no run.json")
    return lines


def made(run: RunRecord) -> list[tuple[str, Table]]:
    """How each of the runs in the folder was started, the newest first."""
    earlier = run.started.get("earlier", [])
    starts = [run.started, *reversed(earlier)] if run.started else []
    tables = []
    for i, one in enumerate(starts):
        rows = [[text, str(one[name])] for name, text in _STARTED.items() if one.get(name)]
        tables.append(("newest run" if i == 0 else "earlier run", Table(["", ""], rows)))
    return tables


def config(run: RunRecord) -> str:
    """The config's fields as JSON."""
    return json.dumps(run.config, indent=1, ensure_ascii=False)


def taught(group: Group) -> str:
    """Who teaches, and by which methods."""
    stage = group.stages[0]
    ways: dict[tuple[str, ...], list[str]] = {}
    for teacher, methods in stage.edges.items():
        live = ("live",) if teacher in stage.live else ()
        ways.setdefault((*methods, *live), []).append(teacher)
    return "; ".join(
        " + ".join(teachers) + (f" ({', '.join(methods)})" if methods else "")
        for methods, teachers in ways.items()
    )


def _networks(run: RunRecord) -> Sequence[str]:
    return list(dict.fromkeys(stage.network for stage in run.stages if stage.record))


def _done(group: Group, run: RunRecord) -> str:
    if all(stage.given for stage in group.stages):
        return "weights are given"
    parts = [f"{len(group.done)} of {len(group.stages)}"]
    if lost := sum(x.id in run.lost for x in group.stages):
        parts.append(f"{lost} failed")
    begun = [x for x in group.stages if x.history and not x.record and x.id not in run.lost]
    parts += [f"seed {x.seed} at epoch {len(x.history)} of {x.epochs}" for x in begun]
    return ", ".join(parts)


def _memory(group: Group) -> str:
    peaks = [stage.memory for stage in group.stages if stage.memory]
    return f"{max(peaks)[0] / 2**20:,.0f} ({max(peaks)[1]})" if peaks else ""
