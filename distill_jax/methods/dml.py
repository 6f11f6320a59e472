"""Networks that learn together: deep mutual learning, collaborative learning."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array, lax

from distill_jax.methods.base import Context, Method, Term
from distill_jax.methods.losses import kl_divergence, kl_of_raised
from distill_jax.methods.ranges import above_zero, share

TARGETS = ("each", "mean_logits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DML(Method):
    """T² times the mean over the other networks j of KL(softmax(z_j/T) || softmax(z_i/T)).

    Args:
      temperature: T > 0.
      targets: "each" other network is one; "mean_logits": the mean of their logits is the only one.
      detached: the others are targets that learn nothing from it, as in the paper. OKDDip's code
        for it lets the gradient through.
      epsilon: added to the targets' probabilities, which then sum to more than 1; OKDDip's code
        has 1e-7.

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Zhang et al., Deep Mutual Learning, CVPR 2018, 1706.00384, eqs. 4 and 8.
    """

    temperature: float = 1.0
    targets: str = "each"
    detached: bool = True  # type: ignore[misc]  # an instance's own
    epsilon: float = 0.0

    edges: ClassVar[str] = "live"
    teaches_itself: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"dml's temperature is a number above 0, got {self.temperature}")
        if self.targets not in TARGETS:
            raise ValueError(f"dml's targets are one of {TARGETS}, got {self.targets!r}")
        if not isinstance(self.detached, bool):
            raise ValueError(f"dml's detached is True or False, got {self.detached!r}")
        if not 0 <= self.epsilon < 1:
            raise ValueError(f"dml's epsilon is at least 0 and below 1, got {self.epsilon}")

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"dml"}: the mean KL without T², which is in the weight."""
        others = context.teacher_logits
        if self.targets == "mean_logits":
            others = jnp.mean(others, 0, keepdims=True)
        value = jnp.mean(self._divergence(others, context.student.logits), 0)
        return {"dml": Term(value, self.temperature**2)}, variables

    def _divergence(self, targets: Array, logits: Array) -> Array:
        """(K, B) KL from the targets (K, B, C) to the student's logits (B, C)."""
        if not self.epsilon:
            return kl_divergence(targets, logits, self.temperature)
        return kl_of_raised(targets, logits, self.temperature, self.epsilon)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KDCL(Method):
    """(1-α) CE + α T² KL(softmax(m/T) || softmax(s/T)), m the mean of all networks' logits.

    Every network of a cycle sees an augmentation of its own of the same examples; its own logits
    are in the mean, which passes no gradient. It stands in the place of the cross-entropy. The
    paper's ways to weigh the networks against each other are others; none of their codes is public.

    Args:
      temperature: T > 0.
      alpha: α in [0, 1].

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Guo et al., Online Knowledge Distillation via Collaborative Learning, CVPR 2020, 2006.04147,
      in the unofficial form in which it can be compared.
    """

    temperature: float = 4.0
    alpha: float = 0.5

    edges: ClassVar[str] = "live"
    teaches_itself: ClassVar[bool] = False
    replaces_ce: ClassVar[bool] = True
    data_needs: ClassVar[tuple[str, ...]] = ("own_view",)
    mixes_labels: ClassVar[bool] = True
    takes_label_smoothing: ClassVar[bool] = True

    def __post_init__(self) -> None:
        above_zero("kdcl", temperature=self.temperature)
        share("kdcl", alpha=self.alpha)

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"kdcl_ce", "kdcl"}: the cross-entropy, and the KL without T²."""
        own = context.student.logits
        mean = jnp.mean(jnp.stack([own, *context.teacher_logits]), 0)
        kl = kl_divergence(lax.stop_gradient(mean), own, self.temperature)
        ce = context.cross_entropy(own)
        return {
            "kdcl_ce": Term(ce, 1 - self.alpha),
            "kdcl": Term(kl, self.alpha * self.temperature**2),
        }, variables
