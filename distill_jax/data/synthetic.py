"""Made-up classes that a small network can learn in seconds, for tests and smoke runs."""

import math

import numpy as np

from distill_jax.data.checks import DataError, Split

_DEFAULT = "32x32x3:10:256:128"
_FORM = "synthetic[:HxWxC:CLASSES[:TRAIN[:TEST]]]"
_MAX_BYTES = 2**31


def read_synthetic(detail: str) -> tuple[Split, Split, int]:
    """(train, test, classes) for "HxWxC:CLASSES[:TRAIN[:TEST]]"; "" is 32x32x3:10:256:128.

    Each class is one smooth random pattern; each image is its class's pattern, moved by up to one
    pixel, under noise. The same `detail` always gives the same bytes. Classes are as even as they
    can be. DataError for another form, or for more than 2 GiB.
    """
    height, width, channels, classes, train, test = _sizes(detail or _DEFAULT)
    rng = np.random.default_rng((height, width, channels, classes))
    coarse = rng.standard_normal((classes, 4, 4, channels))
    rows, columns = _interpolation(height), _interpolation(width)
    patterns = np.einsum("hi,wj,kijc->khwc", rows, columns, coarse).astype(np.float32)
    return _draw(rng, patterns, train), _draw(rng, patterns, test), classes


def _sizes(detail: str) -> tuple[int, int, int, int, int, int]:
    shape, *counts = detail.split(":")
    numbers = [*shape.split("x"), *counts]
    well_formed = shape.count("x") == 2 and 1 <= len(counts) <= 3
    if not well_formed or not all(number.isascii() and number.isdigit() for number in numbers):
        raise DataError(f"synthetic data is {detail!r}: expected {_FORM}, all whole numbers")
    height, width, channels, classes, *splits = (int(number[:10]) for number in numbers)
    train = splits[0] if splits else 256
    test = splits[1] if len(splits) > 1 else 128
    sizes = height, width, channels, classes, train, test
    if min(sizes) < 1 or classes < 2 or height * width * channels * (train + test) > _MAX_BYTES:
        raise DataError(
            f"synthetic data is {detail!r}: expected {_FORM}, all at least 1, at least 2 classes "
            f"and at most {_MAX_BYTES} bytes"
        )
    return sizes


def _interpolation(size: int) -> np.ndarray:
    """(size, 4) weights that stretch 4 values to `size` by straight lines."""
    places = np.linspace(0, 3, size)[:, None]
    return np.maximum(0, 1 - np.abs(places - np.arange(4)))


def _draw(rng: np.random.Generator, patterns: np.ndarray, count: int) -> Split:
    classes, height, width, channels = patterns.shape
    labels = rng.permutation(np.arange(count) % classes).astype(np.int32)
    moves = rng.integers(-1, 2, (count, 2, 1))
    rows = (np.arange(height) + moves[:, 0]) % height
    columns = (np.arange(width) + moves[:, 1]) % width
    images = np.empty((count, height, width, channels), np.uint8)
    # A chunk at a time, so that the float copies stay small next to the images.
    chunk = max(1, 2**22 // math.prod(patterns.shape[1:]))
    for start in range(0, count, chunk):
        part = slice(start, start + chunk)
        index = labels[part, None, None], rows[part, :, None], columns[part, None, :]
        clean = patterns[index]
        noise = rng.standard_normal(clean.shape, np.float32)
        images[part] = np.clip(128 + 40 * clean + 30 * noise, 0, 255).astype(np.uint8)
    return Split(images, labels)
