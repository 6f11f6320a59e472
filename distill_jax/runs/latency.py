"""How long the networks of a run take for one example; measured once and kept in its folder."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import graph, models
from distill_jax.models import Network
from distill_jax.report.page import Latency
from distill_jax.runs.ambient import pinned
from distill_jax.runs.checkpoint import write_json
from distill_jax.runs.config import ConfigError, load_config
from distill_jax.runs.folder import is_held, resolved_of, run_folder
from distill_jax.runs.inputs import spec_of

LATENCY = "latency.json"
CALL_SECONDS = 0.3  # of calls that are timed, of each network
MOST_SECONDS = 60.0  # of all, compilation included; the next time goes on


def read_latency(workdir: str | Path) -> Latency:
    """What was measured before; nothing where that cannot be read."""
    try:
        found = json.loads((run_folder(workdir) / LATENCY).read_text())
        return Latency(
            str(found["device"]), {str(k): float(v) for k, v in found["seconds"].items()}
        )
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return Latency()


def measure_latency(workdir: str | Path, names: list[str]) -> Latency:
    """Measures the networks that were not measured on this device yet, and keeps what it finds.

    Args:
      workdir: the folder of a run; nothing is measured while one is at work.
      names: of the networks.

    Raises:
      CheckpointError: it cannot be written.
    """
    folder, known, device = run_folder(workdir), read_latency(workdir), jax.devices()[0].device_kind
    seconds = dict(known.seconds) if known.device == device else {}
    waiting = [name for name in names if name not in seconds]
    if not waiting:
        return known
    if is_held(folder):
        return Latency(known.device, known.seconds, "not measured while a run is at work")
    begun, why = time.monotonic(), ""
    try:
        config = load_config(str(folder))
        saved = resolved_of(folder)
        with pinned(config.dtype, config.precision):
            for name in waiting:
                if time.monotonic() - begun > MOST_SECONDS:
                    why = "not measured yet, the next report goes on"
                    break
                seconds[name] = _seconds(_network(name, saved))
    except (ConfigError, ValueError, KeyError, TypeError) as error:
        why = f"not measured: {' '.join(str(error).split())}"
    write_json(folder / LATENCY, {"device": device, "seconds": seconds})
    return Latency(device, seconds, why)


def _network(name: str, saved: dict[str, Any]) -> Network:
    """A network as it is deployed, from what the run wrote down of its data."""
    if saved["inputs"] is None:
        raise ValueError("the structure of its inputs is not written down")
    base, _ = graph.architecture(name)
    inputs = spec_of(saved["inputs"])
    return models.build(base, saved["classes"], inputs, saved["dtype"]).backbone


def _seconds(network: Network) -> float:
    """The median of a call with one example, on the first device, compiled."""
    device = jax.devices()[0]

    def forward(variables, inputs):
        return network.apply(variables, inputs)[0].logits

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), network.shapes)
    one = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), network.inputs)
    arguments = jax.device_put((zeros, one), device)
    call = jax.jit(forward).lower(*arguments).compile()
    times: list[float] = []
    while len(times) < 5 or sum(times) < CALL_SECONDS:
        begun = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])
