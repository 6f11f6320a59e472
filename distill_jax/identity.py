"""What a thing is, in one line: digests of arrays and JSON, texts of code, and what differs."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import math
import sys
import tokenize
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from typing import Any

import jax
import numpy as np

_ABSENT = "absent"
_PLAIN = bool | int | float | complex | str | bytes | np.generic | np.dtype | jax.ShapeDtypeStruct
# Their code counts by name: a newer version of a library makes no other network.
_LIBRARIES = {"chex", "distill_jax", "flax", "jax", "jaxlib", "numpy", "optax"}
_LIBRARIES |= sys.stdlib_module_names


def leaves(tree: Any) -> list[tuple[str, Any]]:
    """(path, leaf) of everything in a tree."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in found]


def digests(tree: Any) -> dict[str, str]:
    """The sha256 of every array (type, shape and bytes), by its path."""
    return {path: _digest(np.asarray(leaf)) for path, leaf in leaves(jax.device_get(tree))}


def digest(tree: Any) -> str:
    """One sha256 of a whole tree; equal for equal names, types, shapes and bytes."""
    return digest_json(digests(tree))


def digest_json(value: Any) -> str:
    """The sha256 of a JSON value, whatever the order of its fields."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()


def plain(value: Any) -> Any:
    """A value as it comes back from a JSON file: tuples are lists, all names are text."""
    return json.loads(json.dumps(value))


def check_new_name(what: str, name: Any, example: str, taken: Collection[str]) -> None:
    """Raises ValueError where a user cannot register a thing under a name.

    Args:
      what: the kind of thing with its article, such as "a method".
      name: for the config.
      example: of a name.
      taken: the names of the library's own.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{what}'s name is an identifier such as {example!r}, got {name!r}")
    if name in taken:
        raise ValueError(f"{name!r} is {what} of the library: choose another name")


