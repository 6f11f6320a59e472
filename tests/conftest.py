"""Four CPU devices and one cache of compiled programs for every test, set before JAX is loaded.

JAX_PLATFORMS says where else they are to run; what needs more devices or a CPU is then skipped.
"""

import multiprocessing.util
import os
import shutil
import tempfile
from typing import Any

import cli
import hypothesis
import pytest

os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
if os.environ.setdefault("JAX_PLATFORMS", "cpu") != "cpu":
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")  # as tolerances are float32's
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # commands share the device
STARTED_HERE = "PYTEST_XDIST_WORKER" not in os.environ  # else it was, and the folder is inherited
if STARTED_HERE:
    # pytest keeps the folders of failed tests; what libraries leave goes when the tests end.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    folder = tempfile.mkdtemp(prefix="distill_jax-tests-")
    tempfile.tempdir = os.environ["TMPDIR"] = folder
    # At exit, after multiprocessing (-100), which removes a folder of its own in there.
    multiprocessing.util.Finalize(None, shutil.rmtree, (folder, True), exitpriority=-200)
# What one test compiled, the others and the commands they start need not compile again. JAX writes
# its entries in place: a process that meets half of one warns, and compiles for itself.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), "compiled")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# No test is timed, whatever else the machine does.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    """How XLA compiles, for the tests and for the commands they start."""
    # The slow part compiles all as it is compiled for a user.
    flags = cli.QUICKLY_COMPILED if config.getoption("markexpr") == "not slow" else []
    os.environ["XLA_FLAGS"] = " ".join([cli.DEVICES, *flags])
    from distill_jax.train import startup

    startup.ask_for_fast_convolutions()  # as a command does, so that both end with the same bytes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what cannot be on another platform than the CPU."""
    if os.environ["JAX_PLATFORMS"] == "cpu":
        return
    import jax

    there, platform = len(jax.local_devices()), jax.default_backend()
    for item in items:
        if there < 4 and (item.get_closest_marker("devices") or _asks_for_devices(item)):
            item.add_marker(pytest.mark.skip(f"needs several devices, there are {there}"))
        elif platform != "cpu" and item.get_closest_marker("cpu"):
            item.add_marker(pytest.mark.skip(f"is about a CPU, this is a {platform}"))


def _asks_for_devices(item: pytest.Item) -> bool:
    """Whether a parameter is a number of devices above 1, or a config with one."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    given = [params, *(value for value in params.values() if isinstance(value, dict))]
    numbers = [one.get("devices") for one in given]
    return any(isinstance(number, int) and number > 1 for number in numbers)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Neighbours, which share programs, on one worker; the first to end takes from the other."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)
