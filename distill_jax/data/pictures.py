"""Pictures in any format that pillow reads, as uint8 arrays of one size and number of channels."""

from __future__ import annotations

import collections
import io
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from distill_jax.data.checks import DataError, eight_bits

_GRAY = ("1", "L", "LA", "La")
_COLOURED = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
_MODES = {1: "L", 3: "RGB"}

Source = pathlib.Path | bytes | Any  # a file, its content, or pillow's image


def check_depth(image: Any) -> None:
    """Raises ValueError unless pillow's image has 8 bits a channel or fewer.

    Its own conversion cuts off what is more, or what it takes for more.
    """
    if image.mode not in (*_GRAY, *_COLOURED) or ";16" in str(getattr(image, "tile", "")):
        raise ValueError(f"it is of mode {image.mode}, more than 8 bits a channel")


def channels_and_size(
    pictures: Sequence[tuple[str, Source]],
) -> tuple[int, collections.Counter[tuple[int, int]]]:
    """(channels that all fit into, how many pictures there are of each (width, height)).

    One channel where all are gray, else three. Reads no more than the pictures' heads.
    """

    def look(place: int, image: Any) -> tuple[bool, tuple[int, int]]:
        return image.mode in _GRAY, image.size

    found = _each(look, pictures)
    return (1 if all(gray for gray, _ in found) else 3), collections.Counter(s for _, s in found)


def decoded(
    pictures: Sequence[tuple[str, Source]], channels: int, size: tuple[int, int]
) -> np.ndarray:
    """uint8 (N, H, W, channels) of pictures brought to one size (width, height).

    What has another size is resized until it covers that one, bilinearly, and its middle is taken.
    Of several frames it is the first, turned upright where its EXIF says how, and transparency is
    left out.

    Args:
      pictures: (name, source) of each; the names are for messages.
      channels: 1 or 3.
      size: (width, height).

    Raises:
      DataError: names a picture that cannot be read, or that has more than 8 bits a channel.
    """
    from PIL import Image, ImageOps

    images = np.empty((len(pictures), size[1], size[0], channels), np.uint8)

    def decode(place: int, image: Any) -> None:
        image = image.convert(_MODES[channels])
        if image.size != size:
            image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
        images[place] = np.asarray(image).reshape(images.shape[1:])

    _each(decode, pictures)
    return images


def _each(function: Callable[[int, Any], Any], pictures: Sequence[tuple[str, Source]]) -> list[Any]:
    """function(place, image) of each, in threads; DataError names one that cannot be read."""
    from PIL import Image

    def read(place: int) -> Any:
        name, source = pictures[place]
        try:
            if isinstance(source, Image.Image):
                check_depth(source)
                return function(place, _upright(source))
            if isinstance(source, pathlib.Path) and not source.is_file():
                raise ValueError("it is no regular file")
            stream = io.BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(stream) as image:
                check_depth(image)
                return function(place, _upright(image))
        except Exception as error:  # Decoders raise types of their own.
            raise DataError(
                f"{name} cannot be read ({type(error).__name__}: {error}): expected an undamaged "
                "picture of 8 bits a channel"
            ) from error

    with ThreadPoolExecutor(os.cpu_count() or 1, "decode") as workers:
        return list(workers.map(read, range(len(pictures))))


def _upright(image: Any) -> Any:
    """The image as viewers show it; itself, not decoded yet, where no EXIF in its head turns it."""
    from PIL import ExifTags, Image, ImageOps

    try:
        # A PNG's own method decodes it to look behind the pixels too.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # Damaged EXIF says nothing, and the pixels may be whole.
        return image
    return image if orientation == 1 else ImageOps.exif_transpose(image)


# -------------------------------------------------------------------------------- tables of them
_IMAGES = ("image", "images", "img", "data")
_LABELS = ("label", "labels", "fine_label", "fine_labels", "target", "targets")


def is_table(given: Any) -> bool:
    """Whether it is a dict of columns, rows that are dicts, or a set of the datasets library."""
    rows = isinstance(given, list) and bool(given) and all(isinstance(x, Mapping) for x in given)
    return rows or isinstance(given, Mapping) or hasattr(given, "column_names")


def pair_of(what: str, table: Any) -> tuple[Any, Any]:
    """(images, labels) of a table, from the one column called as images are and as labels are."""
    if hasattr(table, "column_names"):
        table = {name: table[name] for name in table.column_names}
    elif isinstance(table, list):
        rows = table
        for place, row in enumerate(rows):
            if row.keys() != rows[0].keys():
                raise DataError(
                    f"{what} row {place} has {list(row)}: expected {list(rows[0])}, as row 0 has"
                )
        table = {name: [row[name] for row in rows] for name in rows[0]}
    images, labels = (_column(what, table, names) for names in (_IMAGES, _LABELS))
    return images_of(what, images), labels if isinstance(labels, np.ndarray) else list(labels)


def _column(what: str, table: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    found = [name for name in names if name in table]
    if len(found) != 1:
        raise DataError(
            f"{what} has the columns {[str(name)[:40] for name in table][:20]}: expected exactly "
            f"one of {', '.join(names)}"
        )
    return table[found[0]]


def are_pictures(images: Any) -> bool:
    """Whether that is a list of pillow's images or of the content of files."""
    return isinstance(images, list | tuple) and all(
        hasattr(x, "convert") or isinstance(x, bytes | Mapping) for x in images
    )


def images_of(what: str, column: Any) -> Any:
    """Images of a column: an array as it is; else of arrays, lists, pictures or their bytes."""
    if isinstance(column, np.ndarray) and column.dtype != object:
        return column
    images = list(column)
    if images and are_pictures(images):
        pictures = [(f"{what} image {i}", _source(x)) for i, x in enumerate(images)]
        channels, sizes = channels_and_size(pictures)
        if len(sizes) > 1:
            raise DataError(f"{what} has pictures of the sizes {_some(sizes)}: expected one size")
        return decoded(pictures, channels, next(iter(sizes)))
    try:
        if images and all(isinstance(image, list | tuple) for image in images):
            stacked = eight_bits(f"{what} images", images)
        else:
            stacked = np.stack([np.asarray(image) for image in images])
    except DataError:
        raise
    except ValueError as error:
        raise DataError(
            f"{what} images cannot be stacked ({error}): expected arrays of one shape, or pictures"
        ) from error
    return stacked[..., None] if stacked.ndim == 3 else stacked


def _source(picture: Any) -> Source:
    """The datasets library gives undecoded pictures as {"bytes": ..., "path": ...}."""
    if isinstance(picture, Mapping):
        content = picture.get("bytes")
        return content if content is not None else pathlib.Path(str(picture.get("path")))
    return picture


def _some(sizes: collections.Counter[tuple[int, int]]) -> str:
    return ", ".join(f"{width}x{height}" for (width, height), _ in sizes.most_common(4))
