"""Starts the workers, asks them in turns, and keeps what they answer."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experiments.benchmark.cases import Case

ROOT = Path(__file__).resolve().parents[2]
MOST_STEPS = 256  # of one turn


@dataclasses.dataclass
class Measured:
    """What was found of one case; seconds and bytes.

    Args:
      case: the variant.
      missing: why it could not be measured; the rest is then empty.
      seconds: of a step, one number for each round.
      start_seconds: from the start of the process to the end of its first step.
      compile_seconds: compiling among them; of torch, all of its first step.
      process_bytes: the process's peak until then; step_bytes: its peak, or its GPU memory's,
        while it steps.
      flops: of a step, counted from the shapes; 0 where not known.
      losses: of the first two steps.
      device: what it ran on.
    """

    case: Case
    missing: str = ""
    seconds: list[float] = dataclasses.field(default_factory=list)
    start_seconds: float = 0.0
    compile_seconds: float = 0.0
    process_bytes: int = 0
    step_bytes: int = 0
    flops: float = 0.0
    losses: list[float] = dataclasses.field(default_factory=list)
    device: str = ""


class Worker:
    """A process that holds one case, pinned to `cores`; it has `limit` seconds to get ready."""

    def __init__(self, case: Case, cores: list[int], cache: str = "", limit: float = math.inf):
        request = {"case": dataclasses.asdict(case), "cores": cores, "cache": cache}
        self.found = Measured(case)
        self.begun = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.benchmark.worker", json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(case, len(cores)),
        )
        timer = threading.Timer(min(limit, threading.TIMEOUT_MAX), self.process.kill)
        timer.daemon = True
        timer.start()
        ready = self._answer()
        timer.cancel()
        if self.found.missing and time.monotonic() - self.begun > limit:
            self.found.missing = f"not ready after {limit:.0f} s"
        if self.found.missing:
            return
        self.found.start_seconds = ready.pop("first_step_done_at") - self.begun
        for name in ("compile_seconds", "process_bytes", "losses", "flops", "device"):
            setattr(self.found, name, ready[name])

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline() if self.process.stdout else ""
        answer = json.loads(line) if line else {"missing": "failed: its process ended"}
        self.found.missing = answer.get("missing", "")
        return answer

    def run(self, steps: int) -> float:
        """Seconds of a step, over `steps` of them; NaN where the worker is gone."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # the missing answer tells of it
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        return self._answer().get("seconds", float("nan"))

    def end(self) -> Measured:
        """Lets the process end, and gives what was found."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        if not self.found.missing:
            self.found.step_bytes = self._answer().get("step_bytes", 0)
        self.process.stdout.close()
        self.process.wait()
        return self.found


def environment(case: Case, cores: int) -> dict[str, str]:
    """The environment of a worker; frameworks read it when they are loaded.

    XLA's flags are those of BENCHMARK_XLA_FLAGS and the number of devices, whatever they are here.
    """
    changed = {"PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    # Workers share a GPU: none may take all of its memory at the start.
    changed["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    flags = os.environ.get("BENCHMARK_XLA_FLAGS", "").split()
    if case.devices > 1:
        flags.append(f"--xla_force_host_platform_device_count={case.devices}")
    if flags:
        changed["XLA_FLAGS"] = " ".join(flags)
    if cores:
        changed["OMP_NUM_THREADS"] = str(cores)
    inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return {**inherited, **changed}


def pinned(count: int) -> list[int]:
    """The first `count` cores that this process may use; none where count is 0."""
    return sorted(os.sched_getaffinity(0))[:count] if count else []


def measure(
    cases: Mapping[str, Case],
    *,
    rounds: int,
    seconds: float,
    cores: list[int],
    say: Callable[[str], None] = lambda text: None,
    at_once: int = 1,
    limit: float = math.inf,
) -> dict[str, Measured]:
    """Measures all cases in turns, A B A B, so that a slow moment of the machine meets them all.

    Args:
      cases: by name.
      rounds: how often each has its turn.
      seconds: how long a turn lasts, about; at least one step.
      cores: that every worker is pinned to.
      say: told of what is being done.
      at_once: how many may get ready at the same time; none has its turn meanwhile.
      limit: seconds that a worker has to get ready.
    """
    workers, found = {}, {}

    def start(name: str) -> Worker:
        say(f"start {name}")
        return Worker(cases[name], cores, limit=limit)

    with ThreadPoolExecutor(at_once) as pool:
        started = dict(zip(cases, pool.map(start, cases), strict=True))
    for name, worker in started.items():
        if worker.found.missing:
            found[name] = worker.end()
        else:
            workers[name] = worker
    steps = {}
    for name, worker in workers.items():  # a turn that does not count: warms up, sets the length
        took = worker.run(2)
        steps[name] = max(1, min(MOST_STEPS, int(seconds / took))) if took > 0 else 1
    for turn in range(rounds):
        say(f"round {turn + 1} of {rounds}")
        for name, worker in workers.items():
            if not worker.found.missing:
                worker.found.seconds.append(worker.run(steps[name]))
    found |= {name: worker.end() for name, worker in workers.items()}
    return {name: found[name] for name in cases}
