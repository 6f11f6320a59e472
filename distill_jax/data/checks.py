"""What counts as good data. Every refusal is a DataError that names the value and the wish."""

import operator
from typing import Any, NamedTuple

import jax
import numpy as np


class DataError(ValueError):
    """Data that is missing, damaged or not what was promised."""


class Split(NamedTuple):
    """Examples of one split: images uint8 (N, H, W, C), labels int32 (N,).

    In place of the array of images there may be a `Streamed` that stands for it, or float32 images
    whose range is told, or, of a `Task`, inputs: any pytree of arrays (N, ...).
    """

    images: Any
    labels: np.ndarray

    def __repr__(self) -> str:
        arrays = jax.tree.leaves(self.images)
        shapes = ", ".join(f"{x.dtype} {x.shape}" for x in arrays)
        return f"Split({len(self.labels)} examples: {shapes})"


def integer(what: str, value: Any, low: int) -> int:
    """`value` as an int of at least `low`; DataError otherwise (bools and floats too)."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < low:
        raise DataError(f"{what} is {value!r}: expected an integer of at least {low}")
    return number


def take(inputs: Any, index: Any) -> Any:
    """The examples `index` of every array of a tree, or of streamed images."""
    return jax.tree.map(lambda x: x[index], inputs)


def eight_bits(what: str, values: Any) -> np.ndarray:
    """Integers of no told type, as lists hold them, as uint8; DataError unless all are 0 to 255."""
    array = np.asarray(values)
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.integer) or not array.size:
        raise DataError(f"{what} is {array.dtype} {array.shape}: expected integers from 0 to 255")
    if array.min() < 0 or array.max() > 255:
        raise DataError(
            f"{what} has values from {array.min()} to {array.max()}: expected 0 to 255, 8 bits"
        )
    return array.astype(np.uint8)


def check_split(
    what: str,
    images: Any,
    labels: Any,
    classes: int,
    value_range: tuple[float, float] | None = None,
) -> Split:
    """Images and labels as a `Split`, or DataError.

    `what` ("train", "test") starts each message. Images: uint8 (N, H, W, C) with 1 to 4 channels,
    N > 0; float where their `value_range` is told. Labels: integers (N,) in [0, classes).
    """
    images = np.asarray(images)
    if value_range is not None:
        images = _check_range(what, images, value_range)
    _check_images(what, images, value_range is not None)
    return Split(np.ascontiguousarray(images), check_labels(what, labels, len(images), classes))


def check_labels(
    what: str, labels: Any, examples: int, classes: int, kind: str = "images"
) -> np.ndarray:
    """Labels of so many examples as int32, or DataError."""
    labels = np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{what} labels are {labels.dtype} {labels.shape}: expected integers of shape (N,)"
        )
    if len(labels) != examples:
        raise DataError(
            f"{what} has {examples} {kind} and {len(labels)} labels: expected as many of each"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        raise DataError(
            f"{what} label {labels[wrong[0]]} at index {wrong[0]} ({wrong.size} such labels): "
            f"expected 0 to {classes - 1}, for {classes} classes"
        )
    return labels.astype(np.int32)


def _check_range(what: str, images: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """Float images as float32; DataError where a value is outside the range."""
    if not np.issubdtype(images.dtype, np.floating):
        raise DataError(
            f"{what} images are {images.dtype} and value_range is {value_range}: expected floats, "
            "or no value_range for uint8"
        )
    low, high = value_range
    images = images.astype(np.float32)
    outside = ~((images >= low) & (images <= high))  # NaN too
    if outside.any():
        raise DataError(
            f"{what} images hold {images[outside][0]} ({outside.sum()} such values): expected "
            f"{low} to {high}, the value_range"
        )
    return images


def _check_images(what: str, images: np.ndarray, floats: bool = False) -> None:
    if np.issubdtype(images.dtype, np.floating) and not floats:
        nan = "with NaN " if np.isnan(images).any() else ""
        raise DataError(
            f"{what} images are {images.dtype} {nan}: expected uint8, 0 to 255; for values in "
            "[0, 1] pass np.round(255 * images).astype(np.uint8), or value_range=(0.0, 1.0)"
        )
    if images.dtype != np.uint8 and not floats:
        hint = "; for all of 16 bits pass (images >> 8).astype(np.uint8)"
        raise DataError(
            f"{what} images are {images.dtype}: expected uint8, 0 to 255"
            f"{hint if images.dtype == np.uint16 else ''}"
        )
    if images.ndim != 4:
        hint = "; for gray images pass images[..., None]" if images.ndim == 3 else ""
        raise DataError(f"{what} images have shape {images.shape}: expected (N, H, W, C){hint}")
    if not images.shape[0]:
        raise DataError(f"{what} has 0 images: expected at least one")
    if not 1 <= images.shape[3] <= 4 or 0 in images.shape:
        raise DataError(
            f"{what} images have shape {images.shape}, so {images.shape[3]} channels: expected "
            "(N, H, W, C) with 1 to 4 channels; transpose images stored channels first"
        )
