"""What a measurement was made on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch")


def describe(cores: list[int]) -> dict[str, str | int | float]:
    """Processor, cores, memory, system and versions; nothing that names the machine."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "processor": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": os.cpu_count() or 0,
        "cores used": len(cores) or len(os.sched_getaffinity(0)),
        "memory GiB": round(int((_field("/proc/meminfo", "MemTotal") or "0").split()[0]) / 2**20),
        "system": platform.system(),
        "cores busy before": round(busy_cores(), 2),
        "python": platform.python_version(),
        **versions,
    }


def one_line(machine: dict[str, str | int | float]) -> str:
    """The description as a sentence."""
    return (
        f"{machine['processor']}, {machine['cores used']} of {machine['cores']} cores, "
        f"{machine['memory GiB']} GiB; "
        + ", ".join(f"{name} {machine[name]}" for name in ("python", *PACKAGES))
    )


def busy(machine: dict[str, str | int | float]) -> str:
    """What to say where other processes are at work; empty where none are."""
    others = float(machine["cores busy before"])
    if others < 0.2:
        return ""
    return f"other processes use {others:.1f} cores: these figures are not to be quoted"


def busy_cores(seconds: float = 0.2) -> float:
    """How many cores the whole machine uses, watched for so long; 0 where it does not say."""
    before = _ticks()
    time.sleep(seconds)
    after = _ticks()
    if not before or not after:
        return 0.0
    passed = [b - a for a, b in zip(before, after, strict=True)]
    idle = passed[3] + passed[4]  # and waiting for a disk
    return (os.cpu_count() or 1) * (1 - idle / max(sum(passed), 1))


def _ticks() -> list[int]:
    try:
        first = Path("/proc/stat").read_text().splitlines()[0]
    except OSError:
        return []
    return [int(number) for number in first.split()[1:9]]


def _field(file: str, name: str) -> str:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return ""
    found = (line.partition(":")[2].strip() for line in lines if line.startswith(name))
    return next(found, "")
