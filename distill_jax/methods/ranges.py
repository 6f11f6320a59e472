"""What the numbers of a method may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any


def above_zero(method: str, **numbers: Any) -> None:
    """Raises ValueError where one of a method's numbers is not finite and above 0."""
    _each(method, numbers, lambda value: value > 0, "a number above 0")


def not_negative(method: str, **numbers: Any) -> None:
    """Raises ValueError where one of a method's numbers is not finite and 0 or more."""
    _each(method, numbers, lambda value: value >= 0, "a number of 0 or more")


def share(method: str, **numbers: Any) -> None:
    """Raises ValueError where one of a method's numbers is not in [0, 1]."""
    _each(method, numbers, lambda value: 0 <= value <= 1, "a number between 0 and 1")


def counts(method: str, **numbers: Any) -> None:
    """Raises ValueError where one of a method's numbers is no whole number above 0."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{method}'s {name} is a whole number above 0, got {value!r}")


def one_of(method: str, allowed: Collection[Any], **options: Any) -> None:
    """Raises ValueError where one of a method's options is none of those allowed."""
    for name, value in options.items():
        if value not in allowed:
            raise ValueError(f"{method}'s {name} is one of {tuple(allowed)}, got {value!r}")


def _each(
    method: str, numbers: dict[str, Any], holds: Callable[[float], bool], expected: str
) -> None:
    for name, value in numbers.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and holds(value)):
            raise ValueError(f"{method}'s {name} is {expected}, got {value!r}")
