"""What networks from outside have in common: what they may give, and how it is checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array, lax

from distill_jax import identity, rng
from distill_jax.models.basics import Outputs, Variables, at_least_float32
from distill_jax.models.network import Network

FLAGS = {  # what modules call the flag of training, and whether it is the opposite
    "train": False,
    "training": False,
    "deterministic": True,
    "use_running_average": True,
}


class Shown(NamedTuple):
    """What one call of a network from outside gives.

    Args:
      output: what it returned, logits or `Outputs`.
      state: its collections after the call, those that it may change.
      seen: what each submodule that was asked for gave, by its path.
      head_input: what its head was called with, None where no head is named.
    """

    output: Any
    state: Variables
    seen: dict[str, Array]
    head_input: Array | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Outside(Network):
    """A network from outside: equal to itself alone, since functions cannot be compared.

    A subclass defines `_draw` and `_run`. A network from outside is not frozen further, and
    computes in the types that it chooses.

    Args:
      example: the shapes and types of a batch of one, as it takes it; None of images.
      stages: paths of the submodules whose outputs are its stages.
      feature: path of the one whose output is its feature; by default the input of `head`, else
        the average of the last stage, else None.
      head: path of the one that classifies the feature.
    """

    example: Any = None
    stages: tuple[str, ...] = ()
    feature: str | None = None
    head_name: str | None = None

    @property
    def inputs(self) -> Any:
        return super().inputs if self.example is None else self.example

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def _run(
        self, variables: Variables, inputs: Any, train: bool, key: Array | None, axis: str | None
    ) -> Shown:
        raise NotImplementedError

    def _describe(self) -> str:
        options = [self.stages, self.feature, self.head_name]
        return identity.describe([self._code(), *options])

    def _code(self) -> Any:
        """What the network is made of, for its identity."""
        raise NotImplementedError

    @property
    def wanted(self) -> tuple[str, ...]:
        """The paths of the submodules whose outputs are asked for."""
        return (*self.stages, *([] if self.feature is None else [self.feature]))

    def freeze(self, variables: Variables, size: tuple[int, int] | None = None) -> Variables:
        return variables

    def apply(
        self,
        variables: Variables,
        inputs: Any,
        *,
        train: bool = False,
        rngs: Array | None = None,
        axis_name: str | None = None,
    ) -> tuple[Outputs, Variables]:
        state = {name: tree for name, tree in variables.items() if name != "params"}
        key, axis = (rngs, axis_name) if train else (None, None)
        inputs = jax.tree.map(lambda x, own: x.astype(own.dtype), inputs, self.inputs)
        shown = self._run(variables, inputs, train, key, axis)
        return self._outputs(shown), {**state, **shown.state} if train else state

    def head(self, variables: Variables, feature: Array) -> Array:
        raise ValueError(
            f"{self.name} shows no head: register_network(..., head=NAME) names the submodule that "
            "classifies its feature"
        )

    def _outputs(self, shown: Shown) -> Outputs:
        output = shown.output
        outputs = output if isinstance(output, Outputs) else Outputs(output, cast(Array, None), ())
        if not hasattr(outputs.logits, "shape"):
            raise ValueError(
                f"{self.name} gives {type(outputs.logits).__name__}: expected logits, an array of "
                f"shape (B, {self.classes}), or Outputs"
            )
        for part in ("stages", "branches", "preacts"):
            if not isinstance(own := getattr(outputs, part), tuple | list):
                raise ValueError(
                    f"{self.name} gives Outputs whose {part} are {type(own).__name__}: expected a "
                    "tuple of arrays, () where there are none"
                )
        outputs = outputs._replace(logits=at_least_float32(outputs.logits))
        if self.stages:
            outputs = outputs._replace(stages=tuple(shown.seen[name] for name in self.stages))
        if self.feature is not None:
            outputs = outputs._replace(feature=shown.seen[self.feature])
        elif shown.head_input is not None:
            outputs = outputs._replace(feature=shown.head_input)
        elif outputs.feature is None and outputs.stages:
            last = outputs.stages[-1]
            pooled = jnp.mean(last, tuple(range(1, last.ndim - 1)))
            outputs = outputs._replace(feature=pooled)
        return outputs


def device_key(key: Array, axis: str | None) -> Array:
    """A key of this device's own, where there are several."""
    return key if axis is None else jax.random.fold_in(key, lax.axis_index(axis))


