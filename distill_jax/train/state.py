"""The arrays of a stage in training, and its mini-batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from flax import struct
from jax import Array

from distill_jax.models import Variables
from distill_jax.train import averaging
from distill_jax.train.teachers import TeacherOutputs


@struct.dataclass
class TrainState:
    """What a step changes; arrays only.

    Args:
      step: () int32, steps done.
      params: {"networks": {network: ...}, "methods": {network: {method: ...}}}: what is trained,
        the adapters of a network's methods beside its own.
      collections: likewise what is kept and not trained: running statistics, memory; and where a
        network keeps a moving average of its variables, "averages": {network: ...}.
      opt_state: by network, of its own parameters and those of its methods.
      skipped: () int32, steps whose numbers were not finite and whose update was not made.
    """

    step: Array
    params: Any
    collections: Any
    opt_state: Any
    skipped: Array

    @classmethod
    def join(cls, states: Sequence[TrainState]) -> TrainState:
        """The state of networks that are trained together, from that of each."""
        first, *others = states
        for state in others:
            first = dataclasses.replace(
                first,
                params=_joined(first.params, state.params),
                collections=_joined(first.collections, state.collections),
                opt_state={**first.opt_state, **state.opt_state},
            )
        return first

    def only(self, network: str) -> TrainState:
        """The part of one network."""
        params, collections = (
            {kind: {network: own[network]} for kind, own in tree.items() if network in own}
            for tree in (self.params, self.collections)
        )
        own = {network: self.opt_state[network]}
        return dataclasses.replace(self, params=params, collections=collections, opt_state=own)

    @property
    def averages(self) -> dict[str, Variables]:
        """The moving average of the variables of each network that keeps one."""
        return self.collections.get("averages", {})

    def variables(self, network: str) -> Variables:
        """What `Network.apply` takes."""
        params, collections = self.params["networks"], self.collections["networks"]
        return {"params": params[network], **collections[network]}

    def deployed(self, network: str) -> Variables:
        """What is evaluated and kept of a network: the average where it has one."""
        own = self.variables(network)
        average = self.averages.get(network)
        return own if average is None else averaging.as_variables(average, own)

    def method_variables(self, network: str) -> dict[str, Variables]:
        """The variables of a network's methods, by the method's name."""
        params, collections = self.params["methods"][network], self.collections["methods"][network]
        return join_variables(params, collections)


def _joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """{"networks": ..., "methods": ...} of two states as one."""
    kinds = dict.fromkeys((*one, *other))
    return {kind: {**one.get(kind, {}), **other.get(kind, {})} for kind in kinds}


def join_variables(params: dict[str, Any], collections: dict[str, Any]) -> dict[str, Variables]:
    """Puts the parameters of methods and their other collections together again."""
    return {
        name: ({"params": params[name]} if name in params else {}) | own
        for name, own in collections.items()
    }


def split_variables(variables: dict[str, Variables]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(params, collections) of the variables of methods; none of those without parameters."""
    params = {name: own["params"] for name, own in variables.items() if "params" in own}
    others = {
        name: {kind: tree for kind, tree in own.items() if kind != "params"}
        for name, own in variables.items()
    }
    return params, others


@struct.dataclass
class Rows:
    """Arrays (N, ...) as rows (N, numbers of an example).

    A TPU pads the last axis of an array to 128 and the one before it to 8 or more: images with
    three channels are laid out anew at every dispatch, and take several times their size there.

    Args:
      values: (N, numbers).
      shape: of an example.
    """

    values: Array
    shape: tuple[int, ...] = struct.field(pytree_node=False)

    @classmethod
    def of(cls, x: Any) -> Rows:
        """The rows of an array (N, ...)."""
        return cls(x.reshape(len(x), -1), x.shape[1:])

    @property
    def examples(self) -> Array:
        """The array (N, ...) again."""
        return self.values.reshape(-1, *self.shape)


def examples_of(inputs: Any) -> Any:
    """Inputs with the arrays of what is held as rows."""

    def is_rows(x):
        return isinstance(x, Rows)

    return jax.tree.map(lambda x: x.examples if is_rows(x) else x, inputs, is_leaf=is_rows)


class DeviceDataset(NamedTuple):
    """A training split as the loops hold it on the device.

    Args:
      inputs: (N, H, W, channels) uint8, or arrays (N, ...) of another task; on a TPU as `Rows`.
      labels: (N,) int32.
      teachers: what the frozen teachers give for each example, cached; None where the step is to
        compute it.
      index: (N,) int32, places in the split; None where these are the whole split.
    """

    inputs: Any
    labels: Any
    teachers: TeacherOutputs | None = None
    index: Any = None


class Order(NamedTuple):
    """Which examples make which step, as rows of a `DeviceDataset`; or those of one step (B,).

    Args:
      rows: (S, B) int32.
      partners: (S, B) int32, of each another one of its class; None where no method needs them.
    """

    rows: Any
    partners: Any = None


@struct.dataclass
class Batch:
    """A mini-batch, or a device's share of it.

    Args:
      inputs: (B, H, W, channels) uint8, or arrays (B, ...) of another task.
      labels: (B,) int32.
      index: (B,) int32, places in the training split.
      position: (B,) int32, places in the whole batch: augmentation draws by them.
      teachers: cached outputs of the frozen teachers, (B, K, C) logits, where there are such.
      partners: the inputs of another example of the same class for each, where a method needs them.
    """

    inputs: Any
    labels: Array
    index: Array
    position: Array
    teachers: TeacherOutputs | None = None
    partners: Any = None
