"""How many devices share a batch where nobody says: by a rule, so the same on the same machine."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import jax

from distill_jax.train.stage import Recipe

# What was measured to pay (experiments/results/devices.json): two devices, each with 16 examples.
MOST_ON_CPU, SHARE_ON_CPU = 2, 16
SHARE = 128  # of a GPU or TPU
SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def devices_for(recipes: Iterable[Recipe], platform: str, there: int) -> int:
    """The number of devices that share each batch of all these recipes.

    Args:
      recipes: every device needs an equal and large enough share of their batches, and BatchNorms
        that see the whole of them.
      platform: "cpu", "gpu" or "tpu".
      there: how many devices there are; of a CPU, how many cores.

    Returns:
      On a GPU or TPU all of them or one, on a CPU two or one.
    """
    count, least = there, SHARE
    if platform == "cpu":
        count, least = min(there, MOST_ON_CPU), SHARE_ON_CPU
    shared = all(
        recipe.batch_size % count == 0
        and recipe.batch_size // count >= least
        and recipe.last_batch == "drop"
        and recipe.sync_bn
        for recipe in recipes
    )
    return count if shared else 1


def here(recipes: Iterable[Recipe]) -> int:
    """`devices_for` where JAX has started."""
    platform, there = jax.default_backend(), jax.local_device_count()
    return devices_for(recipes, platform, min(there, cores()) if platform == "cpu" else there)


def cores() -> int:
    """The cores that this process may use; threads of one core count once, where Linux tells."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    try:
        return len({Path(SIBLINGS.format(i)).read_text() for i in allowed})
    except OSError:
        return len(allowed)
