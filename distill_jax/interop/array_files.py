"""`.safetensors` and `.npz`: arrays by name and, where it is known, how images were normalised.

The normalisation is a (2, channels) float64 array, mean and std in units of pixel/255, under the
name NORMALISATION: in `.npz` an entry as any other, in `.safetensors` JSON in the metadata.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from distill_jax.interop import torch_files
from distill_jax.interop.torch_weights import WeightsError

NORMALISATION = "__normalisation__"
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
TYPES = frozenset(_SAFETENSORS.values()) - {"uint16"}  # the types that every format keeps


def read_safetensors(raw: bytes) -> dict[str, np.ndarray]:
    """The arrays of a file; whatever is wrong raises WeightsError or an error of the decoders."""
    import safetensors

    try:
        entries = safetensors.deserialize(raw)
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error
    # The library keeps the last of two entries of one name; its header is JSON behind a length.
    header = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
    metadata = json.loads(header, object_pairs_hook=_distinct).get("__metadata__", {})
    state = {}
    if NORMALISATION in metadata:
        state[NORMALISATION] = np.array(json.loads(metadata[NORMALISATION]), np.float64)
    for name, entry in entries:
        if entry["dtype"] not in _SAFETENSORS:
            raise WeightsError(f"holds {name} as {entry['dtype']}: expected {set(_SAFETENSORS)}")
        dtype = np.dtype(_SAFETENSORS[entry["dtype"]]).newbyteorder("<")
        array: np.ndarray = np.ndarray(entry["shape"], dtype, entry["data"])
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


def write_safetensors(stream: BinaryIO, state: Mapping[str, np.ndarray]) -> None:
    """The same arrays give the same bytes."""
    import safetensors.numpy

    state, metadata = dict(state), None
    if NORMALISATION in state:
        metadata = {NORMALISATION: json.dumps(state.pop(NORMALISATION).tolist())}
    stream.write(safetensors.numpy.save(state, metadata))


def read_npz(raw: bytes) -> dict[str, np.ndarray]:
    """The arrays of a file; whatever is wrong raises WeightsError or an error of the decoders."""
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


def write_npz(stream: BinaryIO, state: Mapping[str, np.ndarray]) -> None:
    """The same arrays give the same bytes."""
    # By hand, because numpy.savez takes names as keywords and some are its own.
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, array in state.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue())
