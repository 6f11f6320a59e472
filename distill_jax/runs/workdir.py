"""The working directory: ours, of one experiment, and held by one run at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from distill_jax import processes
from distill_jax.identity import differences, plain
from distill_jax.runs.checkpoint import CheckpointError, write_json
from distill_jax.runs.config import RECORDED, RESOLVED, RUN, default_config

log = logging.getLogger("distill_jax")
LOCK = ".lock"
SHARED_SECONDS = 20  # that a network file system may take to show a file to others
# What may be there before the config is: a run that was killed at its start leaves no more.
_OWN = (LOCK, f".{RECORDED}.tmp", "compiled")
# Fields that ask for more or less of the same experiment, or say where and how it is computed.
# Weights that are read, and data, are known by their content.
RESUMABLE_FIELDS = (
    "name",
    "comparisons",
    "students",
    "seeds",
    "teacher_weights",
    "init",
    "topology",
    "population",
    "workers",
    "teacher_logits",
    "deterministic",
    "max_nonfinite_steps",
    "checkpoint_every",
    "tensorboard",
)


class WorkdirError(RuntimeError):
    """A working directory that cannot be used."""


def folder_of(workdir: str | Path) -> Path:
    """The folder that a text names, "~" being the user's home.

    Raises:
      WorkdirError: it is a URL, or there is no home.
    """
    if "://" in str(workdir):
        raise WorkdirError(
            f"the working directory {workdir} is a URL: expected a folder of a file system that is "
            "mounted here"
        )
    try:
        return Path(workdir).expanduser()
    except RuntimeError as error:
        raise WorkdirError(f"the working directory {workdir}: {error}") from None


@contextlib.contextmanager
def opened(workdir: str | Path | None, config: Mapping[str, Any]) -> Iterator[Path | None]:
    """The working directory, made where it is missing and held by this run alone.

    Of several processes the first holds it.

    Args:
      workdir: the folder; None gives None.
      config: its fields as JSON values, and as "resolved" what they come to; it is written there.

    Raises:
      WorkdirError: it cannot be written, holds other things than ours or another experiment, whose
        differences are listed, or another run is at work in it.
    """
    if workdir is None:
        yield None
        return
    with contextlib.ExitStack() as stack:

        def opened_here():
            folder = stack.enter_context(held(folder_of(workdir), RECORDED, _OWN))
            saved = _check_same(folder, plain(config[RESOLVED]))
            try:
                resolved = config[RESOLVED]
                resolved = {**resolved, "registered": _all_registered(saved, resolved)}
                write_json(folder / RECORDED, {**config, RESOLVED: resolved})
            except CheckpointError as error:
                raise WorkdirError(f"cannot write to the working directory: {error}") from error
            return folder

        yield processes.of_first(opened_here)


def check_shared(workdir: str | Path, folder: Path) -> None:
    """Raises ProcessError where a process does not see the working directory of the first.

    That would work until another machine comes to be the first, which would begin anew.

    Args:
      workdir: of this process.
      folder: of the first, in which `run.json` is just written.
    """
    text = processes.of_first(lambda: (folder / RUN).read_text())

    def look():
        own, patience = folder_of(workdir), time.monotonic() + SHARED_SECONDS
        while not _holds(own, text):
            if time.monotonic() > patience:
                raise WorkdirError(
                    f"the working directory {own.absolute()} is not that of process 0, {folder}: "
                    "expected one that all processes share"
                )
            time.sleep(0.2)

    if processes.count() > 1:
        processes.each(look)


def _holds(folder: Path, text: str) -> bool:
    with contextlib.suppress(OSError):
        os.listdir(folder)  # a network file system may answer from memory without
        return (folder / RUN).read_text() == text
    return False


@contextlib.contextmanager
def held(folder: Path, record: str, before: Collection[str]) -> Iterator[Path]:
    """A folder, made where it is missing and held by one process at a time.

    Args:
      folder: which.
      record: the file by which it is known as ours.
      before: what may be there before that file is.

    Raises:
      WorkdirError: it cannot be written, holds other things, or another run is at work in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_own(folder, record, before)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise WorkdirError(
            f"cannot write to the working directory {folder} ({error}): expected a folder that "
            "can be written, or a place for a new one"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise WorkdirError(
                    f"another run is at work in {folder}: expected one at a time; wait for it, or "
                    "give another --workdir"
                ) from error
            log.warning(
                "%s is on a file system without locks (%s): nothing keeps a second run out of it",
                folder,
                error.strerror,
            )
        yield folder


def _check_own(folder: Path, record: str, before: Collection[str]) -> None:
    """Raises WorkdirError where a folder holds other things and not the file it is known by."""
    if (folder / record).exists():
        return
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in before)
    if foreign:
        raise WorkdirError(
            f"the working directory {folder} holds {', '.join(foreign[:5])} and no {record}: "
            "expected an empty folder, a new one, or one of an earlier run"
        )


def _check_same(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What the config of an earlier run in a folder came to, empty where there was none.

    Raises:
      WorkdirError: it is not ours, or differs in what makes another experiment; the message has
        every difference.
    """
    path = folder / RECORDED
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        found = str(error)
    if isinstance(found, dict):
        found = found.get(RESOLVED)
    if not isinstance(found, dict):
        raise WorkdirError(
            f"{path} is not ours: expected the config of an earlier run; give another --workdir"
        )
    lines = differences(_identifying(found), _identifying(config))
    lines += differences(*_registered_in_both(found, config), "registered")
    if lines:
        raise WorkdirError(
            f"{folder} holds another experiment: expected the same but for "
            f"{', '.join(RESUMABLE_FIELDS)}; give another --workdir, or remove that one:\n  "
            + "\n  ".join(lines)
        )
    return found


def _identifying(config: dict[str, Any]) -> dict[str, Any]:
    left_out = (*RESUMABLE_FIELDS, "registered", "given")  # "data" is the digest of what is given
    kept = {name: value for name, value in config.items() if name not in left_out}
    # Fields that there were not yet are as they are by default.
    kept = {"precision": "default", **kept}
    if isinstance(kept.get("recipe"), dict):
        kept["recipe"] = {**default_config().recipe.to_dict(), **kept["recipe"]}
    if isinstance(kept.get("dataset"), dict):
        fields = kept["dataset"].items()
        # Options are left out where there are none, as where there were none yet.
        kept["dataset"] = {k: v for k, v in fields if k != "data_dir" and (k != "options" or v)}
    return kept


def _registered_in_both(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[Any, Any]:
    """What two configs say of the names that both use; more names may come to be used."""
    tables = [config.get("registered", {}) for config in (one, other)]
    kinds = tables[0].keys() & tables[1].keys()
    names = {kind: tables[0][kind].keys() & tables[1][kind].keys() for kind in kinds}
    first, second = (
        {kind: {name: table[kind][name] for name in names[kind]} for kind in kinds}
        for table in tables
    )
    return first, second


def _all_registered(saved: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Every name that a folder has used, so that none of them comes to mean another thing."""
    before, now = (table.get("registered", {}) for table in (saved, config))
    kinds = {**before, **now}
    return {kind: before.get(kind, {}) | now.get(kind, {}) for kind in kinds}
