"""A worker: one process that builds one variant and runs its steps when it is asked.

  python -m experiments.benchmark.worker '{"case": {...}, "cores": [0, 1], "cache": ""}'

It answers one JSON object a line on its standard output: first what it took to get ready, then the
seconds of a step for every number of steps it is sent, then its memory when nothing more comes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from experiments.benchmark.cases import Case, Unavailable


def build(case: Case, cache: str) -> Any:
    """The step of a case: `run(steps) -> mean loss`, `compile_seconds`, `peak_bytes()`."""
    # Imported here, so that a worker loads its own framework and no other.
    if case.framework == "torch":
        from experiments.benchmark import torch_steps

        return torch_steps.build(case)
    from experiments.benchmark import jax_steps

    jax_steps.set_up(cache)
    return jax_steps.build(case)


def get_ready(case: Case, cache: str) -> tuple[Any, dict[str, Any]]:
    """The step, and what it took: seconds until it was built and until its first step was done."""
    begun = time.monotonic()
    step = build(case, cache)
    built = time.monotonic()
    losses = [step.run(1)]
    first = time.monotonic()
    losses += [step.run(1)]  # compiled anew where layouts or gradient buffers changed
    peak = peak_resident()
    forget_peak()
    return step, {
        "process_bytes": peak,
        "first_step_done_at": first,  # on the clock that all processes share
        "build_seconds": built - begun,
        "first_step_seconds": first - built,
        "compile_seconds": step.compile_seconds or first - built,
        "losses": losses,
        "flops": step.flops,
        "device": step.device,
    }


def forget_peak() -> None:
    """Starts the process's peak of resident memory anew, where Linux lets us.

    What was freed goes back to the system first: the compiler's memory is not the step's.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    """Bytes of resident memory at their highest since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def timed(step: Any, steps: int) -> float:
    """Seconds of a step, over `steps` of them."""
    begun = time.perf_counter()
    step.run(steps)
    return (time.perf_counter() - begun) / steps


def main(argument: str) -> None:
    """Answers until its standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    request = json.loads(argument)
    if request["cores"]:
        os.sched_setaffinity(0, request["cores"])
    fields = request["case"]
    case = Case(**{**fields, "teachers": tuple(fields["teachers"])})
    try:
        step, found = get_ready(case, request["cache"])
        answer(**found)
        for line in sys.stdin:
            answer(seconds=timed(step, int(line)))
        answer(step_bytes=step.peak_bytes() or peak_resident())
    except Unavailable as error:
        answer(missing=str(error))
    except Exception as error:
        traceback.print_exc()
        answer(missing=f"failed: {type(error).__name__}: {str(error).splitlines()[:1]}")


if __name__ == "__main__":
    main(sys.argv[1])
