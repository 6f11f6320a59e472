"""The parts, most valuable first: of which jobs each consists, and how long it may take."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmark.measure import ROOT
from experiments.gpu_row.job import Setting


class Job(NamedTuple):
    """A process of its own.

    Args:
      function: MODULE:NAME; it is given the lines, the setting and the options.
      options: of it, plain values.
      ends_killed: whether it ends itself by SIGKILL.
    """

    function: str
    options: dict[str, Any] = {}
    ends_killed: bool = False


class Part(NamedTuple):
    """Jobs that are measured together.

    Args:
      limit: seconds that all of it may take.
      groups: the jobs of a group run at the same time, the groups one after the other.
    """

    limit: float
    groups: tuple[tuple[Job, ...], ...]


def _job(function: str, **options: Any) -> Job:
    return Job(f"experiments.gpu_row.{function}", options)


def _digests() -> Part:
    runs, killed, resumed = [], [], []
    for deterministic in (False, True):
        kind = "deterministic" if deterministic else "default"
        for run in (1, 2):
            own = {"deterministic": deterministic, "cache": f"{kind}-{run}"}
            runs.append(_job("digests:train", **own, name=f"run {run}"))
        shared = {"deterministic": deterministic, "cache": f"{kind}-1"}
        stopped = _job("digests:train", **shared, name="killed", kill=True)
        killed.append(stopped._replace(ends_killed=True))
        resumed.append(_job("digests:train", **shared, name="resumed"))
    return Part(240.0, (tuple(runs), tuple(killed), tuple(resumed)))


def _parity(shares: int = 3) -> Part:
    jobs = [
        _job("parity:check", precision=precision, share=share, shares=shares)
        for precision in ("default", "highest")
        for share in range(shares)
    ]
    return Part(300.0, (tuple(jobs),))


PARTS: dict[str, Part] = {
    "versions": Part(120.0, ((_job("steps:versions"),),)),
    "steps": Part(420.0, ((_job("steps:plain"),), (_job("steps:deep"),))),
    "populations": Part(150.0, ((_job("steps:populations"),),)),
    "digests": _digests(),
    "row4": Part(180.0, tuple((_job("rows:short", name=name),) for name in ("cold", "warm"))),
    "parity": _parity(),
    "row": Part(300.0, ((_job("rows:whole", seeds=1),),)),
    "row5": Part(540.0, ((_job("rows:whole", seeds=5),),)),
}


def refusal(setting: Setting) -> str:
    """Why the rows cannot be trained, by their config and data; empty where they can be."""
    with _started("check", (_job("rows:check"),), setting) as ((_, process, said),):
        return _tail(said).splitlines()[-1] if process.wait() else ""


def run(name: str, part: Part, setting: Setting, limit: float = 0.0) -> None:
    """Runs a part until its end or its limit; what fails or runs over is a line like all else."""
    lines, begun = setting.lines(name), time.monotonic()
    limit = limit or part.limit
    for group in part.groups:
        if begun + limit - time.monotonic() <= 0:
            lines.add(name=", ".join(job.function for job in group), stopped=limit)
            continue
        with _started(name, group, setting) as processes:
            for job, process, said in processes:
                left = begun + limit - time.monotonic()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(left, 0.0))
                about = {"name": job.function, "options": job.options}
                if process.poll() is None:
                    lines.add(**about, stopped=limit, tail=_tail(said))
                elif process.returncode != (-signal.SIGKILL if job.ends_killed else 0):
                    lines.add(**about, failed=process.returncode, tail=_tail(said))
    lines.add(name="end", seconds=round(time.monotonic() - begun, 1))


@contextlib.contextmanager
def _started(part: str, group: tuple[Job, ...], setting: Setting) -> Iterator[list[Any]]:
    """The processes of a group with the files of what they say; on leaving all of them are ended.

    Each leads a group of its own, so that the processes that it started end with it.
    """
    env = {**os.environ, **setting.env}
    env["PYTHONPATH"] = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    env["BENCHMARK_XLA_FLAGS"] = setting.env.get("XLA_FLAGS", "")
    if len(group) > 1:  # they share a GPU: none may take all of its memory at the start
        env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    processes: list[tuple[Job, subprocess.Popen, Path]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for job in group:
                said = Path(folder) / str(len(processes))
                own = dataclasses.replace(setting, started=time.monotonic())
                request = {"part": part, "setting": dataclasses.asdict(own), **job._asdict()}
                with said.open("w") as file:
                    process = subprocess.Popen(
                        [sys.executable, "-m", "experiments.gpu_row.job", json.dumps(request)],
                        stdin=subprocess.PIPE,  # its end tells them that this process is gone
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        cwd=ROOT,
                        env=env,
                        start_new_session=True,
                    )
                processes.append((job, process, said))
            yield processes
        finally:
            for _, process, _ in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


def _tail(said: Path) -> str:
    return said.read_text(errors="replace")[-1500:].strip()
