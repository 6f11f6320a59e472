"""JAX's own settings, which the environment or another library may have changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

PRECISIONS = ("default", "high", "highest")


@contextlib.contextmanager
def pinned(dtype: str, precision: str = "default") -> Iterator[None]:
    """Computes as the library means it: random numbers and types are what a stage's id says.

    Args:
      dtype: of the networks; float64 alone turns on JAX's 64-bit types.
      precision: of matrix products and convolutions; "default" leaves what the user has set.
    """
    with (
        jax.enable_x64(dtype == "float64"),
        jax.default_prng_impl("threefry2x32"),
        jax.threefry_partitionable(True),
        jax.numpy_dtype_promotion("standard"),
        _precision(precision),
    ):
        yield


def _precision(name: str) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if name == "default" else jax.default_matmul_precision(name)


def changed_settings() -> dict[str, Any]:
    """The settings that change numbers and are the user's to choose, where they are not JAX's own.

    They are part of a stage's id.
    """
    defaults = {"jax_default_matmul_precision": None, "jax_random_seed_offset": 0}
    values = {name: getattr(jax.config, name) for name in defaults}
    return {name: values[name] for name, default in defaults.items() if values[name] != default}
