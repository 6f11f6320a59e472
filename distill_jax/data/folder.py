"""Pictures in folders, one a class."""

from __future__ import annotations

import numbers
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from distill_jax.data import pictures
from distill_jax.data.checks import DataError, Split, integer
from distill_jax.data.dataset import Dataset, choose_per_class, from_arrays

_VALID = ("val", "valid", "validation")
_LIST, _SPLIT = "images.txt", "train_test_split.txt"  # of CUB-200: what there is, and where it goes
_TEST_STREAM = 3  # of the choice of test pictures, see `dataset`
Classes = dict[str, list[pathlib.Path]]  # class -> its pictures


def read_folder(
    detail: str,
    data_dir: str = "",
    valid_fraction: float = 0.1,
    split_seed: int = 0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    size: int = 0,
    test_fraction: float = 0.0,
) -> Dataset:
    """A folder of pictures: DIR/train/CLASS/... and DIR/test/CLASS/...

    DIR is `data_dir`, what follows the name's colon, or the latter within the former. Classes are
    the folders in train, sorted by name; test has the same. A folder `val` (`valid`, `validation`)
    is the validation split, or the test split where there is no `test`; without it, validation is
    held out of train. Pictures may lie deeper. Hidden files, and those whose ending no format that
    pillow knows has, are passed over.

    In place of train and test there may be the folders of the classes themselves, of which
    `test_fraction` is to be tested on, or what CUB-200 has: images/CLASS, images.txt and
    train_test_split.txt.

    All are turned upright where their EXIF says how, then brought to one size: resized to cover it,
    and the middle taken. One channel where all are gray, else three.

    Args:
      detail: what follows the name's colon.
      data_dir: see above.
      valid_fraction: of the training pictures, see `from_arrays`.
      split_seed: by which pictures are held out to validate and to test on.
      mean: of each channel, see `from_arrays`.
      std: likewise.
      size: height and width; 0 takes the most frequent size among the training pictures (of equals,
        the first).
      test_fraction: of each class's pictures, where nothing else says which are to be tested on.

    Raises:
      DataError: names a folder or picture that is not so.
    """
    folder = pathlib.Path(data_dir).expanduser() / pathlib.Path(detail).expanduser()
    if not (detail or data_dir):
        raise DataError("data set is 'folder': expected folder:DIR, or dataset.data_dir beside it")
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: expected DIR/train/CLASS and DIR/test/CLASS")
    side = integer("dataset.options size", size, 0)
    parts = _parts(folder, test_fraction, split_seed)
    _check_classes(folder, parts)
    classes = sorted(parts["train"])
    named = {
        part: [(str(path), path) for label in classes for path in own[label]]
        for part, own in parts.items()
    }
    looks = {part: pictures.channels_and_size(found) for part, found in named.items()}
    channels = max(channels for channels, _ in looks.values())
    wanted = (side, side) if side else looks["train"][1].most_common(1)[0][0]
    splits = []
    for part, found in named.items():
        labels = np.repeat(np.arange(len(classes)), [len(parts[part][label]) for label in classes])
        splits.append(Split(pictures.decoded(found, channels, wanted), labels))
    train, test, *rest = splits
    return from_arrays(
        train,
        test,
        classes=len(classes),
        name=f"folder:{detail}" if detail else "folder",
        valid=rest[0] if rest else None,
        valid_fraction=valid_fraction,
        split_seed=split_seed,
        mean=mean,
        std=std,
    )


def _parts(folder: pathlib.Path, test_fraction: float, seed: int) -> dict[str, Classes]:
    """The pictures to train on, to test on and, where they are given, to validate on, by name."""
    if not isinstance(test_fraction, numbers.Real) or not 0 <= float(test_fraction) < 1:
        raise DataError(
            f"dataset.options test_fraction is {test_fraction!r}: expected 0 to below 1"
        )
    listed = (folder / _LIST).is_file() and (folder / _SPLIT).is_file()
    if not listed and not (folder / "train").is_dir() and test_fraction:
        return _held_out(folder, float(test_fraction), seed)
    if test_fraction:
        raise DataError(
            f"dataset.options test_fraction is {test_fraction}, and {folder} says itself what is "
            "to be tested on: expected 0"
        )
    if listed:
        return _listed(folder)
    valid = [part for part in _VALID if (folder / part).is_dir()]
    has_test = (folder / "test").is_dir()
    if not (folder / "train").is_dir() or len(valid) > 1 or not (has_test or valid):
        there = sorted(path.name for path in folder.iterdir() if path.is_dir())[:8]
        raise DataError(
            f"{folder} holds the folders {there}: expected train, and test or one of "
            f"{', '.join(_VALID)}, with one folder a class in each; or folders of classes, and "
            "dataset.options test_fraction, such as 0.2"
        )
    return {name: _files(folder / name) for name in ("train", *["test"] * has_test, *valid)}


