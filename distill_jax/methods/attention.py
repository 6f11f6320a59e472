"""Where feature maps are active: AT and NST."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from distill_jax.methods import features, ranges
from distill_jax.methods.base import Context, Method, Shapes, Term
from distill_jax.models import Outputs


@dataclasses.dataclass(frozen=True)
class AT(Method):
    """Σ_k keep_k Σ_stages mean (n(mean_c f_s^p) - n(mean_c f_k^p))² over the positions.

    n(x) = x / ‖x‖ of all positions of an example; the larger map is averaged to the size of the
    smaller first. The papers' β of 1000 belongs to this mean; it is the usual weight. A map of
    zeros has an attention of zeros and passes no gradient.

    Args:
      power: p, an even number.

    References:
      Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, 1612.03928, and its
      authors' code, whose mean differs from the paper's sum.
    """

    power: int = 2

    needs: ClassVar[tuple[str, ...]] = ("stages",)

    def __post_init__(self) -> None:
        ranges.counts("at", power=self.power)
        if self.power % 2:
            raise ValueError(f"at's power is an even number, got {self.power}")

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where stages cannot be compared one by one."""
        for teacher in shapes.teachers:
            features.check_maps("at", shapes.student.stages, teacher.stages, size=True)

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"at"}."""

        def gap(own: Array, other: Array) -> Array:
            own, other = features.pool_to_smaller(own, other)
            return attention_gap(own, other, self.power)

        return {"at": Term(_over_stages(context, gap))}, variables


@dataclasses.dataclass(frozen=True)
class NST(Method):
    """Σ_k keep_k Σ_stages (K(t, t) + K(s, s) - 2 K(s, t)), the maximum mean discrepancy.

    K(a, b) = mean_{ij} (n(a_i)·n(b_j))² over the channels i of a and j of b, n(x) = x / ‖x‖ over
    the positions; the larger map is averaged to the size of the smaller first. The usual weight is
    50. A channel of zeros stays so and passes no gradient.

    References:
      Huang and Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer,
      1707.01219, with the polynomial kernel of degree 2.
    """

    needs: ClassVar[tuple[str, ...]] = ("stages",)

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where stages cannot be compared one by one."""
        for teacher in shapes.teachers:
            features.check_maps("nst", shapes.student.stages, teacher.stages, size=True)

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"nst"}."""

        def kernel(one: Array, other: Array) -> Array:
            return jnp.mean(jnp.square(jnp.einsum("bpi,bpj->bij", one, other)), (1, 2))

        def discrepancy(own: Array, other: Array) -> Array:
            own, other = (
                features.unit(x.reshape(len(x), -1, x.shape[-1]), 1)
                for x in features.pool_to_smaller(own, other)
            )
            return kernel(other, other) + kernel(own, own) - 2 * kernel(own, other)

        return {"nst": Term(_over_stages(context, discrepancy))}, variables


def attention_gap(one: Array, other: Array, power: int = 2) -> Array:
    """(B,) the mean square of the difference of two maps' attention, over the positions."""
    return jnp.mean(jnp.square(_attention(one, power) - _attention(other, power)), -1)


def _attention(x: Array, power: int) -> Array:
    return features.unit(jnp.mean(x**power, -1).reshape(len(x), -1))


def _over_stages(context: Context, term: Any) -> Array:
    """Adds up `term(map of the student, map of a teacher)` over stages and kept teachers."""
    own = features.stages(context.student)

    def added(k: int, teacher: Outputs) -> Array:
        values = [term(*pair) for pair in zip(own, features.stages(teacher), strict=True)]
        return sum(values[1:], values[0])

    return context.over_teachers(added)
