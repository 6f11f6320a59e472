"""A temperature that is learnt against the student: CTKD."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from distill_jax.methods.base import Context, Method, Shapes, Term
from distill_jax.methods.losses import kl_divergence
from distill_jax.methods.ranges import above_zero
from distill_jax.models import Outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class CTKD(Method):
    """Σ_k keep_k T² KL(softmax(t_k/T) || softmax(s/T)) with T = start + span · sigmoid(p).

    p, one number that starts at 1, is trained with the student. In epoch e, counted from 1, its
    gradient is multiplied by (cos(π min(e, epochs) / epochs) - 1) / 2, which goes from 0 to -1, so
    that p comes to ascend the loss.

    Args:
      start: the lowest T.
      span: the highest less the lowest.
      epochs: after which the factor is -1.

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Li et al., Curriculum Temperature for Knowledge Distillation, AAAI 2023, 2211.16231, in its
      global form, with 0.1 of the cross-entropy and 0.9 of this.
    """

    start: float = 1.0
    span: float = 20.0
    epochs: float = 10.0

    teaches_itself: ClassVar[bool] = False

    def __post_init__(self) -> None:
        above_zero("ctkd", start=self.start, span=self.span, epochs=self.epochs)

    def init(self, key: Array, shapes: Shapes) -> dict[str, Any]:
        """{"params": {"temperature": (1,)}}, the number p."""
        return {"params": {"temperature": jnp.ones(1)}}

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"ctkd"}: T² is in its value, as p has a gradient through it."""
        temperature = self.temperature(variables["params"]["temperature"], context.epoch)[0]

        def divergence(k: int, teacher: Outputs) -> Array:
            return kl_divergence(teacher.logits, context.student.logits, temperature)

        value = temperature**2 * context.over_teachers(divergence)
        return {"ctkd": Term(value)}, variables

    def temperature(self, p: Array, epoch: Array | float) -> Array:
        """T of the number p, with the gradient of an epoch; the shape of p."""
        fixed = lax.stop_gradient(p)
        factor = self.factor(epoch)
        return self.start + self.span * jax.nn.sigmoid(fixed + factor * (p - fixed))

    def factor(self, epoch: Array | float) -> Array:
        """What the gradient of p is multiplied by, from 0 to -1; `epoch` counts from 0."""
        passed = jnp.minimum(jnp.floor(epoch) + 1, self.epochs) / self.epochs
        return (jnp.cos(jnp.pi * passed) - 1) / 2
