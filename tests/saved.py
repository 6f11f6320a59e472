"""Checkpoints in memory, for what is trained without a folder."""

import copy
from typing import Any

import chex
import jax


class Saved:
    """Every save of a stage in training, by its step."""

    def __init__(self) -> None:
        self.all: dict[int, tuple[Any, dict[str, Any]]] = {}

    def steps(self) -> list[int]:
        """Those there are."""
        return sorted(self.all)

    def save(self, step: int, arrays: Any, meta: dict[str, Any]) -> None:
        """Keeps it."""
        self.all[step] = jax.device_get(arrays), copy.deepcopy(meta)

    def restore(self, template: Any, among: Any = None) -> tuple[Any, dict[str, Any]]:
        """The newest, of the template's shapes."""
        step = max(among)
        chex.assert_trees_all_equal_shapes_and_dtypes(self.all[step][0], jax.device_get(template))
        return self.all[step]

    def state(self, step: int) -> Any:
        """The state that was saved at a step."""
        return self.all[step][0]["state"]

    @property
    def last(self) -> Any:
        """The state of the newest."""
        return self.state(max(self.all))
