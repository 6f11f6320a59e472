"""PyTorch state dicts as NumPy arrays, to and from the variables of a network.

Modules carry PyTorch's names, so that the path of a leaf joined by dots is its entry in the state
dict; only the leaf's own name and the layout of kernels differ.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from distill_jax.models import Network, Variables

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


class WeightsError(ValueError):
    """A state dict that does not fit its network."""


def from_state_dict(state: Mapping[str, Any], network: Network) -> Variables:
    """The variables of `network` from a PyTorch state dict (name -> array).

    Convolutions come as (O, I, k, k) and leave as (k, k, I, O), linear layers as (out, in) and
    leave as (in, out). Counters (`num_batches_tracked`) are passed over.

    Raises:
      WeightsError: lists every missing, unexpected and mis-shaped entry, and those that are no
        floating-point numbers.
    """
    expected = _named(network.shapes)
    state = {k: np.asarray(v) for k, v in state.items() if not k.endswith("num_batches_tracked")}
    problems = [f"missing {name}" for name in expected if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in expected]
    flat = {}
    for name, (path, leaf) in expected.items():
        if name not in state:
            continue
        wanted = _to_torch_layout(np.empty(leaf.shape, np.float32)).shape
        if state[name].shape != wanted:
            problems.append(f"{name} has shape {state[name].shape}, expected {wanted}")
            continue
        integers = not jnp.issubdtype(state[name].dtype, jnp.floating)
        if integers and jnp.issubdtype(leaf.dtype, jnp.floating):
            problems.append(f"{name} is {state[name].dtype}, expected floating-point numbers")
            continue
        flat[path] = _from_torch_layout(state[name].astype(leaf.dtype))
    if problems:
        raise WeightsError(
            f"these weights are not those of {network.name} with {network.classes} classes on "
            f"{network.image_shape} images:\n  " + "\n  ".join(problems)
        )
    return traverse_util.unflatten_dict(flat)


def entries(network: Network) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every entry of the network's state dict, in PyTorch's layouts."""
    return [
        (name, _to_torch_layout(np.empty(leaf.shape, np.float32)).shape)
        for name, (_, leaf) in _named(network.shapes).items()
    ]


def count_classes(state: Mapping[str, np.ndarray], network: Network, wider: Network) -> int:
    """How many classes a state dict is of, by what of it has another shape for another number.

    Args:
      state: under the network's names.
      network: it.
      wider: the same of one class more.

    Returns:
      Those of `network` where that does not show.
    """
    for (name, shape), (_, other) in zip(entries(network), entries(wider), strict=True):
        found = np.shape(state.get(name, 0))
        for axis, (size, more) in enumerate(zip(shape, other, strict=True)):
            if size != more and len(found) == len(shape):
                return found[axis] - size + network.classes
    return network.classes


def to_state_dict(variables: Variables) -> dict[str, np.ndarray]:
    """The state dict (name -> array, PyTorch's layouts) of a network's variables."""
    return {
        name: _to_torch_layout(np.asarray(leaf)) for name, (_, leaf) in _named(variables).items()
    }


def _named(variables: Variables) -> dict[str, tuple[tuple[str, ...], Any]]:
    """(path, leaf) by name, which of leaves that PyTorch would call alike is the whole path."""
    flat = traverse_util.flatten_dict(dict(variables))
    counts = collections.Counter(map(_torch_name, flat))
    return {
        ".".join(path) if counts[_torch_name(path)] > 1 else _torch_name(path): (path, leaf)
        for path, leaf in flat.items()
    }


def _torch_name(path: tuple[str, ...]) -> str:
    _, *modules, leaf = path  # the first is the collection
    return ".".join((*modules, _LEAVES.get(leaf, leaf)))


def _to_torch_layout(array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    return array.T if array.ndim == 2 else array


def _from_torch_layout(array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if array.ndim == 2 else array
