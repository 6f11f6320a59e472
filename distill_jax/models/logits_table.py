"""Teachers of which the logits are known, one row an example, and nothing else."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NoReturn, cast

import jax
import jax.numpy as jnp
from jax import Array

from distill_jax.models.basics import Outputs, Variables
from distill_jax.models.network import Network


@dataclasses.dataclass(frozen=True, eq=False)
class LogitsTable(Network):
    """A network that was run elsewhere: its logits come from a file, by the place of an example.

    It has no parameters and cannot be run. Equal to itself alone.

    Args:
      example: the shapes and types of a batch of one, of those that others take.
    """

    example: Any = None

    @property
    def inputs(self) -> Any:
        return self.example

    @property
    def shapes(self) -> Variables:
        return {"params": {}}

    @property
    def output_shapes(self) -> Outputs:
        logits = jax.ShapeDtypeStruct((1, self.classes), jnp.float32)
        return Outputs(cast(Array, logits), cast(Array, None), ())

    @property
    def identity(self) -> Any:
        return ["logits"]

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def init(self, key: Array) -> Variables:
        self._refuse()

    def apply(self, variables: Variables, inputs: Any, **options: Any) -> Any:
        self._refuse()

    def head(self, variables: Variables, feature: Array) -> Array:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError(f"{self.name} is a file of logits, which cannot be run")


def logits_table(name: str, classes: int, inputs: Any) -> LogitsTable:
    """The network that stands for a file of logits, one object for equal arguments."""
    leaves, structure = jax.tree.flatten(inputs)
    return _table(name, classes, tuple(leaves), structure)


@functools.lru_cache(maxsize=128)
def _table(name: str, classes: int, leaves: tuple[Any, ...], structure: Any) -> LogitsTable:
    return LogitsTable(name, None, classes, (), example=jax.tree.unflatten(structure, leaves))
