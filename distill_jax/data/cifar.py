"""CIFAR-10 and CIFAR-100 from their published files, packed or not, binary or Python version.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; formats as described at
https://www.cs.toronto.edu/~kriz/cifar.html. CIFAR-100 gives its 100 fine labels.
"""

import functools
import io
import pathlib
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from distill_jax.data import files
from distill_jax.data.checks import DataError, Split, eight_bits
from distill_jax.data.tfds import read_tfds

_PIXELS, _IMAGE, _PLANES = 3 * 32 * 32, (32, 32, 3), (3, 32, 32)
_INTEGERS = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")


class Layout(NamedTuple):
    """One published form: folder inside the archive, archive, its files, how to read one."""

    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    decode: Callable[[str, bytes], Split]


def read_cifar(name: str, data_dir: str) -> tuple[Split, Split, int]:
    """(train, test, classes) of "cifar10" or "cifar100", from files or a prepared TFDS folder.

    A file may hold any whole number of records above 0. DataError when a file is damaged, when
    files are missing from a set, or when there is no set at all.
    """
    classes, layouts = CIFAR[name]
    places = files.folders(data_dir)
    for place in places:
        for layout in layouts:
            contents = _contents(place, layout)
            if contents is not None:
                parts = {part: layout.decode(part, raw) for part, raw in contents.items()}
                train = [parts[part] for part in layout.train]
                images, labels = (np.concatenate(arrays) for arrays in zip(*train, strict=True))
                return Split(images, labels), parts[layout.test], classes
    try:
        return read_tfds(name, data_dir)
    except DataError as error:
        raise DataError(_missing(name, layouts, places, error)) from error


def decode_binary(what: str, raw: bytes, *, label_bytes: int) -> Split:
    """Records of `label_bytes` bytes, the last of which is the label, and 3x32x32 pixels."""
    size = label_bytes + _PIXELS
    if not raw or len(raw) % size:
        raise DataError(f"{what} holds {len(raw)} bytes: expected whole records of {size} bytes")
    records = np.frombuffer(raw, np.uint8).reshape(-1, size)
    labels = records[:, label_bytes - 1].astype(np.int32)
    return Split(_channels_last(records[:, label_bytes:]), labels)


def decode_pickle(what: str, raw: bytes, *, label_key: str) -> Split:
    """A pickled batch: a dict with `data`, uint8 (N, 3072), and N labels.

    Re-saved ones too: arrays of any memory and byte order, lists of lists, `data` as images
    (N, 32, 32, 3) or planes (N, 3, 32, 32), labels (N, 1). Nothing that the file names is imported
    or called: see `_Unpickler`.
    """
    try:
        batch = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
        # Python 2 wrote the published files, so that their keys are bytes here.
        batch = {key.decode() if isinstance(key, bytes) else key: batch[key] for key in batch}
        pixels, labels = _array(batch["data"]), _array(batch[label_key])
    except DataError:
        raise
    except Exception as error:  # An untrusted or damaged pickle can raise anything.
        raise DataError(
            f"{what} is not a pickled CIFAR batch ({type(error).__name__}: {error}): "
            f"expected the published file, with data and {label_key}"
        ) from error
    if isinstance(batch["data"], list | tuple):
        pixels = eight_bits(f"{what} data", pixels)
    if pixels.dtype != np.uint8 or pixels.shape[1:] not in ((_PIXELS,), _IMAGE, _PLANES):
        raise DataError(
            f"{what} has data {pixels.dtype} {pixels.shape}: expected uint8 (N, {_PIXELS})"
        )
    labels = labels[:, 0] if labels.shape[1:] == (1,) else labels
    if labels.shape != pixels.shape[:1]:
        raise DataError(
            f"{what} has {label_key} of shape {labels.shape}: expected ({len(pixels)},), as it has "
            f"{len(pixels)} images"
        )
    images = pixels if pixels.shape[1:] == _IMAGE else _channels_last(pixels)
    return Split(np.ascontiguousarray(images), labels)


def _array(value: Any) -> np.ndarray:
    """An array, a scalar or a list of either from what a pickle says of it."""
    if isinstance(value, list | tuple):
        return np.array([_array(part) if isinstance(part, _Inert) else part for part in value])
    if not isinstance(value, _Inert):
        return np.array(value)
    if value.name == "scalar":
        dtype, content = value.args
        return np.frombuffer(content, _dtype(dtype), 1).reshape(())
    axes = None
    if value.name == "_frombuffer":  # protocol 5: order K is that of other axes
        content, dtype, shape, order, *more = value.args
        fortran = order in ("F", b"F")
        axes = more[0] if more and order in ("K", b"K") else None
    else:
        _version, shape, dtype, fortran, content = value.state
    array = np.frombuffer(content, _dtype(dtype)).reshape(shape, order="F" if fortran else "C")
    return np.array(array if axes is None else array.transpose(axes))


