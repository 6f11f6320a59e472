"""A run or a search as the page shows it, read from its folder; while it is trained too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill_jax.report.page import RecordError, RunRecord, SearchRecord, StageRecord
from distill_jax.report.page.record import stage_record
from distill_jax.runs.config import RECORDED, RESOLVED, RUN
from distill_jax.runs.folder import (
    SEARCH,
    is_held,
    read_epochs,
    read_rows,
    run_folder,
    stage_place,
)
from distill_jax.runs.workdir import WorkdirError, folder_of


def read_record(workdir: str | Path) -> RunRecord:
    """Reads all that a run has written so far, but for the latency of its networks.

    Args:
      workdir: its folder.

    Raises:
      WorkdirError: there is no run, nothing of it, or a record is damaged; names the file.
    """
    folder = run_folder(workdir)
    config = _read(folder / RECORDED)
    resolved = config.pop(RESOLVED, {})
    started = _read(folder / RUN) if (folder / RUN).exists() else {}
    rows = read_rows(folder)
    stages = _stages(folder, started, rows)
    if not rows and not stages:
        raise WorkdirError(f"{folder} has nothing to show: expected a run that was started")
    networks = resolved.get("networks") if isinstance(resolved, dict) else None
    try:
        return RunRecord(
            name=folder.absolute().name,
            rows=rows,
            stages=stages,
            networks=tuple(map(str, networks or ())),
            started=started,
            config=config,
            at_work=is_held(folder),
        )
    except RecordError as error:
        raise _damaged(folder, error) from None


def read_search(workdir: str | Path) -> SearchRecord:
    """Reads all that a search has written so far.

    Args:
      workdir: its folder.

    Raises:
      WorkdirError: its record is damaged; names the file.
    """
    folder = folder_of(workdir)
    try:
        return SearchRecord(folder.absolute().name, _read(folder / SEARCH))
    except RecordError as error:
        raise _damaged(folder / SEARCH, error) from None


def _stages(folder: Path, started: dict[str, Any], rows: list[dict[str, Any]]) -> list[StageRecord]:
    planned, epochs = started.get("stages", []), read_epochs(folder)
    evaluated = {row.get("stage"): row for row in rows if not row.get("failed")}
    if not isinstance(planned, list):
        raise _damaged(folder / RUN, f"stages is {planned!r}: expected a list")
    stages = []
    for one in planned:
        try:
            place = stage_place(folder, one["network"], one["stage"])
            path = place / "result.json"
            result = _read(path) if path.exists() else None
            if one.get("epochs") == 0 and one["stage"] in evaluated:  # weights that were given
                result = {"record": evaluated[one["stage"]], "history": []}
            stages.append(stage_record(one, result, epochs.get(one["stage"], [])))
        except (RecordError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(folder, error) from None
    return stages


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    if not isinstance(found, dict):
        raise _damaged(path, "expected an object")
    return found


def _damaged(path: Path, why: Any) -> WorkdirError:
    return WorkdirError(f"{path}: a record is damaged: {' '.join(str(why).split())}")
