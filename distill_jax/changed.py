"""What was compiled of somebody's code, forgotten where that code has changed since.

In a notebook a constant that a loss names can get another value, while the loss is the same object:
by that alone its old program would be found again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import jax

from distill_jax.identity import describe

Cached = TypeVar("Cached", bound=Callable[..., Any])

_CACHES: list[Any] = []
_KNOWN: dict[Any, str] = {}  # things as the caches know them, with their last description


def until_changed(maxsize: int) -> Callable[[Cached], Cached]:
    """Decorates a function as `functools.lru_cache` does; `forget_changed` empties the cache."""

    def decorate(function: Cached) -> Cached:
        cached = functools.lru_cache(maxsize)(function)
        _CACHES.append(cached)
        return cached  # type: ignore[return-value]

    return decorate


def forget_changed(things: Iterable[Hashable]) -> None:
    """Forgets all that was compiled if one of `things` is described otherwise than before."""
    changed = False
    for thing in things:
        text = describe(thing)
        changed |= _KNOWN.get(thing, text) != text
        _KNOWN[thing] = text
    if changed:
        for cache in _CACHES:
            cache.cache_clear()
        jax.clear_caches()  # functions within that are jitted remember what they named, too