def _dtype(value: Any) -> np.dtype:
    """The integer type that a pickle says, in its byte order."""
    name: Any = value.args[0]
    order: Any = value.state[1] if value.state else "|"
    name, order = (x.decode() if isinstance(x, bytes) else x for x in (name, order))
    if name not in _INTEGERS:
        raise DataError(f"pickle has an array of {name!r}: expected one of {', '.join(_INTEGERS)}")
    return np.dtype(name).newbyteorder(order)


class _Inert:
    """Stands where a pickle names a NumPy class or function; keeps what it is given, runs nothing.

    Even NumPy's own `__setstate__` is not for untrusted states, so it is never called.
    """

    name = ""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Scalar(_Inert):
    """A NumPy scalar: (type, bytes)."""

    name = "scalar"


class _FromBuffer(_Inert):
    """An array of protocol 5: (bytes, type, shape, order)."""

    name = "_frombuffer"


class _Latin1:
    """Python 3's way to put bytes into a Python 2 pickle, `_codecs.encode`, for that codec only."""

    def __new__(cls, text: str, encoding: str) -> bytes:  # type: ignore[misc]
        if encoding not in ("latin1", b"latin1"):
            raise DataError(f"pickle asks for the codec {encoding!r}: expected 'latin1'")
        return text.encode("latin1")

    def __setstate__(self, state: Any) -> None:
        raise DataError("pickle sets the state of a codec: expected arrays, numbers and text")


_ALLOWED: dict[tuple[str, str], type] = {
    ("numpy", "ndarray"): _Inert,
    ("numpy", "dtype"): _Inert,
    **{
        (f"numpy.{core}.{module}", name): kind
        for core in ("core", "_core")
        for module, name, kind in (
            ("multiarray", "_reconstruct", _Inert),
            ("multiarray", "scalar", _Scalar),
            ("numeric", "_frombuffer", _FromBuffer),
        )
    },
    ("_codecs", "encode"): _Latin1,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _ALLOWED:
            raise DataError(
                f"pickle names {module}.{name}: expected nothing but a NumPy array of bytes; "
                "the file is not a published CIFAR batch and was not run"
            )
        return _ALLOWED[module, name]


def _channels_last(pixels: np.ndarray) -> np.ndarray:
    """(N, 3072) or (N, 3, 32, 32) planes of red, green and blue to (N, 32, 32, 3)."""
    return np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _contents(place: pathlib.Path, layout: Layout) -> dict[str, bytes] | None:
    """File name -> bytes for one layout, from a folder or an archive; None if neither is there."""
    names = (*layout.train, layout.test)
    for folder in (place / layout.folder, place):
        if (folder / names[0]).is_file():
            if missing := [name for name in names if not (folder / name).is_file()]:
                raise DataError(f"{folder} lacks {missing}: expected all of {names}")
            return {name: files.read(folder / name) for name in names}
    archive = place / layout.archive
    if not archive.is_file():
        return None
    members = files.read_tar(archive, [f"{layout.folder}/{name}" for name in names])
    return {name: members[f"{layout.folder}/{name}"] for name in names}


def _missing(name: str, layouts: tuple[Layout, ...], places: list, error: DataError) -> str:
    archives = " or ".join(layout.archive for layout in layouts)
    unpacked = " or ".join(layout.folder for layout in layouts)
    return (
        f"{name} was not found in {', '.join(map(str, places))}, nor with TFDS ({error}). "
        "Nothing was downloaded. Expected one of: "
        f"(1) the published archive {archives}, packed, in data_dir or $DISTILL_JAX_DATA; "
        f"(2) its folder {unpacked} there; "
        f"(3) TFDS data, prepared by: tfds build {name} --file_format=array_record; "
        "(4) your own arrays through distill_jax.data.from_arrays"
    )


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR: dict[str, tuple[int, tuple[Layout, ...]]] = {
    "cifar10": (
        10,
        (
            Layout(
                "cifar-10-batches-bin",
                "cifar-10-binary.tar.gz",
                tuple(f"{batch}.bin" for batch in _BATCHES),
                "test_batch.bin",
                functools.partial(decode_binary, label_bytes=1),
            ),
            Layout(
                "cifar-10-batches-py",
                "cifar-10-python.tar.gz",
                _BATCHES,
                "test_batch",
                functools.partial(decode_pickle, label_key="labels"),
            ),
        ),
    ),
    "cifar100": (
        100,
        (
            Layout(
                "cifar-100-binary",
                "cifar-100-binary.tar.gz",
                ("train.bin",),
                "test.bin",
                functools.partial(decode_binary, label_bytes=2),
            ),
            Layout(
                "cifar-100-python",
                "cifar-100-python.tar.gz",
                ("train",),
                "test",
                functools.partial(decode_pickle, label_key="fine_labels"),
            ),
        ),
    ),
}
