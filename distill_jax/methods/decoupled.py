"""The label's class and the others apart: DKD, NKD."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from distill_jax.methods.base import Context, Method, Term
from distill_jax.methods.losses import kl_of_logs, widen
from distill_jax.methods.ranges import above_zero, not_negative, one_of
from distill_jax.methods.scaling import SCALINGS, rescale
from distill_jax.models import Outputs

_NEVER = -1e30  # the logarithm of a probability that is 0


def decouple(logits: Array, labels: Array) -> tuple[Array, Array]:
    """The label's class against the others, and these among themselves.

    Args:
      logits: (B, C), already softened.
      labels: (B,).

    Returns:
      (B,) the logarithm of p_y / (1 - p_y), and (B, C) the logarithms of the probabilities without
      the label's class, which never occurs.
    """
    logits = widen(logits)
    own = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    shift = jnp.max(jnp.where(own, -jnp.inf, logits), -1, keepdims=True)
    logits = logits - lax.stop_gradient(shift)
    others = jnp.where(own, _NEVER, logits)
    rest = jax.nn.logsumexp(others, -1)
    return jnp.sum(jnp.where(own, logits, 0.0), -1) - rest, others - rest[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DKD(Method):
    """T² Σ_k keep_k (α KL(b(t_k) || b(s)) + β KL(o(t_k) || o(s))) at temperature T.

    b is the pair of probabilities of the label's class and of all others, o the distribution over
    the others alone. Both come from the logits without a probability being subtracted or lost, so
    that the first part has a gradient for students that are sure of the label, where the authors'
    code rounds to log 0.

    Args:
      temperature: T > 0.
      alpha: α, of the label's class.
      beta: β, of the others; 8 for ResNet 32x4 -> 8x4, 6 for WRN and VGG, 2 for ResNet 56 -> 20.
      warmup_epochs: over which the weight grows linearly to 1, epochs counted from 1; 0 for none.
      scaling: of the logits before: "none", "standardise" (Logit Standardization, which has T = 2,
        α = 9 and β = 72) or "norm" (NormKD, T = 2), where T² is that of each teacher and example.

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Zhao et al., Decoupled Knowledge Distillation, CVPR 2022, 2203.08679, beside the whole
      cross-entropy.
    """

    temperature: float = 4.0
    alpha: float = 1.0
    beta: float = 8.0
    warmup_epochs: float = 20.0
    scaling: str = "none"

    teaches_itself: ClassVar[bool] = False

    def __post_init__(self) -> None:
        above_zero("dkd", temperature=self.temperature)
        not_negative("dkd", alpha=self.alpha, beta=self.beta, warmup_epochs=self.warmup_epochs)
        one_of("dkd", SCALINGS, scaling=self.scaling)

    @property
    def least_classes(self) -> int:  # type: ignore[override]
        """3 of scaled logits."""
        return 1 if self.scaling == "none" else 3

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"tckd", "nckd"}: the label's class and the others, each with its T²."""

        def parts(logits: Array) -> tuple[Array, Array, Array | float]:
            scaled, temperature = rescale(logits, self.temperature, self.scaling)
            odds, others = decouple(scaled, context.labels)
            both = jnp.stack([jax.nn.log_sigmoid(odds), jax.nn.log_sigmoid(-odds)], -1)
            return both, others, temperature

        own, own_others, _ = parts(context.student.logits)

        def divergences(k: int, teacher: Outputs) -> Array:
            both, others, temperature = parts(teacher.logits)
            kl = kl_of_logs(both, own), kl_of_logs(others, own_others)
            return jnp.stack([temperature**2 * value for value in kl])

        tckd, nckd = context.over_teachers(divergences)
        # The weight rises by epochs: it is constant within one.
        warm = jnp.minimum((jnp.floor(context.epoch) + 1) / max(self.warmup_epochs, 1.0), 1.0)
        return {
            "tckd": Term(tckd, self.alpha * warm),
            "nckd": Term(nckd, self.beta * warm),
        }, variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class NKD(Method):
    """-Σ_k keep_k (p_y(t_k) log p_y(s) + γ T² Σ_{c≠y} o_c(t_k) log o_c(s)).

    p_y is the label's probability at temperature 1, o the distribution over the other classes at T.
    These are cross-entropies: their lowest value is not 0.

    Args:
      temperature: T > 0.
      gamma: γ, of the other classes.

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Yang et al., From Knowledge Distillation to Self-Knowledge Distillation, ICCV 2023,
      2303.13005, beside the whole cross-entropy.
    """

    temperature: float = 1.0
    gamma: float = 1.5

    teaches_itself: ClassVar[bool] = False

    def __post_init__(self) -> None:
        above_zero("nkd", temperature=self.temperature)
        not_negative("nkd", gamma=self.gamma)

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"nkd_label", "nkd_others"}."""

        def parts(logits: Array) -> tuple[Array, Array]:
            softened, _ = rescale(logits, self.temperature)
            odds, _ = decouple(logits, context.labels)
            return odds, decouple(softened, context.labels)[1]

        own, own_others = parts(context.student.logits)

        def entropies(k: int, teacher: Outputs) -> Array:
            odds, others = parts(teacher.logits)
            label = jax.nn.sigmoid(odds) * jax.nn.log_sigmoid(own)
            return -jnp.stack([label, jnp.sum(jnp.exp(others) * own_others, -1)])

        label, others = context.over_teachers(entropies)
        weight = self.gamma * self.temperature**2
        return {"nkd_label": Term(label), "nkd_others": Term(others, weight)}, variables
