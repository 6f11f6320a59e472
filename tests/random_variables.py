"""Weights for tests."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def random_variables(shapes: Any, seed: int = 0) -> Any:
    """Variables of these shapes from NumPy, with BatchNorm entries unlike a fresh network's.

    Compiling the initialisation of a whole network takes seconds.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("var", "scale"):
            return jnp.asarray(rng.uniform(0.5, 2, leaf.shape), leaf.dtype)
        std = 0.3 if leaf.ndim == 1 else np.sqrt(2 / np.prod(leaf.shape[:-1]))
        return jnp.asarray(rng.normal(0, std, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)
