"""Networks from outside that are Flax linen modules."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from distill_jax import rng
from distill_jax.models.adapters.base import FLAGS, Outside, Shown, device_key, drop, once
from distill_jax.models.basics import Variables, at_least_float32

SEEN = "intermediates"  # the collection in which flax puts what it captures
HEAD_INPUT = "head_input"
WHOLE_BATCH = "whole_batch"  # the random stream that is the same on every device

Call = Callable[[nn.Module, Array, bool], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class LinenNetwork(Outside):
    """A linen module that maps inputs to logits or `Outputs`.

    Its BatchNorms see the whole batch on several devices, and its Dropouts draw by the place of an
    example in it. What else is random, or lifted with random streams of its own (`nn.scan`), draws
    on each device for itself.

    Args:
      call: (module, inputs, train) -> output; by default the module is called with the flag of
        training that its signature has, see `flags_of`.
    """

    call: Call | None = None

    def _draw(self, key: Array) -> Variables:
        keys = {"params": key, "dropout": rng.stream(key, "dropout")}
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.inputs)
        variables = self._linen.init(keys, nothing, method=self._method(train=True))
        return {"params": {}, **nn.meta.unbox(dict(variables))}

    def _run(
        self, variables: Variables, inputs: Any, train: bool, key: Array | None, axis: str | None
    ) -> Shown:
        names = (*self.wanted, *([] if self.head_name is None else [self.head_name]))

        def run(capture: Callable[[str], bool]) -> tuple[Any, Any]:
            return self._apply(variables, inputs, train, key, axis, capture)

        output, state = run(lambda path: path in names)
        seen = _calls(state.pop(SEEN, {}))
        if any(len(seen.get(name, ())) != 1 for name in names):
            everything = jax.eval_shape(lambda: run(lambda path: True)[1][SEEN])
            once(self.name, names, {path: len(each) for path, each in _calls(everything).items()})
        head_input = None if self.head_name is None else seen[f"{self.head_name}/{HEAD_INPUT}"][0]
        return Shown(output, dict(state), {name: seen[name][0] for name in self.wanted}, head_input)

    def _apply(
        self,
        variables: Variables,
        inputs: Any,
        train: bool,
        key: Array | None,
        axis: str | None,
        capture: Callable[[str], bool],
    ) -> tuple[Any, Any]:
        """Runs the module; what the submodules at the paths to `capture` give is in `SEEN`."""
        state = [name for name in variables if name != "params"] if train else []
        with nn.intercept_methods(functools.partial(_amend, train, axis, self.head_name)):
            return self._linen.apply(
                variables,
                inputs,
                rngs=None if key is None else _streams(key, axis),
                mutable=[*state, SEEN],
                method=self._method(train),
                capture_intermediates=lambda module, method: (
                    method == "__call__" and bool(module.path) and capture(_path(module))
                ),
            )

    def head(self, variables: Variables, feature: Array) -> Array:
        if self.head_name is None:
            return super().head(variables, feature)
        own = {name: _inside(tree, self.head_name) for name, tree in variables.items()}
        return at_least_float32(cast(Array, _head_module(self).apply(own, feature)))

    def _code(self) -> Any:
        return [self.module, self.call]

    def _method(self, train: bool) -> Callable[..., Any]:
        call = self.call
        if call is not None:
            return lambda module, inputs: call(module, inputs, train)
        flags = flags_of(self._linen)
        return lambda module, inputs: module(inputs, **{f: train != FLAGS[f] for f in flags})


def flags_of(module: nn.Module) -> tuple[str, ...]:
    """The flags of training among the parameters of the module's `__call__`, see `FLAGS`.

    Raises:
      ValueError: `__call__` takes no inputs, or needs something besides.
    """
    kind = type(module)
    _, *parameters = inspect.signature(kind.__call__).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    needed = [p.name for p in named[1:] if p.default is p.empty and p.name not in FLAGS]
    if not parameters or needed:
        raise ValueError(
            f"{kind.__name__}.__call__ {f'needs {needed}' if needed else 'takes no inputs'}: "
            f"expected inputs and at most a flag of training, one of {', '.join(FLAGS)}. "
            "register_network(..., call=...) takes a function (module, inputs, train) -> logits"
        )
    return tuple(p.name for p in named[1:] if p.name in FLAGS)


def _streams(key: Array, axis: str | None) -> dict[str, Array]:
    """The random streams of a step; flax takes "params" for any that is not named here."""
    local = device_key(key, axis)
    return {
        "dropout": rng.stream(local, "dropout"),
        "params": rng.stream(local, "other"),
        WHOLE_BATCH: rng.stream(key, "dropout"),
    }


def _amend(
    train: bool, axis: str | None, head: str | None, run: Any, args: Any, kwargs: Any, context: Any
) -> Any:
    """Gives layers the whole batch, and keeps what the head is called with."""
    module = context.module
    if context.method_name != "__call__":
        return run(*args, **kwargs)
    if head is not None and _path(module) == head:
        module.sow(SEEN, HEAD_INPUT, args[0])
    if train and isinstance(module, nn.BatchNorm):
        return _batch_norm(module, axis, run, args, kwargs)
    if train and isinstance(module, nn.Dropout) and module.has_rng(WHOLE_BATCH):
        return _dropout(module, axis, run, *args, **kwargs)
    return run(*args, **kwargs)


def _batch_norm(module: nn.BatchNorm, axis: str | None, run: Any, args: Any, kwargs: Any) -> Any:
    own = module.axis_name
    object.__setattr__(module, "axis_name", axis)  # a module that is bound is read-only
    try:
        return run(*args, **kwargs)
    finally:
        object.__setattr__(module, "axis_name", own)


def _dropout(
    module: nn.Dropout,
    axis: str | None,
    run: Any,
    inputs: Array,
    deterministic: bool | None = None,
    rng: Array | None = None,
) -> Any:
    off = nn.merge_param("deterministic", module.deterministic, deterministic)
    run = functools.partial(run, deterministic=deterministic)
    if off or rng is not None or module.rate in (0, 1):
        return run(inputs, rng=rng)
    key = module.make_rng(WHOLE_BATCH)
    if any(dim % inputs.ndim == 0 for dim in module.broadcast_dims):  # one mask for all examples
        return run(inputs, rng=key)
    return drop(lambda one, own: run(one, rng=own), inputs, key, axis)


def _path(module: nn.Module) -> str:
    return "/".join(module.path)


def _calls(tree: Any, path: tuple[str, ...] = ()) -> dict[str, tuple[Any, ...]]:
    """What was captured, a value a call: outputs by path, the head's input by path/head_input."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, value in tree.items():
        if name == "__call__":
            found["/".join(path)] = value
        elif name == HEAD_INPUT:
            found["/".join((*path, name))] = value
        elif isinstance(value, dict):
            found |= _calls(value, (*path, name))
    return found


def _inside(tree: Any, path: str) -> Any:
    """The part of a collection that belongs to the submodule at `path`."""
    for name in path.split("/"):
        tree = tree.get(name, {})
    return tree


@functools.lru_cache(maxsize=128)
def _head_module(network: LinenNetwork) -> nn.Module:
    """The head, detached from its network."""
    found: list[nn.Module] = []

    def keep(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__" and _path(context.module) == network.head_name:
            found.append(context.module.clone(parent=None, _deep_clone=True))
        return run(*args, **kwargs)

    with nn.intercept_methods(keep):
        jax.eval_shape(network.apply, network.shapes, network.inputs)
    return found[0]