def finite(value: Any) -> Any:
    """A JSON value with null for numbers that are not finite, which JSON has not."""
    if isinstance(value, Mapping):
        return {name: finite(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def differences(saved: Any, wanted: Any, where: str = "") -> list[str]:
    """What differs between two JSON values, a line each, by the path of its fields."""
    if isinstance(saved, Mapping) and isinstance(wanted, Mapping):
        lines = []
        for name in sorted(saved.keys() | wanted.keys()):
            pair = saved.get(name, _ABSENT), wanted.get(name, _ABSENT)
            lines += differences(*pair, f"{where}.{name}" if where else name)
        return lines
    return [] if saved == wanted else [f"{where} is {saved!r} there and {wanted!r} here"]


def changed_fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not at their default, nested ones likewise.

    A field that is added later leaves what was digested before as it is.
    """
    changed = {}
    for field in dataclasses.fields(value):
        own = getattr(value, field.name)
        if own != field.default:
            changed[field.name] = changed_fields(own) if dataclasses.is_dataclass(own) else own
    return changed


def _digest(array: np.ndarray) -> str:
    head = f"{array.dtype} {array.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def describe(value: Any) -> str:
    """A text of a value and of the code behind it, the same in every process.

    Functions and classes count by qualified name and source (by bytecode where there is none),
    together with what they close over and what they name of their module: functions, classes,
    constants, objects. Those of libraries count by name and by what they close over. Dataclasses
    and modules, linen or nnx, count by class and fields, nnx Variables by shape, arrays by digest,
    containers by what they contain.
    """
    return _Description().text(value)


def describe_own(value: Any) -> str | None:
    """As `describe`, of what is the library's own code and plain values; None of all else.

    Nothing that decides what such a value does is missing in its description.
    """
    description = _Description()
    text = description.text(value)
    return None if description.others else text


class _Description:
    """One description: what was described once has a number from then on.

    `others` is whether there was code that is not the library's, or an object of unknown content.
    """

    def __init__(self) -> None:
        self.others = False
        # By id; the things are held, so that no id is used again.
        self._seen: dict[int, tuple[int, Any]] = {}

    def text(self, value: Any) -> str:
        if isinstance(value, enum.Enum):
            return f"{_name(type(value))}.{value.name}"
        if value is None or isinstance(value, _PLAIN):
            return repr(value)
        if isinstance(value, types.ModuleType):
            return value.__name__
        if isinstance(value, np.ndarray | jax.Array):
            return _array(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, functools.partial):
            return f"partial({self._items([value.func, value.args, value.keywords])})"
        if isinstance(value, types.MethodType):
            return f"method({self._items([value.__self__, value.__func__])})"
        if isinstance(value, Mapping | Set | list | tuple):
            return self._container(value)
        if callable(value) and hasattr(value, "__wrapped__"):  # jitted or decorated
            self.others = True  # what is around it is not described
            return self.text(inspect.unwrap(value))
        if isinstance(value, types.FunctionType):
            return self._function(value)
        return self._object(value)

    def _items(self, values: Iterable[Any]) -> str:
        return ", ".join(map(self.text, values))

    def _fields(self, fields: Mapping[str, Any]) -> str:
        return ", ".join(f"{name}={self.text(value)}" for name, value in sorted(fields.items()))

    def _container(self, value: Any) -> str:
        if isinstance(value, Mapping):
            pairs = sorted(((self.text(key), key) for key in value), key=lambda pair: pair[0])
            return "{" + ", ".join(f"{text}: {self.text(value[key])}" for text, key in pairs) + "}"
        if isinstance(value, Set):
            return "{" + ", ".join(sorted(map(self.text, value))) + "}"
        if hasattr(value, "_fields"):
            return f"{self._class(type(value))}({self._fields(value._asdict())})"
        return f"{type(value).__name__}[{self._items(value)}]"

    def _function(self, function: types.FunctionType) -> str:
        if number := self._number(function):
            return f"{_name(function)}#{number}"
        used = dict(_closed_over(function))
        if _is_library(function):
            return f"{_name(function)}({self._fields(used)})" if used else _name(function)
        self.others = True
        used |= _named_globals(function)
        used |= {"defaults": [function.__defaults__, function.__kwdefaults__]}
        return f"{_name(function)}({_source(function)}, {self._fields(used)})"

    def _class(self, kind: type) -> str:
        if number := self._number(kind):
            return f"{_name(kind)}#{number}"
        bases = [base for base in kind.__bases__ if not _is_library(base)]
        if _is_library(kind):  # a lifted class of somebody's is made in a library
            return f"{_name(kind)}({self._items(bases)})" if bases else _name(kind)
        self.others = True
        functions = _functions_of(kind)
        source = _source(kind)
        if not source:  # such as a notebook's
            members = {n: v for n, v in vars(kind).items() if isinstance(v, _PLAIN | tuple)}
            members = {name: v for name, v in members.items() if not name.startswith("__")}
            source = f"{[_source(f) for f in functions]} {self._fields(members)}"
        used: dict[str, Any] = {"bases": bases}
        for function in functions:
            used |= dict(_closed_over(function)) | _named_globals(function)
        return f"{_name(kind)}({source}, {self._fields(used)})"

    def _object(self, value: Any) -> str:
        kind = type(value)
        nnx = sys.modules.get("flax.nnx")  # slow to import, so only where somebody has
        if nnx and isinstance(value, nnx.RngStream | nnx.Rngs):
            return self._class(kind)
        if number := self._number(value):
            return f"{_name(kind)}()#{number}"
        if nnx and isinstance(value, nnx.Variable):
            leaves = jax.tree.map(lambda leaf: f"{leaf.dtype} {leaf.shape}", value[...])
            return f"{self._class(kind)}({leaves})"
        fields: Mapping[str, Any] = {}
        if dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value)]
            fields = {name: getattr(value, name) for name in names if name != "parent"}
        elif (nnx and isinstance(value, nnx.Module)) or not (
            _is_library(kind) or _is_installed(kind)
        ):
            fields = getattr(value, "__dict__", {})
        elif not (hasattr(value, "__qualname__") and _is_library(value)):
            self.others = True
        fields = {name: own for name, own in fields.items() if not name.startswith("_pytree__")}
        named = _name(value) if hasattr(value, "__qualname__") else self._class(kind)
        return f"{named}({self._fields(fields)})"

    def _number(self, thing: Any) -> int | None:
        """The number of what was described before; None of what is new, which gets the next."""
        if id(thing) in self._seen:
            return self._seen[id(thing)][0]
        self._seen[id(thing)] = (len(self._seen) + 1, thing)
        return None


def _name(thing: Any) -> str:
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{getattr(named, '__module__', None)}.{named.__qualname__}"


def _is_library(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "builtins").partition(".")[0] in _LIBRARIES


def _is_installed(kind: type) -> bool:
    """Whether a class is of a package that was installed: what it keeps may be anything."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def _source(thing: Any) -> str:
    """The digest of the source of a function or class, "" of a class that has none."""
    try:
        text = inspect.getsource(thing)
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):  # or a file of something else
        if isinstance(thing, type):
            return ""
        text = repr(_bytecode(thing.__code__))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _bytecode(code: types.CodeType) -> Any:
    constants = [
        _bytecode(c) if isinstance(c, types.CodeType) else _ordered(c) for c in code.co_consts
    ]
    return code.co_code.hex(), constants, code.co_names, code.co_varnames, code.co_freevars


def _ordered(constant: Any) -> str:
    return repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)


def _closed_over(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name != "__class__":
            try:
                yield name, cell.cell_contents
            except ValueError:  # not assigned yet
                yield name, _ABSENT


def _named_globals(function: types.FunctionType) -> dict[str, Any]:
    """What the code names in its module; modules count as part of the source."""
    names = _names(function.__code__) & function.__globals__.keys()
    found = {name: function.__globals__[name] for name in names}
    return {name: v for name, v in found.items() if not isinstance(v, types.ModuleType)}


def _names(code: types.CodeType) -> set[str]:
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _functions_of(kind: type) -> list[types.FunctionType]:
    """The functions that a class was written with, without those that a decorator made."""
    found = []
    for attribute in vars(kind).values():
        inner = getattr(attribute, "fget", getattr(attribute, "__func__", attribute))
        if isinstance(inner, types.FunctionType):
            function = inspect.unwrap(inner)
            made = function.__code__.co_filename == "<string>" and function.__name__ != "__call__"
            if function.__module__ == kind.__module__ and not made:
                found.append(function)
    return found


def _array(array: Any) -> str:
    if isinstance(array, jax.core.Tracer):
        return f"{array.dtype} {array.shape}"
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return f"{array.dtype} {array.shape} {_digest(np.asarray(array))[:16]}"
