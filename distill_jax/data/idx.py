"""Fashion-MNIST from its four published idx files, gzipped or not.

Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms", 2017.
"""

import math
import pathlib

import numpy as np

from distill_jax.data import files
from distill_jax.data.checks import DataError, Split

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_SUBFOLDERS = ("", "fashion-mnist", "FashionMNIST/raw")


def read_fashion_mnist(data_dir: str) -> tuple[Split, Split, int]:
    """(train, test, classes) of Fashion-MNIST: 28x28x1, 10 classes.

    DataError when the files are missing, damaged or not idx files of the expected shape.
    """
    places = files.folders(data_dir, "/usr/share/datasets/fashion-mnist")
    for place in places:
        for folder in (place / subfolder for subfolder in _SUBFOLDERS):
            if _find(folder, _FILES["train"][0]):
                return _read_split(folder, "train"), _read_split(folder, "test"), 10
    raise DataError(
        f"fashion_mnist was not found in {', '.join(map(str, places))}. Nothing was downloaded. "
        "Expected one of: (1) the four published files (train-images-idx3-ubyte.gz and so on, "
        "unpacked or not) in data_dir or $DISTILL_JAX_DATA; (2) on Debian: apt-get install "
        "dataset-fashion-mnist; (3) tfds:fashion_mnist, prepared by TFDS; (4) your own arrays "
        "through distill_jax.data.from_arrays"
    )


def decode_idx(what: str, raw: bytes, ndim: int) -> np.ndarray:
    """The uint8 array of an idx file: magic 0 0 8 ndim, big-endian sizes, then the bytes."""
    magic = bytes((0, 0, 8, ndim))
    if raw[:4] != magic:
        raise DataError(f"{what} starts with {raw[:4].hex()!r}: expected idx magic {magic.hex()!r}")
    start = 4 + 4 * ndim
    shape = tuple(int(size) for size in np.frombuffer(raw[4:start].ljust(start - 4, b"\0"), ">u4"))
    if len(raw) != start + math.prod(shape):
        raise DataError(
            f"{what} holds {len(raw)} bytes: expected {start + math.prod(shape)} for shape {shape}"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _find(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _read_split(folder: pathlib.Path, part: str) -> Split:
    arrays = []
    for name, ndim in zip(_FILES[part], (3, 1), strict=True):
        path = _find(folder, name)
        if path is None:
            raise DataError(f"{folder} lacks {name}: expected all four files, with .gz or without")
        arrays.append(decode_idx(str(path), files.read(path), ndim))
    images, labels = arrays
    if images.shape[1:] != (28, 28):
        raise DataError(f"{folder} {part} images have shape {images.shape}: expected (N, 28, 28)")
    return Split(images[..., None], labels)
