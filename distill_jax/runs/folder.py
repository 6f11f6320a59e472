"""The folder of a run as others see it, while it is trained too; nothing here writes."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any, NamedTuple

from distill_jax.runs.config import RECORDED, RESOLVED
from distill_jax.runs.given import RESULTS, WEIGHTS, folder_name
from distill_jax.runs.workdir import LOCK, WorkdirError, folder_of

METRICS, PROGRESS, STAGES = "metrics.jsonl", "progress", "stages"
SEARCH = "search.json"  # in the folder of a search


class StageState(NamedTuple):
    """How far a stage is.

    Args:
      done: whether it is trained, and its weights are there.
      step: of its newest checkpoint; 0 where there is none.
    """

    done: bool
    step: int


def run_folder(workdir: str | Path) -> Path:
    """The folder of a run.

    Raises:
      WorkdirError: there is none, or it is not of a run.
    """
    folder = folder_of(workdir)
    if not folder.is_dir():
        raise WorkdirError(f"there is no folder {folder}: expected the --workdir of a run")
    if is_search(folder):
        raise WorkdirError(
            f"{folder} is the folder of a search, which `report` shows: expected that of a run"
        )
    if not (folder / RECORDED).is_file():
        raise WorkdirError(f"{folder} is not the folder of a run: it has no {RECORDED}")
    return folder


def resolved_of(folder: Path) -> dict[str, Any]:
    """What the config of a run came to, as JSON values."""
    resolved: dict[str, Any] = json.loads((folder / RECORDED).read_text())[RESOLVED]
    return resolved


def is_search(workdir: str | Path) -> bool:
    """Whether a folder is that of a search."""
    return (folder_of(workdir) / SEARCH).is_file()


def stage_place(folder: Path, network: str, stage_id: str) -> Path:
    """Where a run keeps a stage."""
    return folder / STAGES / folder_name(network, stage_id)


def stage_state(place: Path) -> StageState:
    """How far the stage is that is kept in a place."""
    progress = place / PROGRESS
    names = [path.name for path in progress.iterdir()] if progress.is_dir() else []
    steps = [int(name) for name in names if name.isdecimal()]
    return StageState((place / WEIGHTS).is_dir(), max(steps, default=0))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of `results.json`; none where no stage is done yet.

    Raises:
      WorkdirError: the file cannot be read.
    """
    path = folder / RESULTS
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise WorkdirError(f"{path} cannot be read: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise WorkdirError(f"{path} is not the results of a run: expected a list of rows")
    return rows


def read_epochs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The epochs that `metrics.jsonl` has of each stage, by id; a torn last line is left out.

    Raises:
      WorkdirError: another line cannot be read.
    """
    path, epochs = folder / METRICS, dict[str, list[dict[str, Any]]]()
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            epochs.setdefault(row["stage"], []).append(dict(row))
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            if number < len(lines):
                raise WorkdirError(f"{path}, line {number}, cannot be read: {error!r}") from None
    return epochs


def is_held(folder: Path) -> bool:
    """Whether a run is at work in a folder; no where its file system has no locks."""
    try:
        with (folder / LOCK).open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
