"""Steps in turns with torch.compile's, steps of populations, and one step alone."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
import statistics
import subprocess
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.benchmark import cases, compared, machine
from experiments.benchmark.cases import Case
from experiments.benchmark.measure import Measured, Worker, measure
from experiments.gpu_row.job import Setting
from experiments.gpu_row.lines import Lines

READY = 240.0  # seconds that a step may take to be compiled
PEAK = "matrix product"
PACKAGES = ("numpy", "ml-collections", "orbax-checkpoint", "safetensors", "jax-cuda13-plugin")


class Step(NamedTuple):
    """A step, and by name the one that it is compared with."""

    case: Case
    peer: str = ""


def versions(lines: Lines, setting: Setting) -> None:
    """The machine, its card, its packages, and one step of training."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    lines.add(name="machine", **machine.describe([]), **packages, card=_card())
    found = Worker(_case(setting, "alone", "plane2"), [], limit=READY).end()
    lines.add(name="one step", **_told(found))


def _card() -> str:
    """Name, driver, memory, clock, temperature and power of the GPU."""
    asked = "name,driver_version,memory.total,clocks.sm,temperature.gpu,power.draw"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {type(error).__name__}"
    return done.stdout.strip() or done.stderr.strip()


def plain(lines: Lines, setting: Setting) -> None:
    """The plain chain's steps, its largest network alone, and the product of two matrices."""
    teachers, student = _chains(setting)["plain"]
    largest, chain, alone = teachers[0], "torch.compile, plain", "torch.compile, largest"
    peak = Case("matmul", "square", "64" if setting.smoke else "8192", dtype="bfloat16")
    steps = {
        "plain, teachers computed": Step(_case(setting, "recomputing", student, teachers), chain),
        "plain, from the table": Step(_case(setting, "table", student, teachers), chain),
        "plain, one dropped": Step(_case(setting, "dropping", student, teachers), chain),
        "largest alone": Step(_case(setting, "alone", largest), alone),
        chain: Step(_peer(setting, student, teachers)),
        alone: Step(_peer(setting, largest)),
        PEAK: Step(peak),
    }
    _in_turns(lines, setting, steps)


def deep(lines: Lines, setting: Setting) -> None:
    """The ResNet chain's steps, and an evolving network's."""
    teachers, student = _chains(setting)["resnet"]
    evolving = "evolving:resnet8" if setting.smoke else "evolving:cifar_resnet18"
    chain, own = "torch.compile, ResNet", "torch.compile, evolving"
    steps = {
        "ResNet, teachers computed": Step(_case(setting, "recomputing", student, teachers), chain),
        "ResNet, from the table": Step(_case(setting, "table", student, teachers), chain),
        "evolving": Step(_case(setting, "alone", evolving), own),
        chain: Step(_peer(setting, student, teachers)),
        own: Step(_peer(setting, evolving)),
    }
    _in_turns(lines, setting, steps)


def populations(lines: Lines, setting: Setting) -> None:
    """Several students of the plain chain at once, each taught from its own table."""
    teachers, student = _chains(setting)["plain"]
    case = _case(setting, "table", student, teachers)
    sizes = (1, 2) if setting.smoke else (1, 2, 5, 8, 16)
    several = {str(n): Step(dataclasses.replace(case, members=n), "1") for n in sizes}
    _in_turns(lines, setting, several)


def _chains(setting: Setting) -> dict[str, cases.Row]:
    return cases.SMOKE if setting.smoke else cases.CHAINS


def _case(setting: Setting, variant: str, student: str, teachers: tuple[str, ...] = ()) -> Case:
    batch = 8 if setting.smoke else 128
    return Case("jax", variant, student, teachers, batch, "bfloat16")


def _peer(setting: Setting, student: str, teachers: tuple[str, ...] = ()) -> Case:
    case = _case(setting, "compiled", student, teachers)
    return dataclasses.replace(case, framework="torch")


def _in_turns(lines: Lines, setting: Setting, steps: Mapping[str, Step]) -> None:
    rounds, seconds = (2, 0.0) if setting.smoke else (7, 0.4)
    found = measure(
        {name: step.case for name, step in steps.items()},
        rounds=rounds,
        seconds=seconds,
        cores=[],
        at_once=os.cpu_count() or 1,
        limit=READY,
    )
    differences = compared.fidelity(found)
    for name, step in steps.items():
        more: dict[str, Any] = {"peer": step.peer} if step.peer else {}
        if name in differences:  # of the first losses, to ours of the same problem
            more["losses_differ"] = differences[name]
        lines.add(name=name, **more, **_told(found[name]))


def _told(found: Measured) -> dict[str, Any]:
    """What a line has of a step."""
    told: dict[str, Any] = {"case": dataclasses.asdict(found.case)}
    if found.missing or any(math.isnan(seconds) for seconds in found.seconds):
        return {**told, "missing": found.missing or "its process ended"}
    told |= {key: value for key, value in vars(found).items() if key not in ("case", "missing")}
    if found.seconds:
        seconds = statistics.median(found.seconds)
        images = found.case.batch * found.case.members / seconds
        told |= {"ms": 1e3 * seconds, "images_per_second": images}
        told["tflops"] = found.flops / seconds / 1e12
    return told
