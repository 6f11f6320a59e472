"""The space of a search: fields of a config, each with choices or a range."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from distill_jax import data
from distill_jax.runs.ambient import pinned
from distill_jax.runs.config import (
    FIELDS,
    ConfigError,
    fields_of,
    resolve,
    swept_fields,
)
from distill_jax.runs.config.fields import unknown
from distill_jax.runs.prepare import prepare

Point = dict[str, Any]  # a value for each field of the space
Fields = dict[str, Any]  # of a config, nested
OPEN = ("methods", "method_options", "overrides")  # whose keys are names
# Each makes another question of it: other lines of the table, other images to be right about.
FIXED = ("name", "seeds", "students", "controls", "sweep", "dataset")
_FORMS = '[0.05, 1.0] (a range of two floats), [1, 2, 5] (choices), {"choices": [0.1, 0.9]} or '
_FORMS += '{"low": 1e-4, "high": 0.1, "log": true}'


class SpaceError(ValueError):
    """A space that cannot be searched; the message names the field."""


class Dimension(NamedTuple):
    """What a field may be.

    Args:
      choices: its values; empty where it is a range.
      low: the least of a range; whole numbers are a range of these.
      high: the largest of it.
      log: whether the range is searched by its logarithm.
    """

    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False

    @property
    def ends(self) -> tuple[Any, ...]:
        """The choices, or the ends of the range."""
        return self.choices or (self.low, self.high)

    def as_json(self) -> dict[str, Any]:
        """As `search.json` has it."""
        if self.choices:
            return {"choices": list(self.choices)}
        return {"low": self.low, "high": self.high, "log": self.log}


Space = dict[str, Dimension]


def base_of(config: Mapping[str, Any]) -> tuple[Fields, str]:
    """The fields that all trials share, and a line on what of the config is left out.

    Raises:
      ConfigError: see `fields_of`.
    """
    fields = fields_of(config)
    if fields["sweep"]:
        raise ConfigError(f"config.sweep is {fields['sweep']!r}: expected none, as --space says it")
    guidances = resolve({**fields, "controls": {}}).comparisons
    last = guidances[-1].spec
    shared = {**fields, "guidance": (last,), "controls": {}, "students": ()}
    left_out = [x.label for x in guidances[:-1]] + [f"control {x}" for x in fields["controls"]]
    line = f"searched is guidance {last}; left out: {', '.join(left_out)}" if left_out else ""
    return shared, line


def parse(text: str, fields: Fields, dataset: data.Dataset) -> Space:
    """Reads a space and checks its choices and the ends of its ranges; nothing is compiled.

    Args:
      text: a literal of Python or JSON, {field: what it may be}.
      fields: see `base_of`.
      dataset: that of the config.

    Raises:
      SpaceError: it is no such literal, names no field of the config, or a value is refused.
    """
    if not text:
        raise SpaceError(f"the search needs --space={{field: {_FORMS}}}")
    found = _literal(text)
    if not isinstance(found, dict) or not found or not all(isinstance(k, str) for k in found):
        raise SpaceError(f"--space is a dict of fields, {{field: {_FORMS}}}, got {text!r}")
    for name in found:
        _check_field(name, fields)
    if len({_place(name, fields) for name in found}) < len(found):
        raise SpaceError(f"--space names a field twice: {', '.join(found)}")
    space = {name: _dimension(name, value) for name, value in found.items()}
    first = {name: dimension.ends[0] for name, dimension in space.items()}
    for name, dimension in space.items():
        for value in dimension.ends:
            _check_point(fields, {**first, name: value}, dataset, f"--space: {name}={value!r}")
    return space


def config_of(fields: Fields, points: Sequence[Point]) -> Fields:
    """The config that trains points of a space; several only of fields that can be swept."""
    made, sweeps = _copied(fields), []
    sweepable = swept_fields(fields)
    for point in points:
        sweeps.append({k: _one(v) for k, v in point.items() if k in sweepable})
        for name, value in point.items():
            if name not in sweepable:
                _set(made, name, value)
    return {**made, "sweep": sweeps[0] if len(sweeps) == 1 else tuple(sweeps)}


def all_swept(space: Space, fields: Fields) -> bool:
    """Whether points of a space can be trained by one config, so at once."""
    return space.keys() <= swept_fields(fields).keys()


def _check_point(fields: Fields, point: Point, dataset: data.Dataset, where: str) -> None:
    """Raises SpaceError where a point cannot be trained, or a field of it decides nothing."""
    try:
        experiment = resolve(config_of(fields, [point]))
        if experiment.selection == "test":
            raise ConfigError("selection is test, so that the test set decides: expected another")
        with pinned(experiment.dtype, experiment.precision):
            prepare(experiment, dataset)
    except ValueError as error:
        raise SpaceError(f"{where}: {error}") from None
    (one,) = experiment.comparisons
    swept = [name for name in point if name in swept_fields(fields)]
    if idle := [name for name in swept if name not in dict(one.changes)]:
        raise SpaceError(f"{where}: {idle[0]} makes no difference to guidance {one.spec}")


def _literal(text: str) -> Any:
    for read in (ast.literal_eval, json.loads):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    raise SpaceError(f"--space is a literal of Python or JSON, got {text!r}")


def _check_field(name: str, fields: Fields) -> None:
    head, *rest = name.split(".")
    if head in FIXED:
        raise SpaceError(f"--space: {name} is the same in all trials: expected another field")
    short = tuple(swept_fields(fields))
    paths = tuple(x.path for x in FIELDS if x.section not in ("", "recipe", "dataset"))
    top = tuple(x.path for x in FIELDS if not x.section and x.path not in FIXED)
    known = (*short, *(f"recipe.{x}" for x in fields["recipe"]), *paths, *top)
    if name not in known and not (head in OPEN and rest):
        listed = unknown("--space names no field of the config", name, known)
        raise SpaceError(
            f"{listed.partition('There are')[0]}There are {', '.join(short)}, and all "
            "others by their path, such as loss.teachers"
        )


def _place(name: str, fields: Fields) -> str:
    """Where a field stands, whichever way it is named."""
    if name in fields["recipe"]:
        return f"recipe.{name}"
    return "dropping.survival" if name == "survival" else name


def _dimension(name: str, value: Any) -> Dimension:
    if isinstance(value, dict) and set(value) == {"choices"}:
        return _choices(name, value["choices"])
    if isinstance(value, dict) and {"low", "high"} <= set(value) <= {"low", "high", "log"}:
        return _range(name, value["low"], value["high"], value.get("log", False))
    if isinstance(value, (list, tuple)):
        if len(value) == 2 and all(isinstance(x, float) for x in value):
            return _range(name, *value, False)
        return _choices(name, value)
    raise SpaceError(f"--space: {name} is {_FORMS}, got {value!r}")


def _choices(name: str, values: Any) -> Dimension:
    if not isinstance(values, (list, tuple)) or not values:
        raise SpaceError(f"--space: {name} has one choice or more, got {values!r}")
    if len({_key(value) for value in values}) < len(values):
        raise SpaceError(f"--space: the choices of {name} are all different, got {values!r}")
    return Dimension(tuple(values))


def _range(name: str, low: Any, high: Any, log: Any) -> Dimension:
    numbers = all(
        isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
        for x in (low, high)
    )
    if not numbers or not isinstance(log, bool):
        raise SpaceError(f"--space: {name} goes from a number to a number, got {low!r}, {high!r}")
    if not low < high:
        raise SpaceError(f"--space: {name} goes from low to high, got {low!r} to {high!r}")
    if log and low <= 0:
        raise SpaceError(f"--space: {name} has a logarithm, so low above 0, got {low!r}")
    whole = isinstance(low, int) and isinstance(high, int)
    return Dimension((), *((low, high) if whole else (float(low), float(high))), log)


def _key(value: Any) -> str:
    """Equal for values that are: 1 and 1.0, and not 1 and true."""
    return json.dumps(float(value) if type(value) is int else value, default=str)


def _one(value: Any) -> Any:
    """A value as a sweep takes a single one."""
    return (tuple(value),) if isinstance(value, (list, tuple)) else value


def _set(fields: Fields, path: str, value: Any) -> None:
    *sections, name = path.split(".")
    for section in sections:
        fields = fields.setdefault(section, {})
    fields[name] = value


def _copied(value: Any) -> Any:
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, Mapping) else value
