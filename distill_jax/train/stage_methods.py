"""The methods of a stage before its first step: what they are told of its networks, and draw."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax import Array

from distill_jax import rng
from distill_jax.methods import Method, Shapes, heard
from distill_jax.models import Outputs, Variables
from distill_jax.train.stage import Stage


def shapes_of(stage: Stage, labels: np.ndarray) -> Shapes:
    """What the stage's methods can know before the first step, of the whole batch.

    Its teachers are the frozen ones, then the live ones; `_heard` chooses those of one method. The
    labels are those of its training split.
    """
    size = stage.recipe.batch_size
    return Shapes(
        _of_batch(stage.network.output_shapes, size),
        tuple(_of_batch(x.output_shapes, size) for x in (*stage.teachers, *stage.live)),
        stage.network.classes,
        len(labels),
        stage.network.inputs,
        labels,
    )


def _heard(stage: Stage, method: Method, shapes: Shapes) -> Shapes:
    """The shapes that a method is given: of those of its teachers that it hears."""
    methods, live = [other for _, other in stage.methods], [peer.name for peer in stage.live]
    places = heard(method, methods, stage.network.name, len(stage.teachers), live)
    return shapes._replace(teachers=tuple(shapes.teachers[place] for place in places))


def _of_batch(shapes: Outputs, size: int) -> Outputs:
    """The shapes of one image's outputs, of a batch of `size`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), shapes)


def _looks_at_shapes(method: Method) -> bool:
    """Whether a method checks or draws anything by shapes, which takes tracing its networks."""
    kind = type(method)
    own = (kind.init, kind.check, kind.for_shapes)
    return own != (Method.init, Method.check, Method.for_shapes)


def with_needs(stage: Stage, labels: np.ndarray) -> Stage:
    """The stage with methods that know what they need of its networks.

    Raises:
      ValueError: a method cannot teach these networks.
    """
    if not any(_looks_at_shapes(method) for _, method in stage.methods):
        return stage
    shapes, methods = shapes_of(stage, labels), []
    for name, method in stage.methods:
        try:
            methods.append((name, method.for_shapes(_heard(stage, method, shapes))))
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise ValueError(_cannot_teach(stage, name, error)) from error
    return dataclasses.replace(stage, methods=tuple(methods))


def init_methods(stage: Stage, labels: np.ndarray, key: Array) -> dict[str, Variables]:
    """Draws the variables of the stage's methods, of those that have any."""
    own = [(name, m) for name, m in stage.methods if type(m).init is not Method.init]
    if not own:  # most have none: nothing is traced or compiled for them
        return {}
    shapes = shapes_of(stage, labels)

    def draw(key):
        return {
            name: m.init(rng.stream(key, f"init {name}"), _heard(stage, m, shapes))
            for name, m in own
        }

    return {name: variables for name, variables in jax.jit(draw)(key).items() if variables}


def begin_methods(stage: Stage, drawn: dict[str, Any], left: dict[str, Any]) -> dict[str, Any]:
    """The variables of the stage's methods, drawn ones, by what the phase before `left` of them."""
    named = dict(stage.methods)
    begun = {name: named[name].begin(drawn[name], left[name]) for name in drawn if name in left}
    return drawn | begun


def check_begin(before: Stage, stage: Stage, labels: np.ndarray) -> None:
    """Raises ValueError where a method cannot go on from what it is in the phase before."""
    drawn, left = (method_shapes(x, labels) for x in (stage, before))
    begin_methods(stage, drawn, left)


def method_shapes(stage: Stage, labels: np.ndarray) -> dict[str, Variables]:
    """The shapes of what `init_methods` gives."""
    return jax.eval_shape(lambda: init_methods(stage, labels, jax.random.key(0)))


def check_methods(stage: Stage, labels: np.ndarray) -> None:
    """Raises ValueError where a method cannot teach the stage's networks."""
    looking = [(name, method) for name, method in stage.methods if _looks_at_shapes(method)]
    shapes = shapes_of(stage, labels) if looking else None
    for name, method in looking:
        try:
            method.check(_heard(stage, method, shapes))  # type: ignore[arg-type]
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise ValueError(_cannot_teach(stage, name, error)) from error


def method_warnings(stage: Stage, labels: np.ndarray) -> list[str]:
    """What of the numbers of the stage's methods does not apply, a line each."""
    warning = [m for _, m in stage.methods if type(m).warnings is not Method.warnings]
    if not warning:
        return []
    shapes = shapes_of(stage, labels)
    return [line for m in warning for line in m.warnings(_heard(stage, m, shapes))]


def _cannot_teach(stage: Stage, name: str, error: Exception) -> str:
    teachers = "+".join(stage.taught_by) or "nobody"
    return f"method {name!r} for {stage.network.name} taught by {teachers}: {error}"
