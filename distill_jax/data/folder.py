"""Pictures in folders, one a class."""

from __future__ import annotations

import pathlib

import numpy as np

from distill_jax.data import pictures
from distill_jax.data.checks import DataError, Split

_VALID = ("val", "valid", "validation")


def read_folder(detail: str, data_dir: str) -> tuple[Split, Split, int, Split | None]:
    """(train, test, classes, validation) of DIR/train/CLASS/... and DIR/test/CLASS/...

    DIR is `data_dir`, what follows the name's colon, or the latter within the former. Classes are
    the folders in train, sorted by name; test has the same. A folder `val` (`valid`, `validation`)
    is the validation split, or the test split where there is no `test`; without it, validation is
    held out of train. Pictures may lie deeper. Hidden files, and those whose ending no format that
    pillow knows has, are passed over.

    All are turned upright where their EXIF says how, then brought to the most frequent size among
    the training pictures (of equals, the first): resized to cover it, and the middle taken. One
    channel where all are gray, else three.

    DataError names a folder or picture that is not so.
    """
    folder = pathlib.Path(data_dir).expanduser() / pathlib.Path(detail).expanduser()
    if not (detail or data_dir):
        raise DataError("data set is 'folder': expected folder:DIR, or dataset.data_dir beside it")
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: expected DIR/train/CLASS and DIR/test/CLASS")
    valid = [part for part in _VALID if (folder / part).is_dir()]
    has_test = (folder / "test").is_dir()
    if not (folder / "train").is_dir() or len(valid) > 1 or not (has_test or valid):
        there = sorted(path.name for path in folder.iterdir() if path.is_dir())[:8]
        raise DataError(
            f"{folder} holds the folders {there}: expected train, and test or one of "
            f"{', '.join(_VALID)}, with one folder a class in each"
        )
    names = ["train", *(["test"] if has_test else []), *valid]
    parts = {name: _files(folder / name) for name in names}
    classes = sorted(parts["train"])
    for name, found in parts.items():
        if found.keys() != parts["train"].keys():
            other = sorted(found.keys() ^ parts["train"].keys())
            raise DataError(
                f"{folder / name} has not the classes of train ({other[:8]} are in one alone): "
                "expected the same folders in both"
            )
    if empty := [name for name in classes if not parts["train"][name]]:
        raise DataError(f"{folder / 'train' / empty[0]} holds no pictures: expected one or more")
    named = {
        name: [(str(path), path) for label in classes for path in found[label]]
        for name, found in parts.items()
    }
    looks = {name: pictures.channels_and_size(found) for name, found in named.items()}
    channels = max(channels for channels, _ in looks.values())
    size = looks["train"][1].most_common(1)[0][0]
    splits = []
    for name, found in parts.items():
        labels = np.repeat(np.arange(len(classes)), [len(found[label]) for label in classes])
        splits.append(Split(pictures.decoded(named[name], channels, size), labels))
    train, test, *rest = splits
    return train, test, len(classes), rest[0] if rest else None


def _files(part: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Class -> its pictures, in the order of their names."""
    from PIL import Image

    endings = Image.registered_extensions()
    return {
        folder.name: sorted(
            path
            for path in folder.rglob("*")
            if not path.is_dir()
            and not any(name.startswith(".") for name in path.relative_to(folder).parts)
            and (path.suffix.lower() in endings or not path.suffix)
        )
        for folder in part.iterdir()
        if folder.is_dir() and not folder.name.startswith(".")
    }
