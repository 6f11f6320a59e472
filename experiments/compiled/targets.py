"""Devices that are not here, to compile for: an H200, a slice of a TPU v5e.

The compilers come with packages that need no hardware, the extras `aot-gpu` and `aot-tpu`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from distill_jax.train import sharding

# What has to be installed, beside JAX, to compile for a platform.
PACKAGES = {
    "h200": ("jax_plugins.xla_cuda13", "nvidia.cu13"),
    "tpu": ("libtpu",),
}
EXTRAS = {"h200": "aot-gpu", "tpu": "aot-tpu"}
DEVICES = 4
TPU_CLOCK, TPU_PEAK = 1.5e9, 197e12  # cycles, and operations in bfloat16, a second of a TPU v5e


@dataclasses.dataclass(frozen=True)
class Absent(sharding.Topology):
    """A topology of devices that are not here.

    Args:
      target: they.
    """

    target: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        pass  # there is nothing to hold `devices` to

    @property
    def count(self) -> int:
        """How many devices take part."""
        return len(self.target)

    @property
    def mesh(self) -> Mesh:
        """The devices in a row."""
        return Mesh(np.asarray(self.target), (sharding.AXIS,))


def missing(platform: str) -> str:
    """Why nothing can be compiled for a platform here; empty where it can."""
    for module in PACKAGES[platform]:
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"{module} is not installed: expected `pip install -e '.[{EXTRAS[platform]}]'`"
    return ""


def devices(platform: str) -> tuple[Any, ...]:
    """Four devices of a platform; to be asked before JAX has compiled anything."""
    if platform == "tpu":
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # it would look for a real one
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # as none is held
        return tuple(topologies.get_topology_desc("v5e:2x2", platform="tpu").devices)
    (cuda,) = importlib.util.find_spec("nvidia.cu13").submodule_search_locations  # type: ignore[union-attr]
    own = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{own} --xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir={cuda}"
    described = pathlib.Path(__file__).with_name("h200.txtpb").read_text()
    with _cuda_by_name():
        found = topologies.get_topology_desc(
            "h200", platform="cuda", topology=f"1x1x{DEVICES}", target_config=described
        )
    return tuple(found.devices)


@contextmanager
def _cuda_by_name() -> Iterator[None]:
    """JAX takes "cuda" for a platform of its own here, though no such device is attached."""
    from jax._src import xla_bridge

    true = xla_bridge.canonicalize_platform
    xla_bridge.canonicalize_platform = lambda name: "cuda" if name == "gpu" else true(name)
    try:
        yield
    finally:
        xla_bridge.canonicalize_platform = true
