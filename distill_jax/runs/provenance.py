"""How a run was started: versions, machine, command. For people; nothing depends on it."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from distill_jax import processes, report
from distill_jax.data import Task
from distill_jax.methods import heard
from distill_jax.runs.checkpoint import write_json, write_text
from distill_jax.runs.config import RUN
from distill_jax.runs.plan import Plan
from distill_jax.runs.records import guidance_of
from distill_jax.train.stage import Stage

_GIT_SECONDS = 5
_PACKAGES = ("flax", "jax", "jaxlib", "numpy", "optax", "orbax-checkpoint")


def version() -> str:
    """The version of the package; "unknown" where it is used without having been installed."""
    try:
        return importlib.metadata.version("distill_jax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def versions() -> dict[str, str]:
    """The versions of what decides numbers."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"distill_jax": version(), "python": platform.python_version(), **found}


def provenance(config_file: str) -> dict[str, Any]:
    """Describes this process and its machine as JSON values."""
    return {
        "distill_jax": version(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        **({"processes": processes.count()} if processes.count() > 1 else {}),
        "host": platform.node(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "config_file": config_file,
        "git": _revision(Path.cwd()),
        "distill_jax_git": _revision(Path(__file__).parent),
    }


def write_run(folder: Path, plan: Plan, config_file: str) -> None:
    """Writes `run.json`: the newest run in a folder, what it trains, and as "earlier" all others.

    Args:
      folder: the working directory.
      plan: the stages.
      config_file: where the config comes from; "" where from no file.
    """
    before = read_run(folder)
    earlier = before.pop("earlier", [])
    before.pop("stages", None)
    runs = [*earlier, before] if before else []
    write_json(folder / RUN, {**provenance(config_file), "stages": planned(plan), "earlier": runs})


def write_files(folder: Path, task: Task | None) -> None:
    """Writes what a task has to be kept beside its results, such as a vocabulary."""
    for name, text in (task.files if task is not None else {}).items():
        write_text(folder / name, text)


def planned(plan: Plan) -> list[dict[str, Any]]:
    """The stages of a plan in the order of training, as JSON values."""
    guidance = guidance_of(plan)
    return [
        {
            **report.stage_fields(stage),
            "methods": [] if stage.file else [name for name, _ in stage.methods],
            "edges": {} if stage.file else edges(stage),
            "live": [network.name for network in stage.live],
            "phase": stage.phase,
            "file": stage.file,
            **_starts_from(stage),
            "epochs": 0 if stage.file else stage.recipe.epochs,
            "together": list(plan.together[stage_id]),
            "guidance": list(guidance[stage_id]),
        }
        for stage_id, stage in plan.stages.items()
    ]


def _starts_from(stage: Stage) -> dict[str, Any]:
    """The weights that a stage starts from, where it does so."""
    own = stage.initial
    return {} if own is None else {"initial": {"file": own.file, "classifier_anew": own.anew}}


def edges(stage: Stage) -> dict[str, list[str]]:
    """Which methods each teacher of a stage teaches by."""
    methods = [method for _, method in stage.methods]
    live = [network.name for network in stage.live]
    own: dict[str, list[str]] = {name: [] for name in stage.taught_by}
    for name, method in stage.methods:
        if method.taught:
            for place in heard(method, methods, stage.network.name, len(stage.teachers), live):
                own[stage.taught_by[place]].append(name)
    return own


def read_run(folder: Path) -> dict[str, Any]:
    """What `write_run` wrote; empty where there is nothing that can be read."""
    try:
        found = json.loads((folder / RUN).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _revision(folder: Path) -> str | None:
    """The commit that a folder is at, "-dirty" where files were changed; None outside of git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    command += ["--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
