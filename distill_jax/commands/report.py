"""`distill_jax report`: a run as a page that opens anywhere, while it is trained too."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

from distill_jax import report
from distill_jax.commands.arguments import Command, Flag
from distill_jax.report.page import Latency, RunRecord, SearchRecord, html_page, markdown
from distill_jax.runs.checkpoint import CheckpointError, write_text
from distill_jax.runs.folder import is_search
from distill_jax.runs.latency import measure_latency, read_latency
from distill_jax.runs.run_record import read_record, read_search
from distill_jax.runs.workdir import WorkdirError, folder_of

LATENCY = Flag(
    "latency", "yes: time networks that were not timed yet; no.", "yes", choices=("yes", "no")
)


def report_page(given: SimpleNamespace) -> int:
    """Writes report.html and report.md into the first folder."""
    workdirs = list({folder_of(x).resolve(): x for x in (given.workdir, *given.other)}.values())
    records = _apart([_read(workdir) for workdir in workdirs], workdirs)  # before any is measured
    first = folder_of(given.workdir)
    try:
        shown = [
            record
            if isinstance(record, SearchRecord)
            else dataclasses.replace(
                record, latency=_latency(workdir, record, given.latency == "yes")
            )
            for workdir, record in zip(workdirs, records, strict=True)
        ]
        for name, text in (("report.html", html_page(shown)), ("report.md", markdown(shown))):
            write_text(first / name, text)
    except CheckpointError as error:
        raise WorkdirError(f"{error}; expected a folder that can be written") from None
    console = report.console()
    line = f"report.html and report.md are in {first}"
    console.print(line, soft_wrap=True)  # a path is not broken
    return 0


def _read(workdir: str | Path) -> RunRecord | SearchRecord:
    return read_search(workdir) if is_search(workdir) else read_record(workdir)


def _apart(
    records: list[RunRecord | SearchRecord], workdirs: list[str]
) -> list[RunRecord | SearchRecord]:
    """The records, those of folders of one name under their paths."""
    names = [record.name for record in records]
    return [
        dataclasses.replace(record, name=workdir) if names.count(record.name) > 1 else record
        for record, workdir in zip(records, workdirs, strict=True)
    ]


def _latency(workdir: str | Path, record: RunRecord, measure: bool) -> Latency:
    if not measure:
        return read_latency(workdir)
    done = dict.fromkeys(stage.network for stage in record.stages if stage.record)
    return measure_latency(workdir, list(done))


REPORT = Command(
    about="Writes runs or searches as a page: report.html and report.md in the first folder.",
    run=report_page,
    words=("workdir",),
    more="other",
    flags=(LATENCY,),
)