def drop(dropout: Any, x: Array, key: Array, axis: str | None) -> Array:
    """Applies `dropout`(x (1, ...), key) to every example by itself.

    An example's units are drawn by its place in the whole batch, so that they do not depend on how
    many devices share it.
    """
    first = 0 if axis is None else lax.axis_index(axis) * len(x)
    keys = rng.per_example(key, first + jnp.arange(len(x)))
    return jax.vmap(lambda one, own: dropout(one[None], own)[0])(x, keys)


def once(network: str, wanted: tuple[str, ...], calls: dict[str, int]) -> None:
    """Checks that each wanted submodule is called exactly once.

    Args:
      network: its name.
      wanted: paths of submodules.
      calls: how often each submodule that there is was called.

    Raises:
      ValueError: one is not there or not called, or called more than once.
    """
    for name in wanted:
        count = calls.get(name, 0)
        if count != 1:
            problem = "is not called" if not count else f"is called {count} times, not once"
            raise ValueError(f"submodule {name!r} of {network} {problem}: there are {_list(calls)}")


def check(network: Outside) -> None:
    """Runs a network on shapes alone, in both modes.

    Raises:
      ValueError: it cannot be run, or gives something of another shape than it should.
    """
    shapes = _attempt(network, "initialised", lambda: network.shapes)
    batch, size = network.inputs, 2
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), batch)
    key = jax.eval_shape(lambda: jax.random.key(0))
    for train in (False, True):

        def run(variables: Variables, x: Array, key: Array, train: bool = train) -> Any:
            return network.apply(variables, x, train=train, rngs=key)

        outputs, state = _attempt(
            network, f"run with train={train}", lambda: jax.eval_shape(run, shapes, batch, key)
        )
        _check_outputs(network, outputs, size, batch)
        before = {name: tree for name, tree in shapes.items() if name != "params"}
        if state != before:
            lines = identity.differences(_texts(before), _texts(state))
            raise ValueError(
                f"{network.name} changes the shapes of its collections: {'; '.join(lines)}"
            )


def _attempt(network: Network, what: str, run: Any) -> Any:
    try:
        return run()
    except ValueError:
        raise
    except Exception as error:  # whatever somebody's code raises
        raise ValueError(
            f"{network.name} cannot be {what}, {inputs_text(network.inputs)}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_outputs(network: Outside, outputs: Outputs, batch: int, inputs: Any) -> None:
    expected = (batch, network.classes)
    given = getattr(inputs, "shape", None)
    text = f"inputs of shape {given}" if given else inputs_text(inputs)
    if outputs.logits.shape != expected:
        raise ValueError(
            f"{network.name} gives logits of shape {outputs.logits.shape} for {text} and "
            f"{network.classes} classes: expected {expected}"
        )
    if outputs.feature is not None and (outputs.feature.ndim, len(outputs.feature)) != (2, batch):
        raise ValueError(
            f"{network.name} gives a feature of shape {outputs.feature.shape} for {text}: expected "
            f"({batch}, F)"
        )
    for index, stage in enumerate(outputs.stages):
        if stage.ndim < 3 or len(stage) != batch:
            raise ValueError(
                f"stage {index + 1} of {network.name} has shape {stage.shape} for {text}: expected "
                f"a feature map, ({batch}, ..., channels)"
            )


def inputs_text(inputs: Any) -> str:
    """What a batch of one is, in words."""
    if getattr(inputs, "ndim", 0) == 4 and inputs.dtype == jnp.float32:
        return f"images of shape {inputs.shape[1:]}"
    leaves = {path or "array": f"{x.dtype} {x.shape}" for path, x in identity.leaves(inputs)}
    return f"inputs {', '.join(f'{path} {text}' for path, text in leaves.items())}"


def _texts(tree: Any) -> dict[str, str]:
    return {path: f"{leaf.dtype} {leaf.shape}" for path, leaf in identity.leaves(tree)}


def _list(names: Collection[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"
