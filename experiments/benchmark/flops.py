"""Floating-point operations of a step, counted from the shapes of convolutions and linear layers.

A multiplication and an addition count as two; whatever else a network does counts as nothing. What
is counted is the mathematics, whichever way a backend computes it.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from distill_jax.models import Network
from distill_jax.models.zoo.layers import Conv, Linear


def step(network: Network, teachers: tuple[Network, ...], batch: int, kept: float = 1.0) -> float:
    """Operations of one training step: the teachers once, the student three times.

    A backward pass takes twice the forward one: the gradients of inputs and of weights. `kept` is
    the part of the teachers that is not dropped, on average over steps.
    """
    frozen = kept * sum(forward(teacher) for teacher in teachers)
    return float(batch * (frozen + 3 * forward(network)))


def forward(network: Network) -> int:
    """Operations of one image through the network, as it is trained, with all that it shows."""
    found = []

    def count(layer: Any, arguments: Any, options: Any, context: Any) -> Any:
        outputs = layer(*arguments, **options)
        module = context.module
        if context.method_name == "__call__" and isinstance(module, Conv | Linear):
            inputs = arguments[0].shape[-1]
            if isinstance(module, Conv):
                inputs = inputs // module.groups * module.kernel_size**2
            found.append(2 * math.prod(outputs.shape) * inputs)
        return outputs

    variables = jax.eval_shape(network.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, *network.image_shape), jnp.float32)
    with nn.intercept_methods(count):
        jax.eval_shape(lambda v, x: network.apply(v, x, train=True)[0], variables, images)
    return sum(found)
