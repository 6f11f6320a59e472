"""What counts as good data. Every refusal is a DataError that names the value and the wish."""

import operator
from typing import Any, NamedTuple

import numpy as np


class DataError(ValueError):
    """Data that is missing, damaged or not what was promised."""


class Split(NamedTuple):
    """Examples of one split: images uint8 (N, H, W, C), labels int32 (N,).

    In place of the array of images there may be a `Streamed` that stands for it.
    """

    images: Any
    labels: np.ndarray


def integer(what: str, value: Any, low: int) -> int:
    """`value` as an int of at least `low`; DataError otherwise (bools and floats too)."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < low:
        raise DataError(f"{what} is {value!r}: expected an integer of at least {low}")
    return number


def check_split(what: str, images: Any, labels: Any, classes: int) -> Split:
    """Images and labels as a `Split`, or DataError.

    `what` ("train", "test") starts each message. Images: uint8 (N, H, W, C) with 1 to 4 channels,
    N > 0. Labels: integers (N,) in [0, classes).
    """
    images, labels = np.asarray(images), np.asarray(labels)
    _check_images(what, images)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{what} labels are {labels.dtype} {labels.shape}: expected integers of shape (N,)"
        )
    if len(labels) != len(images):
        raise DataError(
            f"{what} has {len(images)} images and {len(labels)} labels: expected as many of each"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        raise DataError(
            f"{what} label {labels[wrong[0]]} at index {wrong[0]} ({wrong.size} such labels): "
            f"expected 0 to {classes - 1}, for {classes} classes"
        )
    return Split(np.ascontiguousarray(images), labels.astype(np.int32))


def _check_images(what: str, images: np.ndarray) -> None:
    if np.issubdtype(images.dtype, np.floating):
        nan = "with NaN " if np.isnan(images).any() else ""
        raise DataError(
            f"{what} images are {images.dtype} {nan}: expected uint8, 0 to 255; for values in "
            "[0, 1] pass np.round(255 * images).astype(np.uint8)"
        )
    if images.dtype != np.uint8:
        raise DataError(f"{what} images are {images.dtype}: expected uint8, 0 to 255")
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
