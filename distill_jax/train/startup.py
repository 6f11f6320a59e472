"""What JAX has to be asked for before it starts, from when on it cannot be changed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from pathlib import Path

import jax
import jax.numpy as jnp

SAME_BYTES = "--xla_gpu_exclude_nondeterministic_ops=true"
# What a GPU is given as a CUDA graph, so that the host does not submit kernel by kernel: beside
# what XLA captures by itself, convolutions and the loop over steps.
GRAPHS = "--xla_gpu_enable_command_buffer"
CAPTURED = "+CONVOLUTION,+WHILE,+CONDITIONAL"
GRAPHS_SINCE = (0, 11)  # JAX before that does not know all of these, or does not capture them
# Which of its operations XLA has YNNPACK compute on a CPU.
YNNPACK = "--xla_cpu_experimental_ynn_fusion_type"
NO_CONVOLUTIONS = "-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
YNNPACK_UNTIL = (0, 13)  # of JAX from that on it is not known whether it has this
CPUS = Path("/proc/cpuinfo")
CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


def check_backend() -> None:
    """Starts JAX; ValueError where it cannot, or where several processes do not know each other."""
    try:
        jax.devices()
    except Exception as error:  # a RuntimeError, an AssertionError, or what a plugin raises
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise ValueError(
            f"JAX cannot start on JAX_PLATFORMS={asked!r} ({first}): expected a platform that is "
            "installed and has a device here, such as 'cpu', or none named"
        ) from error
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            f"{jax.process_count()} processes share these devices and have not joined: expected "
            "--coordinator_address=auto, or jax.distributed.initialize() before JAX starts"
        )


def ask_for_cpu_devices(count: int) -> None:
    """Lets the CPU count as `count` devices; too late, and without effect, once JAX has started."""
    if count > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


def ask_for_same_bytes() -> None:
    """Has XLA leave out the operations of a GPU that round otherwise each time they run.

    Raises:
      ValueError: JAX has started on a GPU without.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if SAME_BYTES in flags.split():
        return
    if not _has_started():
        _add(SAME_BYTES)
    elif jax.default_backend() == "gpu":
        raise ValueError(
            "deterministic is True and JAX has already started on a GPU: expected "
            f"XLA_FLAGS={SAME_BYTES} in the environment before jax is imported"
        )


def ask_for_graphs() -> None:
    """Has XLA run train loops on an NVIDIA GPU as CUDA graphs; in vain once JAX has started.

    On an H100 steps take 0.80 to 0.91 of the time (docs/speed.md). `XLA_FLAGS` that say what is to
    be captured stay as they are.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if GRAPHS in flags or not _may_start_on_cuda() or _has_started():
        return
    _add(f"{GRAPHS}={CAPTURED}")


def ask_for_fast_convolutions() -> None:
    """Has XLA's older convolutions run on a CPU with AVX2 alone; in vain once JAX has started.

    With YNNPACK's, the newer, training steps on one device take 1.1 to 1.5 times as long there, see
    docs/speed.md. `XLA_FLAGS` that say what YNNPACK computes stay as they are.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if YNNPACK in flags or jax.__version_info__ >= YNNPACK_UNTIL:
        return
    if not _has_avx2_alone() or _has_started():
        return
    _add(f"{YNNPACK}={NO_CONVOLUTIONS}")


def start_cudnn() -> None:
    """Starts cuDNN on each GPU where convolutions are captured in CUDA graphs.

    It cannot start while a graph is captured: the first convolution of a program that comes from
    the compilation cache, and so was not tuned in this process, would fail ("No DNN support for
    stream"). One convolution alone is too small a graph for XLA to capture.
    """
    if "CONVOLUTION" not in os.environ.get("XLA_FLAGS", "") or jax.default_backend() != "gpu":
        return
    for device in jax.local_devices():
        image, kernel = (jax.device_put(jnp.ones(s), device) for s in ((1, 8, 8, 8), (8, 8, 3, 3)))
        jax.block_until_ready(jax.lax.conv(image, kernel, (1, 1), "SAME"))


def _add(flag: str) -> None:
    """Adds to `XLA_FLAGS`, which are to begin with a flag: else XLA reads them as a file's name."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def _may_start_on_cuda() -> bool:
    """Whether JAX has a plugin for NVIDIA GPUs and is not told to start on another platform."""
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
    return (
        jax.__version_info__ >= GRAPHS_SINCE
        and any(map(importlib.util.find_spec, CUDA_PLUGINS))
        and (not platforms or bool({"cuda", "gpu"} & set(platforms.split(","))))
    )


def _has_avx2_alone() -> bool:
    """Whether this is an x86 CPU with AVX2 and without AVX-512, where Linux tells."""
    try:
        features = set(CPUS.read_text().split())
    except OSError:
        return False
    return "avx2" in features and "avx512f" not in features


def _has_started() -> bool:
    """Whether JAX has started its backends, from when on this setting cannot be changed."""
    asked = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    try:
        jax.config.update("jax_num_cpu_devices", 2 if asked == 1 else 1)
    except RuntimeError:
        return True
    jax.config.update("jax_num_cpu_devices", asked)
    return False
