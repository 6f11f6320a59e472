"""Networks from outside: linen modules, nnx modules and pairs of functions as `Network`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from distill_jax import identity
from distill_jax.models.adapters.base import Outside, check, inputs_text
from distill_jax.models.adapters.functions import PairNetwork
from distill_jax.models.adapters.linen_module import LinenNetwork
from distill_jax.models.network import Network


@dataclasses.dataclass(frozen=True)
class Door:
    """What is known of a network from outside besides the thing itself, see `register_network`.

    One of the library's own has the version None.
    """

    name: str
    version: str | None
    stages: tuple[str, ...] = ()
    feature: str | None = None
    head: str | None = None
    call: Callable[..., Any] | None = None


def adapt(
    make: Callable[[], Any],
    door: Door,
    classes: int,
    inputs: Any,
    image_shape: tuple[int, ...],
    dtype: str = "float32",
    code: Any = None,
) -> Network:
    """Makes a network of what `make` gives, and runs it on shapes alone.

    Args:
      make: gives a `Network`, a linen module, an nnx module or a pair (init, apply).
      door: its name, and which of its parts are what.
      classes: C.
      inputs: the shapes and types of a batch of one.
      image_shape: (H, W, channels) where these are images, else ().
      dtype: in which it says that it computes.
      code: what builds it, for its identity; an nnx module alone does not show how it is drawn.

    Raises:
      ValueError: it is none of these, cannot be run, or gives something of a wrong shape.
    """
    thing = make()
    options: dict[str, Any] = {
        "name": door.name,
        "classes": classes,
        "image_shape": image_shape,
        "example": inputs,
        "version": door.version,
        "dtype": dtype,
        "stages": door.stages,
        "feature": door.feature,
        "head_name": door.head,
    }
    network: Outside
    if isinstance(thing, Network):
        _refuse_parts(door, "a Network")
        return _renamed(thing, door, classes, inputs)
    if isinstance(thing, nn.Module):
        network = LinenNetwork(module=thing, call=door.call, **options)
    elif _is_nnx(thing):
        network = _of_nnx(thing, make, code, call=door.call, **options)
    elif isinstance(thing, tuple) and len(thing) == 2 and all(map(callable, thing)):
        _refuse_parts(door, "a pair (init, apply)")
        network = PairNetwork(module=None, pair=(thing[0], thing[1]), **options)
    else:
        given = f"the class {thing.__name__}" if isinstance(thing, type) else type(thing).__name__
        raise ValueError(
            f"build of {door.name} gives {given}: expected a Network, an instance of a linen or "
            "nnx module, or a pair of functions (init, apply)"
        )
    check(network)
    return network


def nnx_batch_norms_seen(
    look: Callable[[str, Any, Any], None],
) -> contextlib.AbstractContextManager[None]:
    """`nnx_module.batch_norms_seen`, where somebody has imported nnx."""
    if identity.imported_nnx() is None:
        return contextlib.nullcontext()
    from distill_jax.models.adapters import nnx_module

    return nnx_module.batch_norms_seen(look)


def _is_nnx(thing: Any) -> bool:
    nnx = identity.imported_nnx()
    return nnx is not None and isinstance(thing, nnx.Module)


def _of_nnx(thing: Any, make: Callable[[], Any], code: Any, **options: Any) -> Outside:
    from distill_jax.models.adapters import nnx_layout, nnx_module

    return nnx_module.NnxNetwork(
        module=None,
        make=make,
        layout=nnx_layout.layout_of(thing),
        code=identity.describe([thing, code]),
        **options,
    )


def _renamed(network: Network, door: Door, classes: int, inputs: Any) -> Network:
    if (network.classes, network.inputs) != (classes, inputs):
        raise ValueError(
            f"build of {door.name} gives a network of {network.classes} classes on "
            f"{inputs_text(network.inputs)}: expected {classes} on {inputs_text(inputs)}"
        )
    return dataclasses.replace(network, name=door.name, version=door.version)


def _refuse_parts(door: Door, kind: str) -> None:
    parts = {"stages": door.stages, "feature": door.feature, "head": door.head, "call": door.call}
    given = [name for name, value in parts.items() if value]
    if given:
        raise ValueError(
            f"{door.name} is {kind} and gives its Outputs itself: {', '.join(given)} name parts of "
            "linen and nnx modules"
        )
