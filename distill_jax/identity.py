"""What a thing is, in one line: digests of arrays and JSON, texts of code, and what differs."""

from __future__ import annotations
import __future__

import argparse
import builtins
import dataclasses
import dis
import enum
import fractions
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import pathlib
import sys
import textwrap
import tokenize
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from typing import Any

import jax
import ml_collections
import numpy as np

_ABSENT = "absent"
_PLAIN = bool | int | float | complex | str | bytes | np.generic | np.dtype | jax.ShapeDtypeStruct
_PLAIN |= range | slice | pathlib.PurePath | fractions.Fraction
# Their code counts by name: a newer version of a library makes no other network.
_LIBRARIES = {"chex", "distill_jax", "flax", "jax", "jaxlib", "numpy", "optax"}
_LIBRARIES |= sys.stdlib_module_names
_INSTALLED = "site-packages", "dist-packages"
# Instructions that look up what a function has or closes over; the last name of those of two.
_LOCAL = [name for name in dis.opmap if name.startswith("LOAD_FAST") or name.endswith("LOAD_FAST")]
_LOCAL += ["LOAD_DEREF"]


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


def imported_nnx() -> Any:
    """Flax nnx where somebody has imported it: it is slow to import, and few networks are of it."""
    return sys.modules.get("flax.nnx")


def describe(value: Any) -> str:
    """A text of a value and of the code behind it, the same in every process.

    Functions and classes count by qualified name and source (by bytecode where there is none),
    together with what they close over and what they name of their module, and of others that are
    the user's, also those that they import when they run: functions, classes, constants, objects.
    Those of libraries count by name and by what they close over. Dataclasses and modules, linen or
    nnx, count by class and fields, nnx Variables by shape, arrays by digest, containers by what
    they contain.
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
            own = "" if _is_library(type(value)) else f"={self.text(value.value)}"
            return f"{_name(type(value))}.{value.name}{own}"
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
        if isinstance(value, types.SimpleNamespace | argparse.Namespace):
            return f"{type(value).__name__}({self._fields(vars(value))})"
        if isinstance(value, ml_collections.ConfigDict):
            return f"ConfigDict({self._container(value.to_dict())})"
        if callable(value) and hasattr(value, "__wrapped__"):  # jitted or decorated
            self.others = True  # of a library's decorator what is around it is not described
            return self._wrapped(value)
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

    def _wrapped(self, value: Any) -> str:
        """What a decorator made: what is within, the rules of its derivatives, a user's wrapper."""
        inner, around = self.text(value.__wrapped__), []
        if isinstance(value, jax.custom_vjp | jax.custom_jvp):
            around = [getattr(value, name, None) for name in ("fwd", "bwd", "jvp")]
        elif isinstance(value, types.FunctionType) and _is_users(value.__globals__["__name__"]):
            return f"{self._function(value)} around {inner}"
        return f"{inner} with {self._items(around)}" if around else inner

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
        used: dict[str, Any] = {"bases": bases, **_named_in_body(kind, functions)}
        for function in functions:
            used |= dict(_closed_over(function)) | _named_globals(function)
        return f"{_name(kind)}({source}, {self._fields(used)})"

    def _object(self, value: Any) -> str:
        kind = type(value)
        nnx = imported_nnx()
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
    return _is_module_installed(kind.__module__)


def _is_module_installed(name: str) -> bool:
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    return any(part in file for part in _INSTALLED)


def _is_users(module: str) -> bool:
    """Whether a module is neither a library's nor of a package that was installed."""
    return module.partition(".")[0] not in _LIBRARIES and not _is_module_installed(module)


def _source(thing: Any) -> str:
    """The digest of the source of a function or class, "" of a class that has none."""
    try:
        text = inspect.getsource(getattr(thing, "__code__", thing))  # of a wrapper its own
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
    """What the code names in its module, and of the user's modules there, around it and within."""
    names = _names(function.__code__) & function.__globals__.keys()
    found = {name: function.__globals__[name] for name in names}
    found = {name: v for name, v in found.items() if not isinstance(v, types.ModuleType)}
    around = {**function.__globals__, **dict(_closed_over(function))}
    return found | _named_of_modules(function.__code__, around)


def _names(code: types.CodeType) -> set[str]:
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _named_of_modules(code: types.CodeType, names: Mapping[str, Any]) -> dict[str, Any]:
    """What code names of the user's modules, `helper.loss` by this text; libraries are left out."""
    imported, found = _imported_within(code, names.get("__package__"))
    names = {**names, **imported}
    for chain in (*_chains(code), *_chains(code, _LOCAL)):
        value, path = names.get(chain[0]), chain[0]
        for name in chain[1:]:
            if not isinstance(value, types.ModuleType) or not _is_users(value.__name__):
                break
            value, path = getattr(value, name, _ABSENT), f"{path}.{name}"
        if path != chain[0] and not isinstance(value, types.ModuleType):
            found[path] = value
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            found |= _named_of_modules(inner, names)
    return found


