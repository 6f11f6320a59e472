"""Memory: what was needed of it, and that a device has not enough, in a line."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator

import jax

_SIGNS = ("RESOURCE_EXHAUSTED", "out of memory")


class OutOfMemoryError(RuntimeError):
    """A device's memory does not suffice; the message names the stage and what needs less."""


@contextlib.contextmanager
def told(what: str, *, members: int = 1, cached: bool = False, kept: str = "") -> Iterator[None]:
    """Raises OutOfMemoryError in the place of XLA's error.

    Args:
      what: is computed, in words.
      members: how many are trained at once.
      cached: whether the teachers' outputs are computed once and kept.
      kept: where what is finished and saved is, if anywhere.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not any(sign.lower() in str(error).lower() for sign in _SIGNS):
            raise
        helps = ["lower recipe.batch_size (recipe.accumulate_steps keeps the size of an update)"]
        helps += [f"lower population ({members} are trained at once)"] if members > 1 else []
        helps += ["set teacher_logits=graph, which keeps no table"] if cached else []
        saved = f"; what was saved in {kept} stays" if kept else ""
        raise OutOfMemoryError(
            f"{what}: out of memory ({_first_line(error)}){saved}. To need less, "
            f"{', or '.join(helps)}"
        ) from error


def peak() -> dict[str, int]:
    """The most memory that was in use so far, in bytes, by where.

    Returns:
      {"device_peak_bytes"}, of the device that had most; {"process_peak_bytes"} where devices do
      not say, as CPUs.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]
    if peaks:
        return {"device_peak_bytes": max(peaks)}
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"process_peak_bytes": kibibytes * (1 if sys.platform == "darwin" else 1024)}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
