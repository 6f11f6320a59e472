"""In which order examples are seen: a pure function of (seed, epoch)."""

import numpy as np

from distill_jax.data.checks import DataError, integer

_EPOCH_STREAM, _PARTNER_STREAM = 3, 5


def permutation(n: int, *entropy: int) -> np.ndarray:
    """A random permutation of range(n), int64, that depends on nothing but (n, entropy).

    NumPy promises the raw words of a bit generator for good, but not `Generator.permutation`;
    sorting raw words makes an order that outlives NumPy's releases.
    """
    words = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(n)
    return np.argsort(words, kind="stable")


def epoch_order(
    n: int, batch_size: int, *, seed: int, epoch: int, last_batch: str = "drop"
) -> tuple[np.ndarray, np.ndarray]:
    """Which examples make each training batch of one epoch.

    Returns (indices, remainder): int32 (n // batch_size, batch_size), and the int32 indices of the
    smaller last batch, at most batch_size - 1 of them, empty with `last_batch="drop"`. Together
    they hold no index twice; with "keep" they hold each of range(n) once.

    DataError: n or batch_size below 1, batch_size above n, negative seed or epoch, another
    `last_batch`.
    """
    n, batch_size = integer("n", n, 1), integer("batch_size", batch_size, 1)
    if last_batch not in ("drop", "keep"):
        raise DataError(f"last_batch is {last_batch!r}: expected 'drop' or 'keep'")
    if batch_size > n:
        raise DataError(
            f"batch_size is {batch_size} but there are {n} training examples: "
            f"expected a batch_size of at most {n}"
        )
    entropy = integer("seed", seed, 0), integer("epoch", epoch, 0), _EPOCH_STREAM
    order = permutation(n, *entropy).astype(np.int32)
    whole = n - n % batch_size
    remainder = order[whole:] if last_batch == "keep" else order[:0]
    return order[:whole].reshape(-1, batch_size), remainder


def partners(labels: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """For each example another one of its class, perhaps itself: (N,) int32 places, uniform there.

    Args:
      labels: (N,) integers of 0 or more.
      seed: of the choice.
      epoch: from 0; each has partners of its own.

    Raises:
      DataError: negative seed or epoch.
    """
    entropy = integer("seed", seed, 0), integer("epoch", epoch, 0), _PARTNER_STREAM
    words = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(len(labels))
    sizes = np.bincount(labels)
    by_class = np.argsort(labels, kind="stable")
    first = (np.cumsum(sizes) - sizes)[labels]
    return by_class[first + (words % sizes[labels].astype(np.uint64)).astype(int)].astype(np.int32)
