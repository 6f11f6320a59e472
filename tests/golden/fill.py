"""Deterministic arrays from names: both sides of a parity test can rebuild them."""

import zlib

import numpy as np


def fill(key, shape, seed=0):
    """float32 array for the PyTorch state-dict entry `key` of `shape`."""
    rng = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)
    z = rng.standard_normal(shape)
    if key.endswith("running_var"):
        z = 1.0 + 0.2 * np.abs(z)
    elif key.endswith("running_mean"):
        z = 0.1 * z
    elif len(shape) >= 2:  # conv OIHW / linear OI
        z = z * np.sqrt(2.0 / np.prod(shape[1:]))
    elif key.endswith("weight"):  # batch-norm scale
        z = 1.0 + 0.1 * z
    else:  # any bias
        z = 0.1 * z
    return z.astype(np.float32)


def images(n, seed, size=32, channels=3):
    """NHWC float32 batch, about standard normal, smooth enough to matter."""
    rng = np.random.RandomState(1000 + seed)
    z = rng.standard_normal((n, size // 4, size // 4, channels)).repeat(4, 1).repeat(4, 2)
    return (0.7 * z + 0.7 * rng.standard_normal((n, size, size, channels))).astype(np.float32)


def labels(n, seed, classes):
    return np.random.RandomState(2000 + seed).randint(0, classes, n).astype(np.int32)
