"""Pickles of PyTorch state dicts, read without the pickle machine that can call functions.

The opcodes are decoded by `pickletools`, which only decodes, and a stack is kept by the few rules
below. A global is never imported: it becomes its name. A call is never made: the handful that
`torch.save` writes for tensors become records of these, and every other one an `Unknown`, which is
the name of what the file wanted. So there is nothing in here that an untrusted file could reach,
and what stands beside the weights (options, schedulers, counters) is no obstacle to reading them.

Source: the opcodes' meaning, the comments of Python's `pickletools`.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, NamedTuple, cast

from distill_jax.interop.torch_weights import WeightsError

BFLOAT16 = "bfloat16"  # NumPy has no such type
STORAGES = {
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": BFLOAT16,
    "torch.DoubleStorage": "float64",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.storage.UntypedStorage": "uint8",
}
OTHERS = {  # that no weights are in: bytes of an element
    "torch.ComplexFloatStorage": 8,
    "torch.ComplexDoubleStorage": 16,
    "torch.QInt8Storage": 1,
    "torch.QUInt8Storage": 1,
    "torch.QInt32Storage": 4,
}
ORDERED_DICT = "collections.OrderedDict"
REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_REBUILD_TYPE = "torch._tensor._rebuild_from_type_v2"  # of tensors with attributes of their own
_SIZE = "torch.Size"


class Global(NamedTuple):
    """The name of something that lives in a Python module."""

    name: str


class Unknown(NamedTuple):
    """What something would have made that is neither run nor known; its name."""

    name: str


class Storage(NamedTuple):
    """Where the numbers of one or more tensors lie; `dtype` may be the name of an unknown kind."""

    dtype: str
    key: str
    length: int


class Tensor(NamedTuple):
    """A view of a storage; offset and strides count elements. None of it is checked yet."""

    storage: Any
    offset: Any
    size: Any
    stride: Any


def read_pickle(stream: BinaryIO, storages: list[Storage] | None = None) -> Any:
    """The next pickle of `stream`, as containers, numbers, strings and the records above.

    Leaves the stream behind the pickle, and appends all that it names to `storages`.

    Raises:
      WeightsError: it asks for anything that no file of `torch.save` has a use for.
      ValueError, TypeError, LookupError, RecursionError: it is damaged.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in cast(_Opcodes, pickletools.genops(stream)):
        name = opcode.name
        if name in _LITERALS:
            stack.append(argument)
        elif name in _FRESH:
            stack.append(_FRESH[name]())
        elif name in _PUTS:
            memo[argument] = stack[-1]
        elif name in _GETS:
            stack.append(memo[argument])
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in _MAKES:
            count, make = _MAKES[name]
            stack.append(make(_operands(stack, count)))
        elif name in _FILLS:
            operands = _operands(stack, _FILLS[name])
            _filled(stack[-1], operands)
        elif name == "GLOBAL":
            stack.append(_global(argument.split(" ", 1)))
        elif name == "INST":
            _operands(stack, None)
            stack.append(Unknown(argument.replace(" ", ".")))
        elif name == "BINPERSID":
            storage = _storage(_operands(stack, 1))
            if storages is not None and isinstance(storage, Storage):
                storages.append(storage)
            stack.append(storage)
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            _operands(stack, None)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise WeightsError(f"refused: the file wants the opcode {name}; only tensors are read")
    (value,) = stack
    return value


_Opcodes = Iterable[tuple[pickletools.OpcodeInfo, Any, Any]]
_LITERALS = frozenset(
    [
        "INT",
        "LONG",
        "LONG1",
        "LONG4",
        "BININT",
        "BININT1",
        "BININT2",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
    ]
)
_MARK = object()
_FRESH: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "MARK": lambda: _MARK,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
}
_PUTS = frozenset(["PUT", "BINPUT", "LONG_BINPUT"])
_GETS = frozenset(["GET", "BINGET", "LONG_BINGET"])


def _operands(stack: list[Any], count: int | None) -> list[Any]:
    """Takes the last `count` values off the stack, or all down to the mark."""
    operands: list[Any] = []
    while count is None or len(operands) < count:
        value = stack.pop()
        if value is _MARK:
            if count is None:
                break
            raise ValueError("a mark where the pickle needs a value")
        operands.append(value)
    return operands[::-1]


def _global(words: Iterable[Any]) -> Global:
    return Global(".".join(words))


def _called(operands: list[Any]) -> Any:
    """The record of a call."""
    function, arguments = operands[:2]
    if isinstance(function, Unknown):  # what was made elsewhere and is called here
        return function
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise TypeError("a call of what is no function")
    if function.name == ORDERED_DICT:
        pairs = arguments[0] if arguments else ()
        return _filled({}, [part for key, value in pairs for part in (key, value)])
    if function.name == REBUILD_TENSOR:
        return Tensor(*arguments[:4])
    if function.name == _REBUILD_TYPE:
        return _called([arguments[0], arguments[2]])
    if function.name in _PARAMETERS:
        return arguments[0]
    if function.name == _SIZE:
        return tuple(arguments[0])
    return Unknown(function.name)


def _made(operands: list[Any]) -> Unknown:
    """An object of a class: of no class that there is are the tensors of a state dict."""
    kind = operands[0]
    if not isinstance(kind, Global | Unknown):
        raise TypeError("an object of what is no class")
    return Unknown(kind.name)


def _storage(operands: list[Any]) -> Storage | Unknown:
    """The record that a persistent id stands for."""
    if operands[0][0] == "module":  # a class, with the text of its file
        return _made([operands[0][1]])
    kind, dtype, key, _, length, *view = operands[0]
    if kind != "storage" or not isinstance(dtype, Global) or any(v is not None for v in view):
        raise ValueError("a persistent id that is no plain storage")
    if type(key) is not str or type(length) is not int:
        raise TypeError("a storage without its name or its size")
    return Storage(STORAGES.get(dtype.name, dtype.name), key, length)


def _built(operands: list[Any]) -> Any:
    """An object and its state, which is unused: a dictionary's are versions, others are unknown."""
    target, _ = operands
    if not isinstance(target, dict | Unknown):
        raise TypeError("a state for what has none")
    return target


class _Key:
    """In place of a key that no state dict has: hashing a deep enough tuple ends the process."""


def _filled(container: Any, items: list[Any]) -> Any:
    if isinstance(container, Unknown):
        return container
    if isinstance(container, list):
        container.extend(items)
        return container
    if not isinstance(container, dict) or len(items) % 2:
        raise TypeError("items for what is no container")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float | bytes | None):
            key = _Key()
        if key in container:
            raise WeightsError(f"holds {key!r} twice")
        container[key] = value
    return container


# How many operands an opcode takes (None: down to the mark) and what it makes of them.
_MAKES: dict[str, tuple[int | None, Callable[[list[Any]], Any]]] = {
    "TUPLE": (None, tuple),
    "TUPLE1": (1, tuple),
    "TUPLE2": (2, tuple),
    "TUPLE3": (3, tuple),
    "LIST": (None, list),
    "DICT": (None, lambda items: _filled({}, items)),
    "STACK_GLOBAL": (2, _global),
    "FROZENSET": (None, tuple),
    "REDUCE": (2, _called),
    "BUILD": (2, _built),
    "NEWOBJ": (2, _made),
    "NEWOBJ_EX": (3, _made),
    "OBJ": (None, _made),
}
_FILLS: dict[str, int | None] = {
    "APPEND": 1,
    "APPENDS": None,
    "SETITEM": 2,
    "SETITEMS": None,
    "ADDITEMS": None,
}
