"""Files of `torch.save`, read and written without PyTorch and without running what they hold.

Since PyTorch 1.6 such a file is a zip archive: `data.pkl` describes the tensors, `data/<key>` are
their storages, uncompressed. Before, it was a row of pickles (magic number, protocol, system,
object, storage keys) followed by the storages, each behind its number of elements. Both are read;
the tar archives before those are refused, and the zip is what is written.
"""

from __future__ import annotations

import collections
import functools
import io
import math
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from distill_jax.interop import torch_pickle
from distill_jax.interop.torch_pickle import BFLOAT16, STORAGES, Storage, Tensor, Unknown
from distill_jax.interop.torch_weights import WeightsError

# Far above the weights of any image classifier; below it a few forged bytes cannot ask for the
# moon, be it by a view that repeats one number or by an archive that unpacks to much.
MAX_BYTES = 2**30
_MAX_AXES = 64  # NumPy's
_MAX_KEYS = 6  # that lead to a state dict
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001

_Order = Literal["<", ">"]
_Bytes = Callable[[str], bytes]  # a storage's key -> its content


class Entry(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str


class Contents(NamedTuple):
    """The mappings from names to tensors that a file holds, by the dotted keys that lead to them.

    Args:
      entries: of each mapping; "" is the one at the top.
      arrays: reads one of them; WeightsError where it holds more than tensors, or tensors that
        cannot be; or one of the errors by which a damaged file shows.
      averages: the keys that lead to averaged weights, by what they say.
      top: what the top holds, for messages.
    """

    entries: dict[str, dict[str, Entry]]
    arrays: Callable[[str], dict[str, np.ndarray]]
    averages: tuple[str, ...] = ()
    top: tuple[str, ...] = ()


def read(raw: bytes) -> Contents:
    """What the content of a file of `torch.save` holds; bfloat16 is widened to float32.

    What else a checkpoint holds (epochs, options, the optimizer) is passed over and never run.

    Raises:
      WeightsError: it holds no mapping to tensors.
      Exception: one of those by which a damaged file shows.
    """
    is_zip = raw.startswith(b"PK\x03\x04")
    root, content, order = _read_zip(raw) if is_zip else _read_legacy(raw)
    found = _mappings(root)
    top = root if isinstance(root, dict) else {}

    def arrays(path: str) -> dict[str, np.ndarray]:
        tensors = found[path]
        check_size(sum(_bytes(name, tensor) for name, tensor in tensors.items()))
        return {name: _array(name, tensor, content, order) for name, tensor in tensors.items()}

    return Contents(
        {path: {k: _entry(v) for k, v in tensors.items()} for path, tensors in found.items()},
        arrays,
        tuple(".".join(path) for path, value in _reached(root) if _is_average(path, value)),
        tuple(str(key)[:40] for key in top)[:8],
    )


_AVERAGE = re.compile(r"(^|[^a-z])(ema|swa|averaged?|shadow)($|[^a-z])", re.IGNORECASE)


def _is_average(path: tuple[str, ...], value: Any) -> bool:
    """Whether that is averaged weights, in whatever form; not numbers or options of such a name."""
    if not path or not _AVERAGE.search(path[-1]):
        return False
    if isinstance(value, Unknown):
        return len(path) == 1 and not value.name.startswith("numpy")
    return any(_all_within(value, Tensor))


def _entry(value: Tensor | Unknown) -> Entry:
    if isinstance(value, Unknown) or not isinstance(value.storage, Storage):
        return Entry((), "")
    size = value.size if isinstance(value.size, tuple | list) else (None,)
    dtype = "float32" if value.storage.dtype == BFLOAT16 else value.storage.dtype
    return Entry(tuple(n if type(n) is int else -1 for n in size), dtype)


def _check_known(root: Any) -> None:
    """Raises WeightsError where there is something unknown and no tensor by name."""
    if not _mappings(root):
        for value in _all_within(root, Unknown | torch_pickle.Global):
            raise WeightsError(_refusal(value.name))


def _refusal(name: str) -> str:
    return f"refused: the file wants to run {name[:200]}; only tensors are read"


def check_size(total: int) -> None:
    """Raises WeightsError where tensors of `total` bytes are more than is ever read."""
    if total > MAX_BYTES:
        raise WeightsError(f"claims {total} bytes of tensors: at most {MAX_BYTES} are read")


def check_members(archive: zipfile.ZipFile) -> list[str]:
    """The names in a zip archive; WeightsError where one comes twice."""
    counts = collections.Counter(archive.namelist())
    if twice := [name for name, count in counts.items() if count > 1]:
        raise WeightsError(f"holds {twice[0]!r} twice")
    return list(counts)


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as uint16 -> float32: the same number, whose lower half is zero."""
    return np.asarray(np.left_shift(bits, 16, dtype=np.uint32)).view(np.float32)


# ----------------------------------------------------------------------------------- the two files
def _read_zip(raw: bytes) -> tuple[Any, _Bytes, _Order]:
    archive = zipfile.ZipFile(io.BytesIO(raw))
    names = check_members(archive)
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise WeightsError("is compressed: expected a file of torch.save, which never is")
    if sum(member.file_size for member in members) > len(raw):
        raise WeightsError("claims more bytes than it has: expected a file of torch.save")
    roots = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise WeightsError("holds no data.pkl: expected a file of torch.save")
    folder = roots[0].removesuffix("data.pkl")
    order = archive.read(folder + "byteorder") if folder + "byteorder" in names else b"little"
    if order not in (b"little", b"big"):
        raise WeightsError(f"has the byte order {order[:20]!r}: expected little or big")
    root = torch_pickle.read_pickle(io.BytesIO(archive.read(roots[0])))
    _check_known(root)
    content = functools.cache(lambda key: archive.read(f"{folder}data/{key}"))
    return root, content, "<" if order == b"little" else ">"


def _read_legacy(raw: bytes) -> tuple[Any, _Bytes, _Order]:
    if raw[257:262] == b"ustar":
        raise WeightsError(
            "is a tar archive, as the first PyTorch wrote: load it with PyTorch and save it again"
        )
    stream = io.BytesIO(raw)
    first = torch_pickle.read_pickle(stream) if raw[:1] == b"\x80" else None
    if first != _MAGIC:
        _check_known(first)
        raise WeightsError("is neither a zip archive nor PyTorch's: expected a file of torch.save")
    if (protocol := torch_pickle.read_pickle(stream)) != _PROTOCOL:
        raise WeightsError(f"has the protocol {protocol!r}: expected {_PROTOCOL}")
    system = torch_pickle.read_pickle(stream)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise WeightsError("is big-endian: expected a little-endian file")
    storages: list[Storage] = []
    root = torch_pickle.read_pickle(stream, storages)
    _check_known(root)
    sizes = {storage.key: storage for storage in storages}
    content = {}
    for key in torch_pickle.read_pickle(stream):
        (count,) = struct.unpack("<q", stream.read(8))
        if not isinstance(key, str) or key not in sizes or count != sizes[key].length:
            raise WeightsError(f"has a storage of {count} elements that no tensor asks for")
        content[key] = stream.read(count * _itemsize(sizes[key]))
    return root, content.__getitem__, "<"


# ------------------------------------------------------------------------------------- its content
def _all_within(root: Any, kind: Any) -> Iterable[Any]:
    """All of a kind anywhere in `root`; containers may be shared or hold themselves."""
    todo, seen = [root], set()
    while todo:
        value = todo.pop()
        if isinstance(value, kind):
            yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            todo.extend(value.values() if isinstance(value, dict) else value)


def _mappings(root: Any) -> dict[str, dict[str, Any]]:
    """Of every mapping to tensors, these and what is unknown in it, by the keys that lead there."""
    found = {}
    for path, value in _reached(root):
        parts = value.items() if isinstance(value, dict) else ()
        tensors = {k: v for k, v in parts if isinstance(k, str) and isinstance(v, Tensor | Unknown)}
        if any(isinstance(v, Tensor) for v in tensors.values()):
            found[".".join(path)] = tensors
    return found


def _reached(root: Any) -> Iterable[tuple[tuple[str, ...], Any]]:
    """(keys, value) of all that names and places in lists lead to, but tensors; each once."""
    todo: list[tuple[tuple[str, ...], Any]] = [((), root)]
    seen = set()
    for path, value in todo:  # grows
        if isinstance(value, Unknown):
            yield path, value
        if id(value) in seen or type(value) not in (dict, list, tuple) or len(path) > _MAX_KEYS:
            continue
        seen.add(id(value))
        yield path, value
        parts = value if isinstance(value, dict) else {str(k): v for k, v in enumerate(value)}
        todo += [((*path, k), v) for k, v in parts.items() if isinstance(k, str)]


def _itemsize(storage: Storage) -> int:
    if storage.dtype == BFLOAT16:
        return 2
    return torch_pickle.OTHERS.get(storage.dtype) or np.dtype(storage.dtype).itemsize


def _bytes(name: str, tensor: Tensor | Unknown) -> int:
    """What a tensor takes; WeightsError where it is none, or no view of its storage."""
    if isinstance(tensor, Unknown):
        raise WeightsError(f"{_refusal(tensor.name)}, and {name} is none")
    storage, offset, size, stride = tensor
    if isinstance(storage, Storage) and storage.dtype not in STORAGES.values():
        raise WeightsError(f"{_refusal(storage.dtype)}, and {name} is none that is known")
    if not isinstance(storage, Storage) or not isinstance(size, tuple | list):
        raise WeightsError(f"{name} is no tensor")
    numbers = [storage.length, offset, *size, *stride]
    plain = all(type(n) is int and n >= 0 for n in numbers)
    if not plain or len(size) != len(stride) or len(size) > _MAX_AXES:
        raise WeightsError(f"{name} has offset {offset}, size {size} and strides {stride}")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if (last if count else offset - 1) >= storage.length:
        raise WeightsError(f"{name} reaches beyond the {storage.length} elements of its storage")
    return count * _itemsize(storage)


def _array(name: str, tensor: Tensor, content: _Bytes, order: _Order) -> np.ndarray:
    """A tensor's own copy of its numbers; it has been through `_bytes`."""
    storage, offset, size, stride = tensor
    raw, itemsize = content(storage.key), _itemsize(storage)
    if len(raw) != storage.length * itemsize:
        raise WeightsError(
            f"is damaged: {name} expected {storage.length} {storage.dtype}, found {len(raw)} bytes"
        )
    dtype = np.dtype("uint16" if storage.dtype == BFLOAT16 else storage.dtype)
    if math.prod(size) == 0:
        view = np.empty(size, dtype)
    else:
        steps = [step * itemsize for step in stride]
        view = np.ndarray(size, dtype.newbyteorder(order), raw, offset * itemsize, steps)
    array = view.astype(dtype, order="C")
    return widened(array) if storage.dtype == BFLOAT16 else array


# ----------------------------------------------------------------------------------------- writing
def write(stream: BinaryIO, state: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict as `torch.save` does; `torch.load(path, weights_only=True)` reads it."""
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        members = {"data.pkl": _pickle(state), "byteorder": b"little", "version": b"3\n"}
        for index, array in enumerate(state.values()):
            members[f"data/{index}"] = array.astype(array.dtype.newbyteorder("<")).tobytes()
        for name, content in members.items():  # without a date: same weights, same bytes
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)


def _pickle(state: Mapping[str, np.ndarray]) -> bytes:
    """An OrderedDict of contiguous tensors, in the opcodes of protocol 2."""
    types = {dtype: name for name, dtype in reversed(STORAGES.items())}
    empty = _opcodes(_global(torch_pickle.ORDERED_DICT), ()) + b"R"
    parts = [b"\x80\x02", empty, b"("]
    for index, (name, array) in enumerate(state.items()):
        kind = _global(types[array.dtype.name])
        storage = _opcodes(("storage", kind, str(index), "cpu", array.size)) + b"Q"
        stride = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
        arguments = (storage, 0, array.shape, stride, b"\x89", empty)
        parts.append(_opcodes(name, _global(torch_pickle.REBUILD_TENSOR), arguments) + b"R")
    return b"".join([*parts, b"u."])


def _global(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def _opcodes(*values: Any) -> bytes:
    """Opcodes that push `values`; bytes are opcodes already."""
    parts = []
    for value in values:
        if isinstance(value, bytes):
            parts.append(value)
        elif isinstance(value, int):
            parts.append(b"J" + struct.pack("<i", value))
        elif isinstance(value, tuple):
            parts.append(b"(" + _opcodes(*value) + b"t")
        else:
            text = value.encode()
            parts.append(b"X" + struct.pack("<I", len(text)) + text)
    return b"".join(parts)
