"""The platform that a program is made for, by which its algorithms are chosen.

It is that of the devices on which the program will run, which need not be this machine's: a program
can be lowered for a GPU where there is none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

Function = TypeVar("Function", bound=Callable[..., Any])

NAMES = {"cuda": "gpu", "rocm": "gpu"}  # as devices of another machine call theirs
_meant = jax.make_user_context(None)  # part of the key under which JAX keeps what it traced


def backend() -> str:
    """The platform meant while a program is traced: "cpu", "gpu" or "tpu"; else JAX's default."""
    return _meant.value or jax.default_backend()


def traced_for(platform: str, function: Function) -> Function:
    """`function`, for which `backend` is `platform` wherever it is traced."""

    @functools.wraps(function)
    def on_platform(*args, **kwargs):
        # Nothing is traced anew where the platform is JAX's own.
        with _meant(None if platform == jax.default_backend() else platform):
            return function(*args, **kwargs)

    return on_platform  # type: ignore[return-value]


def platform_of(device: Any) -> str:
    """The platform of a device, as `backend` names it."""
    return NAMES.get(device.platform, device.platform)
