"""Other comparisons of logits than the KL: DIST, MSE, transformed teachers."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from distill_jax.methods.base import Context, Method, Shapes, Term
from distill_jax.methods.losses import bounded_square, kl_of_logs, soften, widen
from distill_jax.methods.ranges import above_zero, not_negative
from distill_jax.models import Outputs


def correlation(x: Array, y: Array) -> Array:
    """Pearson's correlation of each row (N, M) -> (N,); 0 where a row is constant."""
    x, y = (z - jnp.mean(z, -1, keepdims=True) for z in (x, y))
    return jnp.sum(x * y, -1) / (_norm(x) * _norm(y) + 1e-8)


def _norm(x: Array) -> Array:
    """The length of each row, with gradient 0 at 0."""
    squares = jnp.sum(jnp.square(x), -1)
    some = squares > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1.0)), 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DIST(Method):
    """T² Σ_k keep_k (β (1 - mean ρ of the rows) + γ (1 - mean ρ of the columns)).

    Rows are the examples and columns the classes of the whole batch's softmax(s/T) and
    softmax(t_k/T), and ρ is Pearson's correlation with 1e-8 added to its divisor. The part of the
    columns depends on the batch size.

    Args:
      temperature: T > 0; 1 for ImageNet.
      beta: β, of the rows ("inter-class").
      gamma: γ, of the columns ("intra-class").

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022, 2205.10536, with
      the weight 2 beside the whole cross-entropy.
    """

    temperature: float = 4.0
    beta: float = 1.0
    gamma: float = 1.0

    teaches_itself: ClassVar[bool] = False

    def __post_init__(self) -> None:
        above_zero("dist", temperature=self.temperature)
        not_negative("dist", beta=self.beta, gamma=self.gamma)

    @property
    def least_classes(self) -> int:  # type: ignore[override]
        """3 of rows alone: two probabilities correlate by 1 or -1."""
        return 1 if self.gamma else 3

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where a batch has no two examples to compare."""
        size = shapes.student.logits.shape[0]
        if self.gamma and size < 2:
            raise ValueError(
                f"dist compares the examples of a batch: its size is {size}, expected 2 or more "
                "or gamma 0"
            )

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"dist_inter", "dist_intra"}: per example, and of the whole batch."""
        own = jax.nn.softmax(soften(context.student.logits, self.temperature))
        own_all = context.whole_batch(own)

        def softened(teacher: Outputs) -> Array:
            return jax.nn.softmax(soften(teacher.logits, self.temperature))

        def inter(k: int, teacher: Outputs) -> Array:
            return 1 - correlation(own, softened(teacher))

        def intra(k: int, teacher: Outputs) -> Array:
            theirs = context.whole_batch(softened(teacher))
            return 1 - jnp.mean(correlation(own_all.T, theirs.T))

        square = self.temperature**2
        return {
            "dist_inter": Term(context.over_teachers(inter), self.beta * square),
            "dist_intra": Term(context.over_teachers(intra), self.gamma * square),
        }, variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class MSELogits(Method):
    """Σ_k keep_k mean (t_k - s)² over the classes.

    References:
      Kim et al., Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge
      Distillation, IJCAI 2021, 2105.08919, whose code trains with it alone: {"mse_logits": 1, "ce":
      0}.
    """

    teaches_itself: ClassVar[bool] = False

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"mse_logits"}."""
        own = widen(context.student.logits)

        def distance(k: int, teacher: Outputs) -> Array:
            return jnp.mean(bounded_square(widen(teacher.logits) - own), -1)

        return {"mse_logits": Term(context.over_teachers(distance))}, variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class WTTM(Method):
    """Σ_k keep_k U_k KL(p_k || softmax(s)), p_k = softmax(γ t_k), U_k = Σ_c softmax(t_k)_c^γ.

    The student has no temperature. U weighs examples: it is large where the teacher's smoothed
    distribution is flat.

    Args:
      gamma: γ > 0, the exponent: one over the teacher's temperature.
      weighted: by U; without it this is TTM.

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Zheng & Yang, Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024,
      2402.11148, with a weight of about 4 for 100 classes, 45 without U, beside the whole
      cross-entropy.
    """

    gamma: float = 0.2
    weighted: bool = True

    teaches_itself: ClassVar[bool] = False

    def __post_init__(self) -> None:
        above_zero("wttm", gamma=self.gamma)
        if not isinstance(self.weighted, bool):
            raise ValueError(f"wttm's weighted is True or False, got {self.weighted!r}")

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"wttm"}."""
        own = jax.nn.log_softmax(widen(context.student.logits))

        def divergence(k: int, teacher: Outputs) -> Array:
            powers = self.gamma * jax.nn.log_softmax(widen(teacher.logits))
            kl = kl_of_logs(jax.nn.log_softmax(powers), own)
            return jnp.sum(jnp.exp(powers), -1) * kl if self.weighted else kl

        return {"wttm": Term(context.over_teachers(divergence))}, variables
