"""Four CPU devices for every test, set before JAX is loaded."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_PLATFORMS"] = "cpu"


def pytest_addoption(parser):
    """--kills=N: how often tests/resume_test.py ends a run before it is done."""
    parser.addoption("--kills", type=int, default=30, help="runs ended by tests/resume_test.py")
