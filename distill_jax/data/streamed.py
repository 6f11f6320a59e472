"""Image sets too large for memory: encoded on disk, decoded in chunks by threads or by processes.

Nothing of it has a position to save: the pixels of an example are a function of its record alone
where networks are evaluated, and of (seed, epoch, record) where they are trained.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from distill_jax.data.checks import DataError, Split, integer
from distill_jax.data.pictures import check_depth

CHUNK_BYTES = 2**28  # of decoded images; three chunks at most are on the host at a time
SIZE, MARGIN = 224, 32  # what networks see; how much more the shorter side has before that crop
THREADS = 0  # that decode; 0 are as many as there are cores
_CROP_STREAM = 4
_MODES = {1: "L", 3: "RGB"}


class Chunk(NamedTuple):
    """Some of the steps of an `order`, with the examples that they need.

    Args:
      start: the first of the steps.
      steps: how many there are.
      images: (N, H, W, C) uint8.
      labels: (N,) int32.
      order: (S, B) rows of these; those from `steps` on only pad.
      places: (N,) int32, their places in the split; None where they are the split.
    """

    start: int
    steps: int
    images: np.ndarray
    labels: np.ndarray
    order: np.ndarray
    places: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Streamed:
    """Images in place of a uint8 (N, side, side, C) array, decoded by `np.asarray` and not before.

    Indexing the first axis gives the images chosen, not decoded either.

    Args:
      source: random access to encoded images (or to uint8 (H, W, C) arrays), of any size each.
      name: tells this source from others.
      rows: the records that are meant, in order.
      channels: 1 or 3.
      view: (seed, epoch) of the random crops for training; None crops the centre.
      side: height and width of the decoded images.
      margin: how much longer the shorter side is before the centre is cropped.
    """

    source: Sequence[Any]
    name: str
    rows: np.ndarray
    channels: int = 3
    view: tuple[int, int] | None = None
    side: int = dataclasses.field(default_factory=lambda: SIZE)
    margin: int = dataclasses.field(default_factory=lambda: MARGIN)

    dtype = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, C) of the decoded images."""
        return len(self.rows), self.side, self.side, self.channels

    @property
    def identity(self) -> str:
        """Tells these images from others without decoding them: source, size and records."""
        records = hashlib.sha256(self.rows.astype("<i8").tobytes()).hexdigest()
        return f"{self.name} {self.shape} {self.margin} {records}"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Streamed:
        return dataclasses.replace(self, rows=self.rows[index])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        images = np.empty(self.shape, np.uint8)
        self.read(images)
        return images if dtype is None else images.astype(dtype, copy=False)

    def read(self, out: np.ndarray) -> None:
        """Decodes into `out` (N, H, W, C) uint8; DataError names an image that cannot be read."""

        def decode(place: int) -> None:
            record = int(self.rows[place])
            try:
                pixels = self._decode(record)
            except Exception as error:  # Readers and decoders raise types of their own.
                reason = f"{type(error).__name__}: {error}"
                raise DataError(
                    f"image {record} of {self.name} cannot be read ({reason}): expected it "
                    "undamaged"
                ) from error
            out[place] = pixels.reshape(self.shape[1:])

        for _ in _threads().map(decode, range(len(self.rows))):
            pass

    def _decode(self, record: int) -> np.ndarray:
        from PIL import Image

        stored = self.source[record]
        if isinstance(stored, np.ndarray):
            stored = stored[..., 0] if stored.shape[-1] == 1 else stored
            image = Image.fromarray(stored)
        else:
            image = Image.open(io.BytesIO(stored))
        check_depth(image)
        image.load()  # some have their size only then
        if image.mode != _MODES[self.channels]:  # else the conversion is a copy
            image = image.convert(_MODES[self.channels])
        if self.view is None:
            return _centre(image, self.side, self.margin)
        left, top, width, height = random_box(*image.size, *self.view, record)
        crop = image.crop((left, top, left + width, top + height))
        return np.asarray(crop.resize((self.side, self.side), Image.Resampling.BILINEAR))


