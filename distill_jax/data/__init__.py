"""Images and labels: where they come from, the order they are seen in, how they are changed.

Whole sets live in memory as uint8 arrays, but for those whose images differ in size, which are
decoded as they are needed. Every choice (validation split, low-data subset, order of an epoch, crop
and flip) is a pure function of a seed or of a key. Nothing here downloads.
"""

from distill_jax.data.augment import AUGMENT, crop_flip, normalise
from distill_jax.data.dataset import NORMALISATION, DataError, Dataset, Split, check, from_arrays
from distill_jax.data.order import epoch_order
from distill_jax.data.sources import NAMES, load
from distill_jax.data.streamed import Streamed, at_epoch, chunks, parts

__all__ = [
    "AUGMENT",
    "NAMES",
    "NORMALISATION",
    "DataError",
    "Dataset",
    "Split",
    "Streamed",
    "at_epoch",
    "check",
    "chunks",
    "crop_flip",
    "epoch_order",
    "from_arrays",
    "load",
    "normalise",
    "parts",
]
