"""Networks by name: those that come with the library, and those that are registered."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.changed import until_changed
from distill_jax.models.adapters import Door, adapt, inputs_text
from distill_jax.models.branched import BRANCHED, Kind, backbone_name, split_name
from distill_jax.models.families import FAMILIES, MODELS, TASK_FAMILIES, Builder, TaskFamily
from distill_jax.models.network import DTYPES, Network

_FORBIDDEN = "<>+;,#:"  # these mean something in the text of a graph


@dataclasses.dataclass(frozen=True, eq=False)
class Registration:
    """What `register_network` was given for one name."""

    door: Door
    build: Callable[[int, Any], Any]


_REGISTERED: dict[str, Registration] = {}


def build(name: str, classes: int, inputs: Any, dtype: str = "float32") -> Network:
    """Builds the network called `name`, for inputs of `classes` classes.

    A registered network chooses the types in which it computes, whatever `dtype` is.

    Args:
      name: of a built-in or registered network.
      classes: C.
      inputs: (H, W, channels) of images, or the shapes and types of a preprocessed batch of one: a
        `jax.ShapeDtypeStruct` or a pytree of them.
      dtype: one of `DTYPES`.

    Raises:
      ValueError: unknown name or dtype, fewer than two classes, inputs that it cannot take, or a
        registered network that does not do as it should.
    """
    check_name(name)
    if dtype not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}")
    if classes < 2:
        raise ValueError(f"a classifier needs two classes or more, got {classes}")
    shape, (kind, peers, own) = image_shape_of(inputs), split_name(name)
    family = _task_family(own)
    if shape and (own in _REGISTERED or family is not None):
        inputs = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    if own in _REGISTERED:
        leaves, structure = jax.tree.flatten(inputs)
        network = _adapted(_REGISTERED[own], classes, tuple(leaves), structure)
    elif family is not None:
        leaves, structure = jax.tree.flatten(inputs)
        network = _of_task(family, own, classes, tuple(leaves), structure, dtype)
    elif shape:
        network = Network(own, _builder(own)(classes, shape), classes, shape, dtype)
    else:
        raise ValueError(
            f"{own} takes images, float32 (1, height, width, channels), got {inputs_text(inputs)}: "
            "expected a network for these, built-in or registered"
        )
    return network if kind is None else _grown(network, name, kind, peers)


def image_shape_of(inputs: Any) -> tuple[int, ...]:
    """(H, W, channels) of inputs that are images; () of others."""
    if isinstance(inputs, tuple) and all(isinstance(size, int) for size in inputs):
        if len(inputs) != 3 or min(inputs) < 1:
            raise ValueError(f"image_shape is (height, width, channels), got {inputs}")
        return inputs
    image = isinstance(inputs, jax.ShapeDtypeStruct) and len(inputs.shape) == 4
    return inputs.shape[1:] if image and inputs.dtype == jnp.float32 else ()


def check_name(name: str) -> None:
    """Raises an error unless there is a network called `name`.

    Raises:
      ValueError: there is none, and the message lists those there are; or its size is no legal one.
    """
    own = backbone_name(name)
    if (family := _task_family(own)) is not None:
        family.build(*(family.size(own) or ()), 2, jnp.float32)
    elif own not in _REGISTERED:
        _builder(own)(2, (224, 224, 3))  # images that all of them take


def is_registered(name: str) -> bool:
    """Whether a user registered a network under a name."""
    return backbone_name(name) in _REGISTERED


def registered() -> list[Any]:
    """What users registered."""
    return list(_REGISTERED.values())


def register_network(
    name: str,
    build: Callable[[int, Any], Any],
    version: str = "1",
    *,
    stages: Sequence[str] = (),
    feature: str | None = None,
    head: str | None = None,
    call: Callable[..., Any] | None = None,
) -> None:
    """Makes a network known by name, wherever the name of a built-in network may stand.

    A name that was registered before goes to the new network.

    Args:
      name: a text without spaces and `<>+;,#:` that is no built-in network's name.
      build: (classes, inputs) -> the network, inputs being the shape and type of a preprocessed
        batch of one: (1, H, W, channels) of images, a pytree where a `data.Task` has one. It gives
        a `Network`, a linen module, an nnx module, or a pair of functions (init, apply):
        init(key) -> {"params": ..., other collections}, apply(variables,
        inputs, *, train, rngs, axis_name) -> (logits or `Outputs`, collections) or, with fewer of
        the keywords, the logits alone.
      version: part of the network's identity; to be raised when the network changes in a way that
        its code does not show.
      stages: paths of the submodules whose outputs are its stages, "Block_1" or "Block_1/Conv_0".
      feature: path of the one whose output is the vector before the classifier; by default the
        input of `head`, else the average of the last stage.
      head: path of the one that classifies the feature.
      call: (module, inputs, train) -> output, where a module is not to be called with its inputs
        and a flag `train`, `training`, `deterministic` or `use_running_average`.

    Raises:
      ValueError: the name is not free or has a forbidden character, or an argument is of a wrong
        type.
    """
    if not isinstance(name, str) or not name or re.search(rf"[{_FORBIDDEN}\s]", name):
        raise ValueError(
            f"a network's name is a text without spaces and any of {_FORBIDDEN}, got {name!r}"
        )
    if _task_family(name) or any(family.size(name) for family in FAMILIES):
        raise ValueError(f"{name!r} is a built-in network: register yours under another name")
    if not isinstance(version, str):
        raise ValueError(f"the version of {name} is a text, got {version!r}")
    if not callable(build):
        raise ValueError(
            f"build of {name} is a function (classes, inputs), got {type(build).__name__}"
        )
    if isinstance(stages, str):
        raise ValueError(f"stages of {name} are several names, got {stages!r}: write ({stages!r},)")
    door = Door(name, version, tuple(stages), feature, head, call)
    _REGISTERED[name] = Registration(door, build)


def _builder(name: str) -> Builder:
    for family in FAMILIES:
        size = family.size(name)
        if size is not None:
            return functools.partial(family.builder, *size)
    names = [*MODELS, *_REGISTERED]
    within = [own for own in names if name and name.lower() in own.split("_")]
    close = within or difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    others = [family.form.format("D", "K") for family in FAMILIES if family.any_size]
    rules = ", ".join((*others, *(family.form.format(*family.sizes) for family in TASK_FAMILIES)))
    raise ValueError(
        f"unknown network {name!r}{hint} There are {', '.join(names)}, other sizes of {rules}, "
        f"and {', '.join(f'{prefix}:NAME' for prefix in BRANCHED)} for each"
    )


def _task_family(name: str) -> TaskFamily | None:
    """The family of networks on other inputs than images that a name belongs to."""
    return next((family for family in TASK_FAMILIES if family.size(name)), None)


@functools.lru_cache(maxsize=128)
def _of_task(
    family: TaskFamily,
    name: str,
    classes: int,
    leaves: tuple[jax.ShapeDtypeStruct, ...],
    structure: Any,
    dtype: str,
) -> Network:
    """Builds a network of a task family, by the door of modules from outside."""
    inputs, size = jax.tree.unflatten(structure, leaves), family.size(name) or ()
    if not family.takes(inputs):
        raise ValueError(f"{name} takes {family.inputs}, got {inputs_text(inputs)}")
    door = Door(name, None, family.stages(*size), head=family.head)
    module = family.build(*size, classes, DTYPES[dtype])
    return adapt(lambda: module, door, classes, inputs, (), dtype)


@until_changed(maxsize=128)
def _adapted(
    registration: Registration,
    classes: int,
    leaves: tuple[jax.ShapeDtypeStruct, ...],
    structure: Any,
) -> Network:
    """Adapts a network once, so that what was compiled for it is found again."""
    inputs = jax.tree.unflatten(structure, leaves)

    def make() -> Any:
        try:
            return registration.build(classes, inputs)
        except ValueError:
            raise
        except Exception as error:  # whatever somebody's code raises
            raise ValueError(
                f"build of {registration.door.name} fails for {classes} classes and "
                f"{inputs_text(inputs)}: {type(error).__name__}: {error}"
            ) from error

    door, code = registration.door, registration.build
    return adapt(make, door, classes, inputs, image_shape_of(inputs), code=code)


def _grown(network: Network, name: str, kind: Kind, peers: int) -> Network:
    """The network with branches."""
    own = network.name
    if network.module is None or type(network) is not Network:
        raise ValueError(
            f"{name}: branches grow on the library's modules for images only, and {own} "
            + ("takes others" if network.version is None else "comes from outside")
        )
    if kind.peers and not hasattr(network.module, "upper"):
        raise ValueError(
            f"{name}: the peers of a network are its last stage and classifier again, and the "
            f"module of {own} has no method `upper` that runs these alone"
        )
    if network.version is not None and len(network.output_shapes.stages) < 2:
        raise ValueError(
            f"{name}: branches grow on the stages before the last, expected {own} to show two or "
            f"more, got {len(network.output_shapes.stages)}"
        )
    module = kind.grow(network.module, network.classes, peers)
    return dataclasses.replace(network, name=name, module=module)