def _imported_within(code: types.CodeType, package: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What code imports when it runs, of the user's modules.

    It is imported here, if it was not before: the same text has to come of it in every process.

    Returns:
      The modules by the names that they have in the code, and all else by `module.name`.
    """
    modules: dict[str, Any] = {}
    found: dict[str, Any] = {}
    module: types.ModuleType | None = None
    value: Any = None
    name = ""
    steps = [i for i in dis.get_instructions(code) if i.opname not in ("EXTENDED_ARG", "CACHE")]
    for place, step in enumerate(steps):
        if step.opname == "IMPORT_NAME":
            level, names = steps[place - 2].argval, steps[place - 1].argval
            name = f"{'.' * level}{step.argval}"
            module = _users_module(name, package)
            if module is not None and not names:  # `import a.b` gives a
                module = sys.modules[module.__name__.partition(".")[0]]
            value = module
        elif step.opname == "IMPORT_FROM" and module is not None:
            value = getattr(module, step.argval, _ABSENT)
            if not isinstance(value, types.ModuleType):
                found[f"{name}.{step.argval}"] = value
        elif step.opname.startswith("STORE_") and isinstance(value, types.ModuleType):
            own = step.argval[0] if isinstance(step.argval, tuple) else step.argval
            modules[own], value = value, None
    return modules, found


def _users_module(name: str, package: Any) -> types.ModuleType | None:
    """A module that is a user's, imported; None of others, and of one that cannot be imported."""
    try:
        absolute = importlib.util.resolve_name(name, package)
        top = absolute.partition(".")[0]
        if top not in _LIBRARIES and top not in sys.modules:
            place = importlib.util.find_spec(top)  # what is installed is not imported for this
            if place is None or any(part in (place.origin or "") for part in _INSTALLED):
                return None
        elif not _is_users(top):
            return None
        return importlib.import_module(absolute)
    except Exception:  # whatever somebody's code raises: the function itself will say so
        return None


def _chains(
    code: types.CodeType, loads: Collection[str] = ("LOAD_GLOBAL", "LOAD_NAME")
) -> Iterator[list[str]]:
    """The names that code looks up, each with the attributes that follow it.

    Args:
      code: of a function or a class.
      loads: the instructions that look up; by default those outside of the code.
    """
    chain: list[str] = []
    for instruction in dis.get_instructions(code):
        if chain and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain.append(instruction.argval)
            continue
        if chain:
            yield chain
        named = instruction.opname in loads
        value = instruction.argval
        chain = [value[-1] if isinstance(value, tuple) else value] if named else []


def _named_in_body(kind: type, functions: Iterable[types.FunctionType]) -> dict[str, Any]:
    """What the body of a class names outside of its methods' code: for constants and defaults.

    Where it names what is not its module's, such as what a function around it has, the constants
    and defaults themselves.
    """
    if (code := _body_of(kind)) is None:
        return {}
    names = getattr(sys.modules.get(kind.__module__), "__dict__", {})
    loaded = {chain[0] for chain in _chains(code) if not chain[0].startswith("__")}
    found = _named_of_modules(code, names)
    for name in loaded & names.keys():
        value = names[name]
        if not (isinstance(value, types.ModuleType) or (callable(value) and _is_library(value))):
            found[name] = value
    if loaded - names.keys() - vars(builtins).keys() - vars(kind).keys():
        plain_ones = {n: v for n, v in vars(kind).items() if isinstance(v, _PLAIN | tuple | list)}
        found |= {f".{n}": v for n, v in plain_ones.items() if not n.startswith("__")}
        found["defaults"] = [[own.__defaults__, own.__kwdefaults__] for own in functions]
    return found


def _body_of(kind: type) -> types.CodeType | None:
    """The code of a class's body; None where its source is not at hand."""
    future = __future__.annotations.compiler_flag  # they stay texts, of which its source tells
    try:
        source = textwrap.dedent(inspect.getsource(kind))
        whole = compile(source, "<class>", "exec", future, dont_inherit=True)
    except (OSError, TypeError, ValueError, SyntaxError, tokenize.TokenError):
        return None
    bodies = (c for c in whole.co_consts if isinstance(c, types.CodeType))
    return next((code for code in bodies if code.co_name == kind.__name__), None)


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
