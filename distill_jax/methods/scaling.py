"""Logits whose scale is taken out before they are compared."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array, lax

from distill_jax.methods.base import Context, Method, Term
from distill_jax.methods.losses import kl_divergence, soften, widen
from distill_jax.methods.ranges import above_zero
from distill_jax.models import Outputs

SCALINGS = ("none", "standardise", "norm")


def spread(logits: Array) -> Array:
    """Unbiased standard deviation over the classes, (..., C) -> (..., 1); 1 where all are equal."""
    logits = widen(logits)
    centred = logits - jnp.mean(logits, -1, keepdims=True)
    # In units of the largest: squares neither vanish nor overflow, and the root has a gradient.
    size = lax.stop_gradient(jnp.max(jnp.abs(centred), -1, keepdims=True))
    equal = size == 0
    size = jnp.where(equal, 1.0, size)
    squares = jnp.sum(jnp.square(centred / size), -1, keepdims=True)
    return size * jnp.sqrt(jnp.where(equal, 1.0, squares / (logits.shape[-1] - 1)))


def standardise(logits: Array) -> Array:
    """(z - mean) / (1e-7 + standard deviation) of each example; zeros where all are equal.

    References:
      Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024, 2403.01427.
    """
    logits = widen(logits)
    return (logits - jnp.mean(logits, -1, keepdims=True)) / (1e-7 + spread(logits))


def rescale(
    logits: Array, temperature: Array | float, scaling: str = "none"
) -> tuple[Array, Array | float]:
    """Divides logits (..., B, C) by a temperature, or by one of each example.

    Args:
      logits: of a network.
      temperature: T > 0.
      scaling: "none" divides by T, "standardise" standardises before that, "norm" divides by T
        times the standard deviation.

    Returns:
      The logits, and what their temperature is: T, or (..., B) of "norm".
    """
    if scaling == "norm":
        own = temperature * spread(logits)
        return widen(logits) / own, own[..., 0]
    if scaling == "standardise":
        logits = standardise(logits)
    return soften(logits, temperature), temperature


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormKD(Method):
    """Σ_k keep_k w_k² KL(softmax(t_k/w_k) || softmax(s/w_s)), w = T times the std of the logits.

    Each network has a w of its own for each example, and the gradient passes through the
    student's. Where all logits of an example are equal, which makes the authors' code NaN, their
    deviation counts as 1.

    Args:
      temperature: T > 0.

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Chi et al., NormKD, 2308.00520, with 0.1 of the cross-entropy and 0.9 of this. `dkd` has it as
      the option scaling="norm".
    """

    temperature: float = 2.0

    teaches_itself: ClassVar[bool] = False
    least_classes: ClassVar[int] = 3

    def __post_init__(self) -> None:
        above_zero("normkd", temperature=self.temperature)

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"normkd"}."""
        own, _ = rescale(context.student.logits, self.temperature, "norm")

        def divergence(k: int, teacher: Outputs) -> Array:
            theirs, width = rescale(teacher.logits, self.temperature, "norm")
            return jnp.square(width) * kl_divergence(theirs, own, 1.0)

        return {"normkd": Term(context.over_teachers(divergence))}, variables
