"""What JAX is asked for before it starts."""

import importlib.util
import os

import jax
import pytest

from distill_jax.train import startup

GRAPHS = "--xla_gpu_enable_command_buffer=+CONVOLUTION,+WHILE,+CONDITIONAL"


@pytest.fixture
def machine(monkeypatch):
    """Sets what JAX finds: no flags, the plugin of a GPU, and that it has not started."""

    def found(*, plugin="jax_cuda13_plugin", flags="", version=(0, 11, 2), started=False):
        monkeypatch.setenv("XLA_FLAGS", flags)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == plugin or None)
        monkeypatch.setattr(jax, "__version_info__", version)
        monkeypatch.setattr(startup, "_has_started", lambda: started)

    return found


@pytest.mark.parametrize(
    ("changes", "platforms", "expected"),
    [
        ({}, None, GRAPHS),
        ({"flags": "--xla_dump_to=d"}, "cuda,cpu", f"--xla_dump_to=d {GRAPHS}"),
        ({"plugin": "jax_cuda12_plugin"}, "gpu", GRAPHS),
        ({"plugin": "jax_rocm7_plugin"}, None, ""),
        ({}, "cpu", ""),
        ({"version": (0, 10, 2)}, None, ""),
        ({"started": True}, None, ""),
        (
            {"flags": "--xla_gpu_enable_command_buffer="},
            None,
            "--xla_gpu_enable_command_buffer=",
        ),
    ],
)
def test_graphs_are_asked_for_where_jax_may_start_on_an_nvidia_gpu(
    machine, changes, platforms, expected
):
    before = jax.config.jax_platforms
    machine(**changes)
    try:
        jax.config.update("jax_platforms", platforms)
        startup.ask_for_graphs()
    finally:
        jax.config.update("jax_platforms", before)
    assert os.environ["XLA_FLAGS"] == expected


CONVOLUTIONS = "--xla_cpu_experimental_ynn_fusion_type=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
AVX2 = "flags\t\t: fpu fma avx2 bmi2\n"


@pytest.mark.parametrize(
    ("changes", "features", "expected"),
    [
        ({}, AVX2, CONVOLUTIONS),
        ({"flags": "--xla_dump_to=d"}, AVX2, f"--xla_dump_to=d {CONVOLUTIONS}"),
        ({}, "flags\t\t: fpu fma avx2 avx512f\n", ""),
        ({}, "Features\t: fp asimd\n", ""),
        ({}, None, ""),
        ({"version": (0, 13, 0)}, AVX2, ""),
        ({"started": True}, AVX2, ""),
        (
            {"flags": "--xla_cpu_experimental_ynn_fusion_type="},
            AVX2,
            "--xla_cpu_experimental_ynn_fusion_type=",
        ),
    ],
)
def test_the_older_convolutions_are_asked_for_on_a_cpu_with_avx2_alone(
    machine, monkeypatch, tmp_path, changes, features, expected
):
    machine(**changes)
    file = tmp_path / "cpuinfo"
    if features is not None:
        file.write_text(f"processor\t: 0\n{features}")
    monkeypatch.setattr(startup, "CPUS", file)
    startup.ask_for_fast_convolutions()
    assert os.environ["XLA_FLAGS"] == expected


@pytest.mark.parametrize(
    ("backend", "flags", "started"),
    [("gpu", GRAPHS, True), ("gpu", "--xla_dump_to=d", False), ("cpu", GRAPHS, False)],
)
def test_cudnn_is_started_on_each_gpu_before_convolutions_are_captured(
    monkeypatch, backend, flags, started
):
    there = jax.local_devices()  # JAX starts with the flags of the tests
    devices, conv = [], jax.lax.conv

    def noted(image, *args):
        devices.extend(image.devices())
        return conv(image, *args)

    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax.lax, "conv", noted)
    startup.start_cudnn()
    assert devices == (there if started else [])
