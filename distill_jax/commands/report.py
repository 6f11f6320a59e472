"""`distill_jax report`: a run as a page that opens anywhere, while it is trained too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from distill_jax import report
from distill_jax.commands.arguments import Command, Flag
from distill_jax.report.page import RunRecord, html_page, markdown
from distill_jax.runs.checkpoint import CheckpointError, write_text
from distill_jax.runs.folder import run_folder
from distill_jax.runs.latency import measure_latency, read_latency
from distill_jax.runs.run_record import read_record
from distill_jax.runs.workdir import WorkdirError

LATENCY = Flag(
    "latency", "yes: time networks that were not timed yet; no.", "yes", choices=("yes", "no")
)


def report_page(given: SimpleNamespace) -> int:
    """Writes report.html and report.md into the first folder."""
    workdirs = list(dict.fromkeys((given.workdir, *given.other)))
    for workdir in workdirs:
        read_record(workdir)  # before anything is measured
    first = run_folder(given.workdir)
    try:
        runs = [_record(workdir, given.latency == "yes") for workdir in workdirs]
        for name, text in (("report.html", html_page(runs)), ("report.md", markdown(runs))):
            write_text(first / name, text)
    except CheckpointError as error:
        raise WorkdirError(f"{error}; expected a folder that can be written") from None
    console = report.console()
    line = f"report.html and report.md are in {first}"
    console.print(line, soft_wrap=True)  # a path is not broken
    return 0


def _record(workdir: str | Path, measure: bool) -> RunRecord:
    done = [stage.network for stage in read_record(workdir).stages if stage.record]
    networks = list(dict.fromkeys(done))
    latency = measure_latency(workdir, networks) if measure else read_latency(workdir)
    return read_record(workdir, latency)


REPORT = Command(
    about="Writes a run, or several, as a page: report.html and report.md in the first folder.",
    run=report_page,
    words=("workdir",),
    more="other",
    flags=(LATENCY,),
)