def _centre(image: Any, size: int, margin: int) -> np.ndarray:
    """The shorter side resized to size + margin, then the middle; as torchvision does both."""
    from PIL import Image

    width, height = image.size
    short, side = min(width, height), size + margin
    width, height = side * width // short, side * height // short
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def random_box(
    width: int, height: int, seed: int, epoch: int, record: int
) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a random crop, from (seed, epoch, record) alone.

    Its area is 0.08 to 1 of the image's, its ratio 3/4 to 4/3; after ten misses, the largest
    middle of a ratio in that range.

    References:
      Szegedy et al., Going Deeper with Convolutions, CVPR 2015; torchvision's RandomResizedCrop.
    """
    entropy = np.random.SeedSequence((seed, epoch, record, _CROP_STREAM))
    # The raw words are what NumPy promises for good.
    uniform = ((np.random.Philox(entropy).random_raw(40) >> 11) * 2.0**-53).reshape(10, 4)
    low, high = math.log(3 / 4), math.log(4 / 3)
    for scale, ratio, x, y in uniform.tolist():
        area = width * height * (0.08 + 0.92 * scale)
        aspect = math.exp(low + (high - low) * ratio)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(x * (width - w + 1)), int(y * (height - h + 1)), w, h
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS or os.cpu_count() or 1, "decode")


def read_labels(source: Sequence[Any], part: int = 1024) -> np.ndarray:
    """All of `source`'s labels, in worker threads."""

    def read(start: int) -> list[Any]:
        return [source[i] for i in range(start, min(start + part, len(source)))]

    found = _threads().map(read, range(0, len(source), part))
    return np.array([label for labels in found for label in labels])


def at_epoch(split: Split, seed: int, epoch: int) -> Split:
    """The split as it is trained on: streamed images under that epoch's crops, others unchanged."""
    if not isinstance(split.images, Streamed):
        return split
    view = integer("seed", seed, 0), integer("epoch", epoch, 0)
    return Split(dataclasses.replace(split.images, view=view), split.labels)


def chunks(
    split: Split,
    order: np.ndarray,
    *,
    skip: int = 0,
    read: Callable[[np.ndarray], None] | None = None,
) -> Iterator[Chunk]:
    """The steps of `order` (S, B) from step `skip` on.

    A resident split is one chunk, as it is. A streamed one comes in chunks of the same size, so
    that one compiled program serves them all. They hold at most CHUNK_BYTES of images, or one step
    where that is more, and the next one is decoded while a chunk is used.

    Args:
      split: of examples.
      order: which of them each step sees.
      skip: steps that are left out, and not decoded.
      read: fills an array with the images of the next steps, in place of decoding them here.
    """
    if skip >= len(order):
        return
    if not isinstance(split.images, Streamed):
        yield Chunk(0, len(order), *split, order)
        return
    step_bytes = math.prod(split.images.shape[1:]) * order.shape[1]
    size = min(len(order), max(1, CHUNK_BYTES // step_bytes))

    def load(start: int) -> Chunk:
        rows = order[start : start + size]
        images = _filled(split.images[rows.ravel()], size * order.shape[1], read)
        labels = np.zeros(len(images), split.labels.dtype)
        labels[: rows.size] = split.labels[rows.ravel()]
        local = np.arange(len(images), dtype=np.int32)
        places = np.zeros(len(images), np.int32)
        places[: rows.size] = rows.ravel()
        return Chunk(start, len(rows), images, labels, local.reshape(size, -1), places)

    yield from _one_ahead(load, range(skip, len(order), size))


def parts(images: Any, size: int) -> Iterator[Any]:
    """The examples in order, `size` at a time; zeros fill up the last. Streamed ones decoded ahead.

    Args:
      images: an array, streamed images, or a tree of arrays.
      size: how many at a time.
    """

    def load(start):
        return jax.tree.map(lambda x: _filled(x[start : start + size], size), images)

    yield from _one_ahead(load, range(0, len(jax.tree.leaves(images)[0]), size))


def _filled(
    images: np.ndarray | Streamed, size: int, read: Callable[[np.ndarray], None] | None = None
) -> np.ndarray:
    filled = np.zeros((size, *images.shape[1:]), images.dtype)
    if isinstance(images, Streamed):
        (read or images.read)(filled[: len(images)])
    else:
        filled[: len(images)] = images
    return filled


def _one_ahead(load: Callable[[int], Any], starts: Sequence[int]) -> Iterator[Any]:
    """load(start) of each; the next one is loaded while one is used."""
    with ThreadPoolExecutor(1, "prefetch") as ahead:
        coming = ahead.submit(load, starts[0])
        for following in starts[1:]:
            loaded, coming = coming.result(), ahead.submit(load, following)
            yield loaded
        yield coming.result()
