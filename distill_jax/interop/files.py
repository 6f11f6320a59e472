"""Weights in files: `.safetensors`, `.npz` and PyTorch's own, by the ending of the name.

Files come from strangers. Nothing in one is executed, no size that it claims is believed beyond
`torch_files.MAX_BYTES`, and whatever is wrong with it is a WeightsError that names it.
"""

from __future__ import annotations

import io
import json
import os
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

from distill_jax.interop import torch_files
from distill_jax.interop.torch_weights import WeightsError, from_state_dict, to_state_dict
from distill_jax.models import Network, Variables

# What the decoders raise for a damaged file; safetensors has its own kind, caught where it arises.
_DAMAGE = (
    ArithmeticError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
_SAFETENSORS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "uint16",  # its bits
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_TYPES = frozenset(_SAFETENSORS.values()) - {"uint16"}  # the types that every format keeps


def load_variables(path: str | os.PathLike[str], network: Network) -> Variables:
    """The variables of `network` from a file of weights.

    Raises:
      WeightsError: as `read_state_dict` and `from_state_dict` do; names the file.
    """
    state = read_state_dict(path)
    try:
        return from_state_dict(state, network)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None


def save_variables(path: str | os.PathLike[str], variables: Variables) -> None:
    """Writes a network's variables where `load_variables` and PyTorch read them.

    PyTorch reads `.pth`, `.pt` and `.bin` with `torch.load(path, weights_only=True)`,
    `.safetensors` with `safetensors.torch.load_file`.

    Raises:
      WeightsError: as `write_state_dict` does.
    """
    write_state_dict(path, to_state_dict(variables))


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The state dict (name -> array, PyTorch's layouts) in a file.

    Types stay as they are in the file, but bfloat16 is widened to float32. A `module.` before all
    names (DataParallel) is taken off.

    Raises:
      WeightsError: no such file, another kind of file than its name says, damaged, forged, not
        finite as float32, or wanting to run anything.
    """
    path = pathlib.Path(path)
    ending, read, _ = _format(path)
    try:
        if not path.is_file():
            what = "is no regular file" if path.exists() else "does not exist"
            raise WeightsError(f"{what}: expected a file of weights")
        raw = path.read_bytes()
        if not raw:
            raise WeightsError("is empty: expected a file of weights")
        state = read(raw)
        if not state:
            raise WeightsError("holds no tensors: expected a state dict")
        if all(name.startswith("module.") for name in state):
            state = {name.removeprefix("module."): array for name, array in state.items()}
        _check(state)
    except WeightsError as error:
        raise WeightsError(f"{path} {error}") from None
    except _DAMAGE as error:
        raise WeightsError(
            f"{path} cannot be read, or is damaged or cut short ({type(error).__name__}: "
            f"{str(error)[:200]}): expected a whole {ending} file"
        ) from error
    return state


def write_state_dict(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes a state dict (name -> array); `read_state_dict` gives back the same bits.

    bfloat16 is widened to float32. The file appears whole or not at all, and replaces an older one.
    The same state gives the same bytes.

    Raises:
      WeightsError: an ending that is not known, a type that not every format has, values that are
        not finite, or a place that cannot be written.
    """
    path = pathlib.Path(path)
    _, _, write = _format(path)
    arrays = {}
    for name, value in state.items():
        array = np.asarray(value)
        if array.dtype.name == "bfloat16":
            array = array.astype(np.float32)
        arrays[name] = np.array(array, array.dtype.newbyteorder("="), order="C")
    try:
        if not arrays:
            raise WeightsError("would hold no tensors: expected a state dict")
        _check(arrays)
        torch_files.check_size(sum(array.nbytes for array in arrays.values()))
        _write_whole(path, lambda stream: write(stream, arrays))
    except WeightsError as error:
        raise WeightsError(f"{path} {error}") from None
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be written ({type(error).__name__}: {error}): expected a file name in "
            "an existing folder"
        ) from error


def _write_whole(path: pathlib.Path, write: Callable[[BinaryIO], None]) -> None:
    passing = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    stream = passing.open("xb")
    try:
        with stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(passing, path)
    except BaseException:
        passing.unlink(missing_ok=True)
        raise


def _check(state: Mapping[str, np.ndarray]) -> None:
    for name, array in state.items():
        if array.dtype.name not in _TYPES:
            raise WeightsError(
                f"holds {name} as {array.dtype}: expected one of {', '.join(sorted(_TYPES))}"
            )
        with np.errstate(over="ignore"):  # a network's variables are float32
            if not np.isfinite(array.astype(np.float32)).all():
                raise WeightsError(f"holds {name} with values that are not finite in float32")


# ----------------------------------------------------------------------------------------- formats
def _read_safetensors(raw: bytes) -> dict[str, np.ndarray]:
    import safetensors

    try:
        entries = safetensors.deserialize(raw)
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error
    # The library keeps the last of two entries of one name; its header is JSON behind a length.
    header = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
    json.loads(header, object_pairs_hook=_distinct)
    state = {}
    for name, entry in entries:
        if entry["dtype"] not in _SAFETENSORS:
            raise WeightsError(f"holds {name} as {entry['dtype']}: expected {set(_SAFETENSORS)}")
        dtype = np.dtype(_SAFETENSORS[entry["dtype"]]).newbyteorder("<")
        array = np.ndarray(entry["shape"], dtype, entry["data"])
        array = array.astype(dtype.newbyteorder("="))
        state[name] = torch_files.widened(array) if entry["dtype"] == "BF16" else array
    return state


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise WeightsError(f"holds {name!r} twice")
        found[name] = value
    return found


def _write_safetensors(stream: BinaryIO, state: Mapping[str, np.ndarray]) -> None:
    import safetensors.numpy

    stream.write(safetensors.numpy.save(dict(state)))


def _read_npz(raw: bytes) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        torch_files.check_members(archive)
        torch_files.check_size(sum(member.file_size for member in archive.infolist()))
    state = {}
    with np.load(io.BytesIO(raw), allow_pickle=False) as archive:
        for name in archive.files:
            array = archive[name]
            if not isinstance(array, np.ndarray):
                raise WeightsError(f"holds {name}, which is no array: expected arrays only")
            state[name] = array.astype(array.dtype.newbyteorder("="), order="C")
    return state


def _write_npz(stream: BinaryIO, state: Mapping[str, np.ndarray]) -> None:
    # By hand, because numpy.savez takes names as keywords and some are its own.
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, array in state.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue())


_Read = Callable[[bytes], dict[str, np.ndarray]]
_Write = Callable[[BinaryIO, Mapping[str, np.ndarray]], None]
_TORCH = (torch_files.read, torch_files.write)
_FORMATS: dict[str, tuple[_Read, _Write]] = {
    ".safetensors": (_read_safetensors, _write_safetensors),
    ".npz": (_read_npz, _write_npz),
    **dict.fromkeys((".pth", ".pt", ".pth.tar", ".bin"), _TORCH),
}


def _format(path: pathlib.Path) -> tuple[str, _Read, _Write]:
    for ending, (read, write) in _FORMATS.items():
        if path.name.lower().endswith(ending):
            return ending, read, write
    raise WeightsError(f"{path}: expected a name that ends in one of {', '.join(_FORMATS)}")
