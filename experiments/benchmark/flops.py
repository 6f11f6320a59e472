"""Floating-point operations of a step, counted from the shapes of convolutions and products.

A multiplication and an addition count as two; whatever else a network does counts as nothing. XLA's
own analysis is not used for a whole step: it does not see into the loops that a step runs in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.models import Network


def step(network: Network, teachers: tuple[Network, ...], batch: int, kept: float = 1.0) -> float:
    """Operations of one training step: the teachers once, the student three times.

    A backward pass takes twice the forward one: the gradients of inputs and of weights. `kept` is
    the part of the teachers that is not dropped, on average over steps.
    """
    frozen = kept * sum(forward(teacher) for teacher in teachers)
    return float(batch * (frozen + 3 * forward(network)))


def forward(network: Network) -> int:
    """Operations of one image through the network, as it is trained, with all that it shows."""
    variables = jax.eval_shape(network.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, *network.image_shape), jnp.float32)
    traced = jax.make_jaxpr(lambda v, x: network.apply(v, x, train=True)[0])(variables, images)
    return count(traced.jaxpr)


def count(jaxpr: Any) -> int:
    """Operations of a jaxpr, loops of known length included."""
    return sum(_of(equation) for equation in jaxpr.eqns)


def _of(equation: Any) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = parameters["dimension_numbers"].rhs_spec[0]  # groups are already divided out
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[outputs]
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return (
            2
            * math.prod(equation.outvars[0].aval.shape)
            * math.prod(shape[axis] for axis in contracted)
        )
    times = parameters.get("length", 1) if name == "scan" else 1
    return times * sum(count(inner) for inner in _inner(parameters))


def _inner(parameters: dict[str, Any]) -> Iterator[Any]:
    for value in parameters.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one
