"""Fields of a config: values against the type of their default, and errors that help."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np

# Sections whose keys are the user's own.
OPEN = ("config.methods",)
AUTO = "auto"


class ConfigError(ValueError):
    """A config that cannot be run; the message names the field, its value and what was expected."""


def merge(defaults: Mapping, values: Mapping, where: str, fill: bool = True) -> dict[str, Any]:
    """`values`, each checked against the type of its default, and defaults for the rest."""
    merged = dict(defaults) if fill else {}
    _check_section(where, values)
    for name, value in values.items():
        if name not in defaults:
            raise ConfigError(unknown(f"{where}.{name}", name, tuple(defaults)))
        merged[name] = typed(f"{where}.{name}", value, defaults[name])
    return merged


def _check_section(where: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is a section with fields, got {value!r}")


def typed(where: str, value: Any, default: Any) -> Any:
    if where == "config.devices":
        return _devices(where, value)
    if where == "config.sweep" and isinstance(value, (list, tuple)):
        if not all(isinstance(entry, Mapping) for entry in value):
            raise ConfigError(f"{where} is a section with fields, or a list of them, got {value!r}")
        return tuple(map(dict, value))
    if default is None:  # may stay unset
        kind = bool if where.endswith(".teacher_droppable") else float
        if value is None or (isinstance(value, bool) and kind is bool):
            return value
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        raise ConfigError(f"{where} is a {kind.__name__}, or None to leave it open, got {value!r}")
    if isinstance(default, Mapping):
        # Sections whose keys are the user's own are checked by their readers.
        _check_section(where, value)
        return merge(default, value, where) if default and where not in OPEN else dict(value)
    if isinstance(default, tuple):
        if isinstance(value, str):
            return (value,)
        if isinstance(value, np.ndarray) and value.ndim:
            value = value.tolist()
        if isinstance(value, (list, tuple)):
            return tuple(value)
    elif isinstance(default, bool) or isinstance(value, bool):
        if isinstance(default, bool) and isinstance(value, bool):
            return value
    elif isinstance(default, float) and isinstance(value, (int, float)):
        return float(value)
    elif isinstance(value, type(default)):
        return value
    raise ConfigError(f"{where} is a {type(default).__name__}, got {value!r}")


def _devices(where: str, value: Any) -> int | str:
    """A number of devices, which may be text too, or "auto"."""
    if value == AUTO or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    raise ConfigError(f"{where} is a number of devices, 0 for all, or {AUTO!r}, got {value!r}")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ConfigError(unknown(name, value, allowed))
    return value


def unknown(where: str, name: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(name), known, 1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{where}: unknown {name!r}{hint} There are {', '.join(known)}"


def words(name: str, value: Any) -> tuple[str, ...]:
    # A tuple given on the command line as a,b arrives as one string ("a,b",).
    parts = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(part, str) for part in parts):
        raise ConfigError(f"{name} are names, got {parts}")
    return tuple(word.strip() for part in parts for word in part.split(",") if word.strip())
