"""Marks for parameters of tests."""

import pytest


def slow(*values):
    """Parameters that only the slow part of the suite runs; a tuple is several arguments."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
        for value in values
    ]
