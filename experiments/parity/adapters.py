"""Adapters of methods: PyTorch's names and layouts, and ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import traverse_util

from distill_jax.models import Variables

# First part of a state dict's name -> where ours stands among the variables.
Places = Mapping[str, tuple[str, ...]]
_PARAMETERS = {"weight", "bias", "log_scale"}


def variables_of(state: Mapping[str, Any], places: Places) -> Variables:
    """Our variables from a state dict; differentiable, arrays of any kind."""
    flat = {}
    for name, array in state.items():
        first, *modules, leaf = name.split(".")
        kind = "params" if leaf in _PARAMETERS else "batch_stats"
        ours, layout = _OURS[leaf if array.ndim < 2 else "kernel"], _turned(array)
        flat[kind, *places[first], *modules, ours] = layout
    return traverse_util.unflatten_dict(flat)


def to_torch(variables: Variables, places: Places) -> dict[str, Any]:
    """The state dict of our variables."""
    back = {place: first for first, place in places.items()}
    state = {}
    for (_, *path), array in traverse_util.flatten_dict(dict(variables)).items():
        place = next(place for place in back if tuple(path[: len(place)]) == place)
        *modules, leaf = path[len(place) :]
        state[".".join((back[place], *modules, _THEIRS[leaf]))] = _turned_back(array)
    return state


_OURS = {
    "kernel": "kernel",
    "weight": "scale",
    "bias": "bias",
    "running_mean": "mean",
    "running_var": "var",
    "log_scale": "log_scale",
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()} | {"kernel": "weight"}


def _turned(array: Any) -> Any:
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if array.ndim == 2 else array


def _turned_back(array: Any) -> Any:
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    return array.T if array.ndim == 2 else array
