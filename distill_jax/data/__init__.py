"""Examples and labels: where they come from, the order they are seen in, how they are changed.

Examples are images, sentences, or whatever a `Task` says that they are. Whole sets live in memory,
images as uint8 arrays, but for those whose images differ in size, which are decoded as they are
needed. Every choice (validation split, low-data subset, order of an epoch, crop and flip) is a pure
function of a seed or of a key. Nothing here downloads.
"""

from distill_jax.data.augment import AUGMENT, crop_flip, inception_crop, normalise
from distill_jax.data.checks import take
from distill_jax.data.dataset import NORMALISATION, DataError, Dataset, Split, check, from_arrays
from distill_jax.data.order import epoch_order, partners
from distill_jax.data.sources import NAMES, identity_of, is_registered, load, register_dataset
from distill_jax.data.streamed import Streamed, at_epoch, chunks, parts
from distill_jax.data.task import Metric, Task
from distill_jax.data.vocabulary import Vocabulary, learn_vocabulary, read_vocabulary
from distill_jax.data.workers import Reading, Workers, check_grain
from distill_jax.models import Indices

__all__ = [
    "AUGMENT",
    "NAMES",
    "NORMALISATION",
    "DataError",
    "Dataset",
    "Indices",
    "Metric",
    "Reading",
    "Split",
    "Streamed",
    "Task",
    "Vocabulary",
    "Workers",
    "at_epoch",
    "check",
    "check_grain",
    "chunks",
    "crop_flip",
    "epoch_order",
    "from_arrays",
    "identity_of",
    "inception_crop",
    "is_registered",
    "learn_vocabulary",
    "load",
    "normalise",
    "partners",
    "parts",
    "read_vocabulary",
    "register_dataset",
    "take",
]
