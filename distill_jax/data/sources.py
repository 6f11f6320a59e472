"""Data sets by name."""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.data.checks import DataError, Split
from distill_jax.data.cifar import read_cifar
from distill_jax.data.dataset import Dataset, check, choose_per_class, from_arrays
from distill_jax.data.folder import read_folder
from distill_jax.data.idx import read_fashion_mnist
from distill_jax.data.synthetic import read_synthetic
from distill_jax.data.text import read_sst2, read_synthetic_text, read_text
from distill_jax.data.tfds import read_tfds
from distill_jax.data.triples import read_named, read_synthetic_triples, read_triples
from distill_jax.identity import check_new_name, describe
from distill_jax.refusals import refuses

_registered: dict[str, tuple[Callable[..., Dataset], str]] = {}


@refuses(DataError)
def load(
    name: str,
    *,
    data_dir: str = "",
    valid_fraction: float = 0.1,
    split_seed: int = 0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    options: Mapping[str, Any] | None = None,
) -> Dataset:
    """The data set called `name`, one of `NAMES` or a registered one; nothing is downloaded.

    "folder:DIR" is pictures in DIR/train/CLASS and DIR/test/CLASS, see `folder.read_folder`, whose
    last arguments are `options`.
    "tfds:NAME" is any image set that TFDS has prepared; where its images differ in size they are
    streamed, at 224x224. "synthetic:HxWxC:CLASSES:TRAIN:TEST" sets the sizes of made-up data.
    "text:PATH" is sentences in files, see `text.read_text`, whose last arguments are `options`;
    "triples:PATH" a knowledge graph, see `triples.read_triples`.
    `data_dir` holds the files; where it is empty, the usual places are searched. The other
    arguments are those of `from_arrays`; a registered data set takes what of them its function
    names, and `options`. DataError when the name is unknown, when the data is missing (with the
    ways to supply it), or when it is damaged.
    """
    fields = {
        "data_dir": data_dir,
        "valid_fraction": valid_fraction,
        "split_seed": split_seed,
        "mean": mean,
        "std": std,
    }
    if name in _registered:
        return _load_by(_registered[name][0], name, fields, options or {})
    source, _, detail = str(name).partition(":")
    if source in WITH_OPTIONS and not (detail and source not in _DETAILED):
        function = functools.partial(WITH_OPTIONS[source], detail)
        return _load_by(function, name, fields, options or {})
    if options:
        raise DataError(
            f"dataset.options are {dict(options)}: expected none for {name!r}, as only registered "
            f"data sets and {', '.join(WITH_OPTIONS)} have any"
        )
    if source not in SOURCES or (detail and source not in _DETAILED):
        known = (*NAMES, *_registered)
        close = difflib.get_close_matches(source.lower(), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DataError(
            f"data set is {name!r}: expected one of {', '.join(known)}, with tfds:NAME, "
            f"folder:DIR, text:PATH, triples:PATH and synthetic:HxWxC:CLASSES:TRAIN:TEST{hint}"
        )
    train, test, classes, *valid = SOURCES[source](detail, data_dir)
    return from_arrays(
        train,
        test,
        classes=classes,
        name=name,
        valid=valid[0] if valid else None,
        valid_fraction=valid_fraction,
        split_seed=split_seed,
        mean=mean,
        std=std,
    )


def register_dataset(name: str, load: Callable[..., Dataset], version: str = "1") -> None:
    """Makes a data set known under a name, for `dataset.name`.

    Stages are known by the content of their data. Name, version and the function's source are part
    of what a working directory is of: another data set under its name is refused there.

    Args:
      name: for the config.
      load: load(**options) -> what `from_arrays` makes, the options being `dataset.options`. Of
        `data_dir`, `valid_fraction`, `split_seed`, `mean` and `std` it is given those of the config
        that are among its arguments, and the others are to be left alone there.
      version: to be raised when the function comes to load something else.

    Raises:
      ValueError: a name that is taken or cannot be written in a config, or nothing to call.
    """
    check_new_name("a data set", name, "my_texts", NAMES)
    if not callable(load):
        raise ValueError(f"data set {name!r} is {load!r}: expected a function load(**options)")
    if not isinstance(version, str):
        raise ValueError(f"the version of {name} is a text, got {version!r}")
    _registered[name] = (load, version)


def is_registered(name: str) -> bool:
    """Whether a user registered a data set under a name."""
    return name in _registered


def identity_of(name: str) -> dict[str, Any] | None:
    """What a registered data set is known by besides its content; None of the library's."""
    if name not in _registered:
        return None
    load, version = _registered[name]
    return {"name": name, "version": version, "repr": describe(load)}


def _load_by(
    function: Callable[..., Dataset], name: str, fields: dict[str, Any], options: Mapping[str, Any]
) -> Dataset:
    """What a data set's function gives for those of the config's fields that it takes."""
    signature = inspect.signature(function)
    for field, value in fields.items():
        default = inspect.signature(load).parameters[field].default
        if field not in signature.parameters and value != default:
            raise DataError(
                f"dataset.{field} is {value!r}: expected {default!r}, as the function of data set "
                f"{name!r} has no such argument"
            )
    given = {k: v for k, v in fields.items() if k in signature.parameters} | dict(options)
    try:
        signature.bind(**given)
    except TypeError as error:
        raise DataError(
            f"dataset.options are {dict(options)}: expected those of {name}{signature}; {error}"
        ) from error
    dataset = function(**given)
    if not isinstance(dataset, Dataset):
        raise DataError(
            f"data set {name!r} gives a {type(dataset).__name__}: expected what "
            "distill_jax.data.from_arrays makes"
        )
    check(dataset)
    return dataclasses.replace(dataset, name=name)


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


# Each reader takes what follows the colon of a name, and data_dir, and gives (train, test, classes)
# and, where there is one, the validation split.
SOURCES: dict[str, Callable[[str, str], tuple[Any, ...]]] = {
    "digits": lambda detail, data_dir: _read_digits(),
    "fashion_mnist": lambda detail, data_dir: read_fashion_mnist(data_dir),
    "cifar10": lambda detail, data_dir: read_cifar("cifar10", data_dir),
    "cifar100": lambda detail, data_dir: read_cifar("cifar100", data_dir),
    "synthetic": lambda detail, data_dir: read_synthetic(detail),
    "tfds": read_tfds,
}
# Those with options, and other tasks than images: their functions take what follows the colon, and
# fields of the config and options by name.
WITH_OPTIONS: dict[str, Callable[..., Dataset]] = {
    "folder": read_folder,
    "sst2": read_sst2,
    "text": read_text,
    "synthetic_text": read_synthetic_text,
    "fb15k237": lambda detail, data_dir="": read_named("fb15k237", data_dir),
    "wn18rr": lambda detail, data_dir="": read_named("wn18rr", data_dir),
    "triples": read_triples,
    "synthetic_triples": read_synthetic_triples,
}
# Those that take what follows a colon.
_DETAILED = (
    *("synthetic", "tfds", "folder", "text", "synthetic_text", "triples", "synthetic_triples"),
)
NAMES: tuple[str, ...] = (*SOURCES, *WITH_OPTIONS)
