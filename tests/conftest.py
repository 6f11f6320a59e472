"""Four CPU devices and one cache of compiled programs for every test, set before JAX is loaded."""

import os
import shutil
import tempfile

import pytest

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_PLATFORMS"] = "cpu"
# What one test compiled, the others and the commands they start need not compile again. JAX writes
# its entries in place: a process that meets half of one warns, and compiles for itself.
STARTED_HERE = "PYTEST_XDIST_WORKER" not in os.environ  # else it was, and the folder is inherited
if STARTED_HERE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="distill_jax-compiled-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_addoption(parser: pytest.Parser) -> None:
    """--kills=N: how often tests/runs/resume_test.py ends a run before it is done."""
    parser.addoption("--kills", type=int, default=6, help="runs ended by tests/runs/resume_test.py")


def pytest_unconfigure() -> None:
    """Lets go of what was compiled."""
    if STARTED_HERE:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
