"""Data sets by name."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distill_jax.data.checks import DataError, Split
from distill_jax.data.cifar import read_cifar
from distill_jax.data.dataset import Dataset, choose_per_class, from_arrays
from distill_jax.data.idx import read_fashion_mnist
from distill_jax.data.synthetic import read_synthetic
from distill_jax.data.tfds import read_tfds


def load(
    name: str,
    *,
    data_dir: str = "",
    valid_fraction: float = 0.1,
    split_seed: int = 0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Dataset:
    """The data set called `name`, one of `NAMES`; nothing is downloaded.

    "tfds:NAME" is any image set that TFDS has prepared; where its images differ in size they are
    streamed, at 224x224. "synthetic:HxWxC:CLASSES:TRAIN:TEST" sets the sizes of made-up data.
    `data_dir` holds the files; where it is empty, the usual places are searched. The other
    arguments are those of `from_arrays`. DataError when the name is unknown, when the data is
    missing (with the ways to supply it), or when it is damaged.
    """
    source, _, detail = str(name).partition(":")
    if source not in SOURCES or (detail and source not in ("synthetic", "tfds")):
        close = difflib.get_close_matches(source.lower(), NAMES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DataError(
            f"data set is {name!r}: expected one of {', '.join(NAMES)}, with tfds:NAME and "
            f"synthetic:HxWxC:CLASSES:TRAIN:TEST{hint}"
        )
    train, test, classes = SOURCES[source](detail, data_dir)
    return from_arrays(
        train,
        test,
        classes=classes,
        name=name,
        valid_fraction=valid_fraction,
        split_seed=split_seed,
        mean=mean,
        std=std,
    )


def _read_digits() -> tuple[Split, Split, int]:
    """scikit-learn's 1797 digits, 8x8x1: a fixed 500 (50 a class) to test on, 1297 to train on."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError(f"digits needs scikit-learn ({error}): expected it installed") from error
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    test = choose_per_class(labels, np.full(10, 50), seed=0, stream=0)
    train = np.setdiff1d(np.arange(len(labels)), test)
    return Split(images[train], labels[train]), Split(images[test], labels[test]), 10


# Each reader takes what follows the colon of a name, and data_dir.
SOURCES: dict[str, Callable[[str, str], tuple[Any, Any, int]]] = {
    "digits": lambda detail, data_dir: _read_digits(),
    "fashion_mnist": lambda detail, data_dir: read_fashion_mnist(data_dir),
    "cifar10": lambda detail, data_dir: read_cifar("cifar10", data_dir),
    "cifar100": lambda detail, data_dir: read_cifar("cifar100", data_dir),
    "synthetic": lambda detail, data_dir: read_synthetic(detail),
    "tfds": read_tfds,
}
NAMES: tuple[str, ...] = tuple(SOURCES)