def _check_classes(folder: pathlib.Path, parts: dict[str, Classes]) -> None:
    """Raises DataError unless there are two classes or more, the same in every part."""
    classes = parts["train"]
    for part, own in parts.items():
        if own.keys() != classes.keys():
            other = sorted(own.keys() ^ classes.keys())
            raise DataError(
                f"{folder}: {part} has not the classes of train ({other[:8]} are in one alone): "
                "expected the same folders in both"
            )
    if empty := sorted(name for name, found in classes.items() if not found):
        raise DataError(f"{folder}: train/{empty[0]} holds no pictures: expected one or more")
    if len(classes) < 2:
        held = f"the one class {next(iter(classes))}" if classes else "no class"
        raise DataError(f"{folder} holds {held}: expected two folders or more, one a class")


def _held_out(folder: pathlib.Path, fraction: float, seed: int) -> dict[str, Classes]:
    """Folders of classes, of each of which so much is to be tested on, one picture at least."""
    classes = _files(folder)
    for name, found in classes.items():
        if len(found) < 2:
            raise DataError(
                f"{folder / name} holds {len(found)} pictures: expected two or more, as one is to "
                "be tested on"
            )
    sizes = np.array([len(found) for found in classes.values()], int)
    labels = np.repeat(np.arange(len(classes)), sizes)
    wanted = np.clip(np.floor(fraction * sizes + 0.5), 1, sizes - 1).astype(int)
    chosen = set(choose_per_class(labels, wanted, seed=seed, stream=_TEST_STREAM).tolist())
    parts: dict[str, Classes] = {part: {name: [] for name in classes} for part in ("train", "test")}
    every = ((name, path) for name, found in classes.items() for path in found)
    for place, (name, path) in enumerate(every):
        parts["test" if place in chosen else "train"][name].append(path)
    return parts


def _listed(folder: pathlib.Path) -> dict[str, Classes]:
    """The pictures of CUB-200, which has a list of them and another of where they go."""
    where = dict(_rows(folder / _SPLIT))
    parts: dict[str, Classes] = {"train": {}, "test": {}}
    for number, path in _rows(folder / _LIST):
        if where.get(number) not in ("0", "1"):
            raise DataError(
                f"{folder / _SPLIT} has {where.get(number)} for image {number}: expected 1, to "
                "train on, or 0"
            )
        label = pathlib.PurePosixPath(path).parts[0]
        for own in parts.values():
            own.setdefault(label, [])
        part = "train" if where[number] == "1" else "test"
        parts[part][label].append(folder / "images" / path)
    return parts


def _rows(file: pathlib.Path) -> list[tuple[str, str]]:
    """The lines of a file as pairs: a number, and what follows it."""
    try:
        pairs = [tuple(line.split(None, 1)) for line in file.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    for place, pair in enumerate(pairs, 1):
        if len(pair) != 2:
            raise DataError(f"{file} line {place} is {' '.join(pair)!r}: expected two columns")
    return [(number, rest.strip()) for number, rest in pairs]


def _files(part: pathlib.Path) -> Classes:
    """Class -> its pictures, in the order of their names."""
    from PIL import Image

    endings = Image.registered_extensions()
    return {
        folder.name: sorted(
            path for path in _within(folder) if path.suffix.lower() in endings or not path.suffix
        )
        for folder in sorted(part.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
    }


def _within(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The files in a folder and in all below it, but for hidden ones.

    Links are followed; of several ways to one folder, as by a link to one above, the first counts.
    """
    entered = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        here = pathlib.Path(root)
        if here.resolve() in entered:
            folders.clear()
            continue
        entered.add(here.resolve())
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (here / name for name in names if not name.startswith("."))
