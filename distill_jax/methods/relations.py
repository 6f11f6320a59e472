"""Relations of the examples of a batch among each other: PKT, SP, RKD."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import optax
from jax import Array

from distill_jax.methods import features, ranges
from distill_jax.methods.base import Context, Method, Shapes, Term
from distill_jax.models import Outputs
from distill_jax.models.basics import at_least_float32


@dataclasses.dataclass(frozen=True)
class PKT(Method):
    """Σ_k keep_k mean_{ij} P_k[ij] log((P_k[ij] + ε) / (P_s[ij] + ε)).

    P[ij] = (1 + cos(x_i, x_j)) / Σ_j (1 + cos(x_i, x_j)), of the vectors x before the classifier;
    a length counts as itself plus ε.

    The mean is over all pairs, an example with itself included, and therefore small: the usual
    weight is 30000. A vector of zeros has a cosine of 0 and passes no gradient, where the authors'
    code has one that is not a number.

    Args:
      epsilon: ε.

    References:
      Passalis and Tefas, Probabilistic Knowledge Transfer, ECCV 2018, 1803.10837.
    """

    epsilon: float = 1e-7

    needs: ClassVar[tuple[str, ...]] = ("feature",)

    def __post_init__(self) -> None:
        ranges.above_zero("pkt", epsilon=self.epsilon)

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where a network shows no vector."""
        features.check_vectors("pkt", shapes)

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"pkt"}."""
        own = self._probabilities(context, context.student)

        def divergence(k: int, teacher: Outputs) -> Array:
            targets = self._probabilities(context, teacher)
            ratio = (targets + self.epsilon) / (own + self.epsilon)
            return jnp.mean(targets * jnp.log(ratio), -1)

        return {"pkt": Term(context.over_teachers(divergence))}, variables

    def _probabilities(self, context: Context, outputs: Outputs) -> Array:
        """(B of this device, B of all)."""
        x = features.vector(outputs)
        squares = jnp.sum(jnp.square(x), -1, keepdims=True)
        length = jnp.sqrt(jnp.where(squares > 0, squares, 1.0)) + self.epsilon
        x = jnp.where(squares > 0, x / length, 0.0)
        # Rounding may bring a cosine below -1.
        alike = jnp.maximum(x @ context.whole_batch(x).T + 1, 0.0) / 2
        return alike / jnp.sum(alike, -1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class SP(Method):
    """Σ_k keep_k ‖G_k - G_s‖²_F / B², with the rows of F Fᵀ at unit length as G.

    F is the last stage's map, an example a row. The usual weight is 3000. An example of zeros
    passes no gradient, where the field's code divides by 1e-12.

    References:
      Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019, 1907.09682.
    """

    needs: ClassVar[tuple[str, ...]] = ("stages",)

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where a network has no stages."""
        features.check_stages("sp", shapes)

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"sp"}."""

        def similarities(outputs: Outputs) -> Array:
            x = at_least_float32(outputs.stages[-1]).reshape(len(outputs.stages[-1]), -1)
            return features.unit(x @ context.whole_batch(x).T)

        own = similarities(context.student)

        def gap(k: int, teacher: Outputs) -> Array:
            return jnp.mean(jnp.square(similarities(teacher) - own), -1)

        return {"sp": Term(context.over_teachers(gap))}, variables


@dataclasses.dataclass(frozen=True)
class RKD(Method):
    """Σ_k keep_k (w_d mean_{ij} h(d_s[ij] - d_k[ij]) + w_a mean_{ijl} h(a_s[ijl] - a_k[ijl])).

    Of the vectors x before the classifier: d[ij] = ‖x_i - x_j‖ over its mean of i ≠ j, and a[ijl]
    the cosine of the angle at x_i between x_j and x_l; h is Huber's loss with δ = 1. The means are
    over all pairs and triples, so that memory grows with the cube of the batch. Its usual weight is
    1. Vectors that coincide have the distance 1e-6,
    the cosine 0 and no gradient, where the field's code has one of 1e10.

    Args:
      distance_weight: w_d.
      angle_weight: w_a.

    References:
      Park et al., Relational Knowledge Distillation, CVPR 2019, 1904.05068.
    """

    distance_weight: float = 25.0
    angle_weight: float = 50.0

    needs: ClassVar[tuple[str, ...]] = ("feature",)

    def __post_init__(self) -> None:
        ranges.not_negative(
            "rkd", distance_weight=self.distance_weight, angle_weight=self.angle_weight
        )

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where a network shows no vector, or a batch has one example."""
        features.check_vectors("rkd", shapes)
        features.check_two_examples("rkd", shapes)

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"rkd"}."""
        distances, angles = _relations(context, context.student)

        def gap(k: int, teacher: Outputs) -> Array:
            theirs = _relations(context, teacher)
            by_distance = jnp.mean(optax.huber_loss(distances, theirs[0]), -1)
            by_angle = jnp.mean(optax.huber_loss(angles, theirs[1]), (-2, -1))
            return self.distance_weight * by_distance + self.angle_weight * by_angle

        return {"rkd": Term(context.over_teachers(gap))}, variables


def _relations(context: Context, outputs: Outputs) -> tuple[Array, Array]:
    """Distances over their mean (b, B), cosines of angles (b, B, B); b of this device, B of all."""
    x = features.vector(outputs)
    whole = context.whole_batch(x)
    apart = whole[None] - x[:, None]
    squares = jnp.sum(jnp.square(apart), -1)
    itself = features.own_places(context)[:, None] == jnp.arange(len(whole))[None]
    distances = jnp.where(itself, 0.0, jnp.sqrt(jnp.maximum(squares, 1e-12)))
    pairs = max(len(whole) * (len(whole) - 1), 1)
    distances = distances / (jnp.sum(context.whole_batch(distances)) / pairs)
    directions = features.unit(apart)
    return distances, jnp.einsum("ijd,ild->ijl", directions, directions)
