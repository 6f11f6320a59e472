"""Deterministic weights and inputs from names: what golden cases store none of.

The numbers are part of the format of the cases: NumPy's legacy generator, seeded by a checksum of
the PyTorch name.
"""

from __future__ import annotations

import zlib

import numpy as np


def weights(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The float32 array of the state-dict entry `key`."""
    seeded = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)
    z = seeded.standard_normal(shape)
    if key.endswith("running_var"):
        z = 1.0 + 0.2 * np.abs(z)
    elif len(shape) >= 2:
        z = z * np.sqrt(2.0 / np.prod(shape[1:]))
    elif key.endswith("weight"):
        z = 1.0 + 0.1 * z
    else:
        z = 0.1 * z
    return z.astype(np.float32)


def state_dict(entries: list, seed: int) -> dict[str, np.ndarray]:
    """The state dict of [[key, shape], ...]."""
    return {key: weights(key, tuple(shape), seed) for key, shape in entries}


def images(n: int, seed: int, size: int = 32, channels: int = 3) -> np.ndarray:
    """(n, size, size, channels) float32, smooth noise of about unit variance."""
    seeded = np.random.RandomState(1000 + seed)
    coarse = seeded.standard_normal((n, size // 4, size // 4, channels))
    fine = seeded.standard_normal((n, size, size, channels))
    return (0.7 * coarse.repeat(4, 1).repeat(4, 2) + 0.7 * fine).astype(np.float32)


def labels(n: int, seed: int, classes: int) -> np.ndarray:
    """(n,) int32 in [0, classes)."""
    return np.random.RandomState(2000 + seed).randint(0, classes, n).astype(np.int32)
