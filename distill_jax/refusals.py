"""Refusals: raised from the call of a public function, and what they say of somebody's error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def refuses(*errors: type[BaseException]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorates a public function that raises `errors` where it was given something wrong.

    Their message says what; the way to the line that found it helps nobody who called. All other
    errors keep their traceback.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return function(*args, **kwargs)
            except errors as error:
                raise error.with_traceback(None) from None

        return checked

    return decorate


def kind_and_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says, "TypeError: ..."."""
    first = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {first}"
