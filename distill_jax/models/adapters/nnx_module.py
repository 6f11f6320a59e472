"""Networks from outside that are Flax nnx modules."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from flax import nnx
from flax.nnx import tracers
from jax import Array

from distill_jax.models.adapters.base import Outside, Shown, drop, once
from distill_jax.models.adapters.nnx_layout import Layout, at, name_of
from distill_jax.models.basics import Variables, at_least_float32

_PLACE = "_place_in_network"  # an attribute that survives nnx's own lifting
# (first argument, output) of each call, by name; None of one inside a transformation.
Calls = dict[str, list[tuple[Any, Any] | None]]


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
        draws = any(collection is None for collection, *_ in self.layout.leaves)
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
        shown = {name: self._outside(name, calls[name][0]) for name in names}
        state = {
            name: tree for name, tree in self.layout.variables(module).items() if name != "params"
        }
        head_input = None if self.head_name is None else shown[self.head_name][0]
        return Shown(output, state, {name: shown[name][1] for name in self.wanted}, head_input)

    def _outside(self, name: str, call: tuple[Any, Any] | None) -> tuple[Any, Any]:
        """A call of a submodule, refused where it was made inside a transformation."""
        if call is None:
            raise ValueError(
                f"submodule {name!r} of {self.name} is called inside a transformation, such as "
                "nnx.remat or nnx.scan, out of which its output cannot be taken: expected one that "
                "is called outside"
            )
        return call

    def _call(
        self, module: nnx.Module, inputs: Any, train: bool, axis: str | None, names: Iterable[str]
    ) -> tuple[Any, Calls]:
        """Calls the module; gives what the submodules of these names were called with and gave."""
        paths = {name_of(path): path for path in self.layout.modules}
        calls: Calls = {name: [] for name in names if name in paths}
        dropouts = map(name_of, self.layout.dropouts if train else ())
        for name in dict.fromkeys((*calls, *dropouts)):
            layer = at(module, paths[name])
            kind: Any = type(layer)
            setattr(layer, _PLACE, name)
            object.__setattr__(layer, "__class__", _watched(kind))  # not a field of nnx's
        token = _CALL.set(_Call(calls, train, axis, tracers.TraceState()))
        try:
            output = module(inputs) if self.call is None else self.call(module, inputs, train)
        finally:
            _CALL.reset(token)
        return output, calls

    def head(self, variables: Variables, feature: Array) -> Array:
        if self.head_name is None:
            return super().head(variables, feature)
        module = self.layout.module(variables, jax.random.key(0))
        module.eval()
        path = next(path for path in self.layout.modules if name_of(path) == self.head_name)
        return at_least_float32(at(module, path)(feature))

    def _code(self) -> Any:
        return [self.code, self.call]


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a network: what its submodules are seen to do, and how its dropouts draw.

    Args:
      calls: of the submodules that are asked for, by name.
      train: whether dropouts drop.
      axis: of the devices.
      trace: the level at which the network is called.
    """

    calls: Calls
    train: bool
    axis: str | None
    trace: tracers.TraceState


_CALL: contextvars.ContextVar[_Call | None] = contextvars.ContextVar("call", default=None)


@functools.lru_cache(maxsize=128)
def _watched(kind: type) -> type:
    """The class whose calls the call of the network around it sees.

    A class of its own, not a thing in the module's place: nnx's transformations keep it.
    """
    if getattr(kind, "_is_watched", False):
        return kind

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        around, own = _CALL.get(), functools.partial(kind.__call__, self)
        if around is None:
            return own(*args, **kwargs)
        if around.train and isinstance(self, nnx.Dropout):
            output = _dropout(around.axis, self, own, *args, **kwargs)
        else:
            output = own(*args, **kwargs)
        if (calls := around.calls.get(getattr(self, _PLACE))) is not None:
            inside = not around.trace.is_valid()  # values of there mean nothing outside
            calls.append(None if inside else (args[0] if args else None, output))
        return output

    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind)(kind.__name__, (kind,), {**names, "__call__": run, "_is_watched": True})


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


def _dropout(
    axis: str | None, layer: Any, run: Callable[..., Any], x: Array, *args: Any, **kwargs: Any
) -> Any:
    deterministic = kwargs.get("deterministic")
    deterministic = layer.deterministic if deterministic is None else deterministic
    if deterministic or args or kwargs.get("rngs") is not None or layer.rate in (0, 1):
        return run(x, *args, **kwargs)
    key = layer.rngs()
    if any(dim % x.ndim == 0 for dim in layer.broadcast_dims):  # one mask for all examples
        return run(x, deterministic=False, rngs=key)
    return drop(lambda one, own: run(one, deterministic=False, rngs=own), x, key, axis)


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
