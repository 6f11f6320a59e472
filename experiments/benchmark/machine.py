"""What a measurement was made on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
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
        "load before": round(os.getloadavg()[0], 1),
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
    if float(machine["load before"]) < 0.5:
        return ""
    return (
        f"the machine is busy (load {machine['load before']}): these figures are not to be quoted"
    )


def _field(file: str, name: str) -> str:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return ""
    found = (line.partition(":")[2].strip() for line in lines if line.startswith(name))
    return next(found, "")
