"""Be your own teacher: the deepest exit of a network teaches the others."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from distill_jax.methods import adapters, ranges
from distill_jax.methods.base import Context, Shapes, Term
from distill_jax.methods.exits import (
    OwnExits,
    check_branches,
    check_equal_vectors,
    exits_of,
    logits_of,
)
from distill_jax.methods.features import check_vectors
from distill_jax.methods.losses import bounded_square, soften, widen
from distill_jax.models.zoo.layers import Linear

FORMS = {"journal": (0.3, 0.03), "conference": (0.1, 1e-6)}  # kd_weight, feature_weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class BYOT(OwnExits):
    """A network teaches its branches, in each of which it sees itself at an earlier stage.

    With 0 the network, i its branches from the deepest on, S_i = -Σ softmax(sg z_0/T)
    log softmax(z_i/T), f the vectors before the classifiers, a = kd_weight, b = feature_weight:

      journal     CE_0 + Σ_i ((1-a) CE_i + a S_i) + b Σ_{i>1} ‖W_i f_i - sg f_0‖
      conference  (1-a) (CE_0 + Σ_i CE_i) + a T² Σ_i S_i
                  + b Σ_i Σ (f_i - sg f_0)² [f_i > 0 or f_0 > 0]

    The norm and the last sum are over all examples and channels: they grow with the batch. W_i, a
    layer with a bias, is trained with the network. As in its code the journal's form leaves out the
    vector of the deepest branch, and has no T².

    Args:
      form: "journal", as the first author's later code has it, or "conference", as a
        reimplementation of the paper does.
      temperature: T > 0.
      kd_weight: a; by default 0.3, and 0.1 of the conference's form.
      feature_weight: b; by default 0.03, and 1e-6 of the conference's form.

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Zhang et al., Be Your Own Teacher, ICCV 2019, 1905.08094.
    """

    form: str = "journal"
    temperature: float = 3.0
    kd_weight: float | None = None
    feature_weight: float | None = None

    def __post_init__(self) -> None:
        ranges.one_of("byot", FORMS, form=self.form)
        ranges.above_zero("byot", temperature=self.temperature)
        ranges.share("byot", kd_weight=self.weights[0])
        ranges.not_negative("byot", feature_weight=self.weights[1])

    @property
    def weights(self) -> tuple[float, float]:
        """(a, b), those of the form where they are not given."""
        given, usual = (self.kd_weight, self.feature_weight), FORMS[self.form]
        kd, feature = (b if a is None else a for a, b in zip(given, usual, strict=True))
        return kd, feature

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where there are no branches, or vectors that cannot be compared."""
        check_branches("byot", shapes)
        if self.form == "conference":
            check_equal_vectors("byot", exits_of(shapes.student))
        else:
            check_vectors("byot", shapes._replace(teachers=shapes.student.branches))

    def init(self, key: Array, shapes: Shapes) -> dict[str, Any]:
        """{"params": {"2": of the second deepest branch, ...}}, the layers W of the journal."""
        student = shapes.student
        if self.form == "conference" or len(student.branches) < 2:
            return {}
        layer = Linear(student.feature.shape[-1])
        return adapters.by_kind(
            {
                str(i): adapters.drawn(jax.random.fold_in(key, i), layer, branch.feature.shape[1:])
                for i, branch in enumerate(student.branches[1:], 2)
            }
        )

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"byot_ce", "byot_branches_ce", "byot_kd", "byot_feature"}."""
        logits = logits_of(exits_of(context.student))
        (kd, feature), journal = self.weights, self.form == "journal"
        ce = context.cross_entropy(logits)
        targets = jax.nn.softmax(soften(lax.stop_gradient(logits[:1]), self.temperature))
        log_probs = jax.nn.log_softmax(soften(logits[1:], self.temperature))
        soft = -jnp.sum(targets * log_probs, (0, -1))
        compare = self._norms if journal else self._squares
        return {
            "byot_ce": Term(ce[0], 1.0 if journal else 1 - kd),
            "byot_branches_ce": Term(jnp.sum(ce[1:], 0), 1 - kd),
            "byot_kd": Term(soft, kd if journal else kd * self.temperature**2),
            "byot_feature": Term(compare(variables, context), feature),
        }, variables

    def _norms(self, variables: dict[str, Any], context: Context) -> Array:
        """() of the whole batch, in the journal's form."""
        own = lax.stop_gradient(widen(context.student.feature))
        norms = [jnp.zeros(())]
        for i, branch in enumerate(context.student.branches[1:], 2):
            layer, given = Linear(own.shape[-1]), adapters.of_module(variables, str(i))
            adapted, _ = adapters.applied(layer, given, branch.feature, context)
            squares = context.whole_batch(jnp.sum(bounded_square(adapted - own), -1))
            total = jnp.sum(squares)
            # The root of zero has no gradient that is finite.
            norms.append(jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1.0)), 0.0))
        return jnp.sum(jnp.stack(norms))

    def _squares(self, variables: dict[str, Any], context: Context) -> Array:
        """(B,) whose mean is the sum over the whole batch, in the conference's form."""
        theirs = widen(jnp.stack([branch.feature for branch in context.student.branches]))
        own = lax.stop_gradient(widen(context.student.feature))[None]
        gap = jnp.where((theirs > 0) | (own > 0), bounded_square(theirs - own), 0.0)
        return jnp.sum(gap, (0, -1)) * context.batch_size
