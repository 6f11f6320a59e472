"""Networks from outside that are Flax nnx modules."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from jax import Array

from distill_jax.models.adapters.base import Outside, Shown, drop, once
from distill_jax.models.adapters.nnx_layout import Layout, Path, name_of
from distill_jax.models.basics import Variables, at_least_float32

Call = Callable[..., Any]  # (submodule, the arguments of its call) -> its output
_PLACE = "_place_in_network"  # an attribute that survives nnx's own lifting
Calls = dict[str, list[tuple[Any, Any]]]  # (first argument, output) of each call, by name


@dataclasses.dataclass(frozen=True, eq=False)
class NnxNetwork(Outside):
    """An nnx module that maps inputs to logits or `Outputs`.

    Params are "params", BatchStats "batch_stats", other Variables collections of their own names.
    Random streams are begun anew at each call and are no state. BatchNorms see the whole batch on
    several devices, and dropout draws by the place of an example in it.

    Args:
      make: builds the module.
      layout: of what it builds.
      code: what it builds, as text.
      call: (module, inputs, train) -> output; by default the module is called with its inputs,
        after `train()` or `eval()`.
    """

    make: Callable[[], nnx.Module] = dataclasses.field(kw_only=True)
    layout: Layout = dataclasses.field(kw_only=True)
    code: str = dataclasses.field(kw_only=True)
    call: Callable[[nnx.Module, Array, bool], Any] | None = None

    def _draw(self, key: Array) -> Variables:
        with _draws_from(key):
            return self.layout.variables(self.make())

    def _run(
        self, variables: Variables, inputs: Any, train: bool, key: Array | None, axis: str | None
    ) -> Shown:
        draws = any(collection is None for collection, _ in self.layout.leaves)
        if train and draws and key is None:
            raise ValueError(f"{self.name} draws random numbers when it is trained: it needs rngs")
        module = self.layout.module(variables, jax.random.key(0) if key is None else key, axis)
        if train:
            module.train()
            _share_batch_norms(module, axis)
        else:
            module.eval()

        def run(names: Iterable[str]) -> tuple[Any, Calls]:
            return self._call(module, inputs, train, axis, names)

        names = (*self.wanted, *([] if self.head_name is None else [self.head_name]))
        output, calls = run(names)
        if any(len(calls.get(name, ())) != 1 for name in names):
            everything = run(map(name_of, self.layout.modules))[1]
            once(self.name, names, {name: len(each) for name, each in everything.items()})
        state = {
            name: tree for name, tree in self.layout.variables(module).items() if name != "params"
        }
        head_input = None if self.head_name is None else calls[self.head_name][0][0]
        return Shown(output, state, {name: calls[name][0][1] for name in self.wanted}, head_input)

    def _call(
        self, module: nnx.Module, inputs: Any, train: bool, axis: str | None, names: Iterable[str]
    ) -> tuple[Any, Calls]:
        """Calls the module; gives what the submodules of these names were called with and gave."""
        calls: Calls = {}
        stands: dict[Path, Call] = {}
        if train:
            stands = {path: functools.partial(_dropout, axis) for path in self.layout.dropouts}
        paths = {name_of(path): path for path in self.layout.modules}
        for name in names:
            if name in paths:
                run = stands.get(paths[name], _plainly)
                calls[name] = []
                stands[paths[name]] = functools.partial(_recorded, calls[name], run)
        with _standing(module, stands):
            output = module(inputs) if self.call is None else self.call(module, inputs, train)
        return output, calls

    def head(self, variables: Variables, feature: Array) -> Array:
        if self.head_name is None:
            return super().head(variables, feature)
        module = self.layout.module(variables, jax.random.key(0))
        module.eval()
        path = next(path for path in self.layout.modules if name_of(path) == self.head_name)
        return at_least_float32(_at(module, path)(feature))

    def _code(self) -> Any:
        return [self.code, self.call]


class _Stand:
    """Stands in the place of a submodule while its network is called."""

    def __init__(self, layer: Any, call: Call) -> None:
        self._layer, self._call = layer, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._layer, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


@contextlib.contextmanager
def _standing(module: nnx.Module, stands: Mapping[Path, Call]) -> Iterator[None]:
    """Has the calls of the submodules at these paths done by functions (submodule, ...)."""
    layers = {path: _at(module, path) for path in stands}
    parents = {path: _at(module, path[:-1]) for path in stands}
    for path, call in stands.items():
        _put(parents[path], path[-1], _Stand(layers[path], call))
    try:
        yield
    finally:
        for path, layer in layers.items():
            _put(parents[path], path[-1], layer)


def _at(module: Any, path: Path) -> Any:
    for name in path:
        module = getattr(module, name) if _is_attribute(module, name) else module[name]
    return module


def _is_attribute(parent: Any, name: Any) -> bool:
    return isinstance(name, str) and hasattr(parent, name)


def _put(parent: Any, name: Any, value: Any) -> None:
    if _is_attribute(parent, name):
        setattr(parent, name, value)
    else:
        parent[name] = value


def _plainly(layer: Any, *args: Any, **kwargs: Any) -> Any:
    return layer(*args, **kwargs)


def _recorded(
    calls: list[tuple[Any, Any]], run: Call, layer: Any, *args: Any, **kwargs: Any
) -> Any:
    output = run(layer, *args, **kwargs)
    calls.append((args[0] if args else None, output))
    return output


def _share_batch_norms(module: nnx.Module, axis: str | None) -> None:
    for path, layer in nnx.iter_modules(module):
        if isinstance(layer, nnx.BatchNorm):
            layer.axis_name = axis
            setattr(layer, _PLACE, name_of(path))


@contextlib.contextmanager
def batch_norms_seen(look: Callable[[str, Array, Any], None]) -> Iterator[None]:
    """Has `look`(path, inputs, axis of the features) see the calls of nnx's BatchNorms in training.

    Those alone are in training that normalise by the batch.
    """
    call = nnx.BatchNorm.__call__

    def seen(layer: Any, x: Array, use_running_average: bool | None = None, **kwargs: Any) -> Any:
        frozen = layer.use_running_average if use_running_average is None else use_running_average
        if not frozen:
            look(getattr(layer, _PLACE, "BatchNorm"), x, layer.axis)
        return call(layer, x, use_running_average, **kwargs)

    nnx.BatchNorm.__call__ = seen  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nnx.BatchNorm.__call__ = call  # type: ignore[method-assign]


def _dropout(axis: str | None, layer: Any, x: Array, *args: Any, **kwargs: Any) -> Any:
    deterministic = kwargs.get("deterministic")
    deterministic = layer.deterministic if deterministic is None else deterministic
    if deterministic or args or kwargs.get("rngs") is not None or layer.rate in (0, 1):
        return layer(x, *args, **kwargs)
    key = layer.rngs()
    if any(dim % x.ndim == 0 for dim in layer.broadcast_dims):  # one mask for all examples
        return layer(x, deterministic=False, rngs=key)
    return drop(lambda one, own: layer(one, deterministic=False, rngs=own), x, key, axis)


@contextlib.contextmanager
def _draws_from(key: Array) -> Iterator[None]:
    """Mixes `key` into all that random streams draw.

    A module is built with streams of its own, begun from a seed that is written in its code:
    without this every network of its kind would start with the same weights.
    """
    draw = nnx.RngStream.__call__

    def mixed(stream: nnx.RngStream) -> Array:
        return jax.random.fold_in(key, jax.random.bits(draw(stream)))

    nnx.RngStream.__call__ = mixed  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nnx.RngStream.__call__ = draw  # type: ignore[method-assign]
