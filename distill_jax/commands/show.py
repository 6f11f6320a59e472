"""`distill_jax show`: the table of a run, while it is trained too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from distill_jax import report
from distill_jax.commands.arguments import Command
from distill_jax.report.page import RunRecord
from distill_jax.runs.folder import (
    is_held,
    read_epochs,
    run_folder,
    stage_place,
    stage_state,
)
from distill_jax.runs.provenance import read_run
from distill_jax.runs.run_record import read_record


def show(given: SimpleNamespace) -> int:
    """Prints the rows that there are, and how far the others are."""
    folder = run_folder(given.workdir)
    record, console = read_record(given.workdir), report.console()  # every record is checked
    if rows := record.rows:
        console.print(report.results_table(rows, report.title(rows)))
    for line in _progress(folder, record):
        console.print(line, soft_wrap=True)  # a command can be copied
    return 0


def _progress(folder: Path, record: RunRecord) -> list[str]:
    """How many stages are done, which are being trained or lost, and how the run was started."""
    run, epochs = read_run(folder), read_epochs(folder)
    stages: list[dict[str, Any]] = run.get("stages", [])
    waiting = [
        stage
        for stage in stages
        if stage["epochs"]
        and not stage_state(stage_place(folder, stage["network"], stage["stage"])).done
    ]
    held, lost = is_held(folder), [stage for stage in waiting if stage["stage"] in record.lost]
    lines = [f"{len(stages) - len(waiting)} of {len(stages)} stages are done"]
    lines[0] += f", {len(lost)} failed" if lost else ""
    if held or waiting:
        lines[0] += "; a run is at work here" if held else "; no run is at work here"
    for stage in waiting:
        if stage not in lost and (history := epochs.get(stage["stage"])):
            lines.append(f"  {_epoch(stage, history)}")
    why = (row["failed"] for row in record.rows if row.get("failed"))
    lines += [f"  failed: {one}" for one in dict.fromkeys(why)]
    if run:
        about = {name: run.get(name, "?") for name in ("date", "distill_jax", "jax", "command")}
        lines.append("started {date}, distill_jax {distill_jax}, JAX {jax}".format(**about))
        if len(waiting) > len(lost) and not held:
            lines.append(f"to go on: {about['command']}")
    return lines


def _epoch(stage: dict[str, Any], history: list[dict[str, Any]]) -> str:
    taught = f" taught by {'+'.join(stage['teachers'])}" if stage["teachers"] else ""
    last = history[-1]
    return (
        f"{stage['network']}{taught}, seed {stage['seed']}: epoch {last['epoch']} of "
        f"{stage['epochs']}, {report.brief(last)}"
    )


SHOW = Command(
    about="Prints the table of a run, while it is trained too.", run=show, words=("workdir",)
)
