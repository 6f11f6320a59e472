"""Networks from outside that are two functions, (init, apply)."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jax import Array

from distill_jax.models.adapters.base import Outside, Shown
from distill_jax.models.basics import Outputs, Variables


@dataclasses.dataclass(frozen=True, eq=False)
class PairNetwork(Outside):
    """A network of two functions.

    Args:
      pair: (init, apply): init(key) -> {"params": ..., other collections}; apply(variables, inputs,
        *, train, rngs, axis_name) -> (logits or `Outputs`, collections), of whose keywords it need
        not have all. What gives no collections changes none.
    """

    pair: tuple[Callable[..., Any], Callable[..., Any]] = dataclasses.field(kw_only=True)

    def _draw(self, key: Array) -> Variables:
        variables = self.pair[0](key)
        if not isinstance(variables, Mapping) or "params" not in variables:
            raise ValueError(
                f"init of {self.name} gives {_keys(variables)}: expected a dict of collections, "
                "'params' among them"
            )
        return dict(variables)

    def _run(
        self, variables: Variables, inputs: Any, train: bool, key: Array | None, axis: str | None
    ) -> Shown:
        apply = self.pair[1]
        options = {"train": train, "rngs": key, "axis_name": axis}
        parameters = inspect.signature(apply).parameters.values()
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
            known = {parameter.name for parameter in parameters}
            options = {name: value for name, value in options.items() if name in known}
        output = apply(variables, inputs, **options)
        if isinstance(output, tuple) and not isinstance(output, Outputs) and len(output) == 2:
            output, state = output
            if not isinstance(state, Mapping):
                raise ValueError(
                    f"apply of {self.name} gives {type(state).__name__} beside its logits: "
                    "expected a dict of its collections"
                )
            state = {name: tree for name, tree in state.items() if name != "params"}
            return Shown(output, state, {})
        return Shown(output, {}, {})

    def _code(self) -> Any:
        return self.pair


def _keys(variables: Any) -> str:
    return str(list(variables)) if isinstance(variables, Mapping) else type(variables).__name__
