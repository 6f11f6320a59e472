"""Where the state of an nnx module lies in the variables of its network."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from distill_jax import rng
from distill_jax.models.adapters.base import device_key
from distill_jax.models.basics import Variables

Path = tuple[Any, ...]  # names of attributes, numbers in lists


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the state of a module lies in the variables of its network.

    Args:
      graph: the module without its arrays.
      tree: the structure of its state.
      leaves: (collection, path, shape) of each array of the state, in order; the collection is None
        where the array belongs to a random stream.
      modules: the paths of the submodules that can be called.
      dropouts: the paths of those that are dropout layers.
    """

    graph: Any
    tree: Any
    leaves: tuple[tuple[str | None, Path, tuple[int, ...]], ...]
    modules: tuple[Path, ...]
    dropouts: tuple[Path, ...]

    def variables(self, module: nnx.Module) -> Variables:
        """The state of a module as {collection: nested dict}, without its random streams.

        What its call added, as `sow` does, is left out.
        """
        values = dict(nnx.to_flat_state(nnx.state(module)))
        variables: Variables = {"params": {}}
        for collection, path, _ in self.leaves:
            if collection is not None:
                own = variables.setdefault(collection, {})
                for name in path[:-1]:
                    own = own.setdefault(str(name), {})
                # While it is traced, a plain array may be a constant, which nnx counts as no state.
                value = values[path][...] if path in values else jnp.asarray(at(module, path))
                own[str(path[-1])] = value
        return variables

    def module(self, variables: Variables, key: Array, axis: str | None = None) -> nnx.Module:
        """The module with these variables, its random streams begun anew from `key`.

        Those of dropout layers are the same on every device, the others each device's own.
        """
        leaves = []
        for collection, path, shape in self.leaves:
            if collection is not None:
                leaf = variables[collection]
                for name in path:
                    leaf = leaf[str(name)]
            elif path[-1] == "count":
                leaf = jnp.zeros(shape, jnp.uint32)
            else:
                own = key if path[:-2] in self.dropouts else device_key(key, axis)
                leaf = rng.stream(own, name_of(path))
                if shape:  # of layers in a stack, one each
                    leaf = jax.random.split(leaf, shape)
            leaves.append(leaf)
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, leaves))


def layout_of(module: nnx.Module) -> Layout:
    """Finds the layout of a module."""
    graph, state = nnx.split(module)
    leaves = tuple(
        (
            None if isinstance(variable, nnx.RngState) else _collection(type(variable)),
            path,
            jnp.shape(variable[...]),
        )
        for path, variable in nnx.to_flat_state(state)
    )
    modules = {path: layer for path, layer in nnx.iter_modules(module) if path and callable(layer)}
    dropouts = tuple(path for path, layer in modules.items() if isinstance(layer, nnx.Dropout))
    return Layout(graph, jax.tree.structure(state), leaves, tuple(modules), dropouts)


def at(module: Any, path: Path) -> Any:
    """What stands at a path in a module."""
    for name in path:
        attribute = isinstance(name, str) and hasattr(module, name)
        module = getattr(module, name) if attribute else module[name]
    return module


def name_of(path: Path) -> str:
    """A path as a text, "blocks/0"."""
    return "/".join(map(str, path))


def _collection(kind: type[nnx.Variable]) -> str:
    return nnx.variablelib.variable_name_from_type(kind, allow_register=True)
