"""TESKD: a backbone and the student branches that share its stages teach each other."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from distill_jax.methods.base import Context, Shapes, Term
from distill_jax.methods.exits import OwnExits, check_branches, exits_of
from distill_jax.methods.losses import bounded_square, kl_of_raised, widen
from distill_jax.models import Outputs


@dataclasses.dataclass(frozen=True)
class TESKD(OwnExits):
    """Student helping teacher: the loss of a backbone and its branches.

    L = a Σ_i w_i CE(s_i) + b T² Σ_{i>0} w_i KL(softmax(t/T) + 1e-7 || softmax(s_i/T))
      + c Σ_{i>0} w_i Σ_channels (f_i - sg f_t)² [f_i > 0 or f_t > 0], with t = s_0 and w_0 = 1,
    where number 0 is the backbone and the others are its branches, deepest first.

    The KL's gradient reaches the backbone through t (unless detached), the feature term's does
    not. The target is not renormalised after 1e-7 is added.

    Args:
      temperature: T of the softened distributions; 4, and 3 in the authors' first release.
      ce_weight: a, of the cross-entropies of all exits.
      kd_weight: b, of the KL from the backbone to each branch.
      feature_weight: c, of the feature term.
      detach_target: stop the KL's gradient at the backbone, so that branches only learn from it.
      branch_weights: w_i, one factor for each branch on its three terms; empty for ones.
      feature_reduction: "sum" over the batch, as the authors' code does, so that the term grows
        with the batch size; or "mean" over it.

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Student Helping Teacher, arXiv 2110.00329, and its authors' code.
    """

    temperature: float = 4.0
    ce_weight: float = 0.2
    kd_weight: float = 0.8
    feature_weight: float = 1e-7
    detach_target: bool = False
    branch_weights: tuple[float, ...] = ()
    feature_reduction: str = "sum"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature is a number above 0, got {self.temperature}")
        for name in ("ce_weight", "kd_weight", "feature_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} is a number of 0 or more, got {getattr(self, name)}")
        if any(not (math.isfinite(weight) and weight >= 0) for weight in self.branch_weights):
            raise ValueError(f"branch_weights are numbers of 0 or more, got {self.branch_weights}")
        if self.feature_reduction not in ("sum", "mean"):
            raise ValueError(
                f"feature_reduction is one of ('sum', 'mean'), got {self.feature_reduction!r}"
            )

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where there are no branches, or not as many as `branch_weights`."""
        check_branches("teskd", shapes)
        branches = len(shapes.student.branches)
        if len(self.branch_weights) not in (0, branches):
            raise ValueError(
                f"the network has {branches} branches, branch_weights gives {self.branch_weights}"
            )

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"teskd_ce", "teskd_kl", "teskd_feature"}, each summed over the exits."""
        exits = exits_of(context.student)
        given = self.branch_weights or (1.0,) * (len(exits) - 1)
        weights = jnp.asarray(given, context.student.logits.dtype)
        values = self._values(exits, context, weights[:, None])
        size = context.batch_size if self.feature_reduction == "sum" else 1
        return {
            "teskd_ce": Term(values[0], self.ce_weight),
            "teskd_kl": Term(values[1], self.kd_weight),
            # The mean over the batch times its size is the sum over all devices.
            "teskd_feature": Term(values[2] * size, self.feature_weight),
        }, variables

    def _values(
        self, exits: tuple[Outputs, ...], context: Context, weights: Array
    ) -> tuple[Array, Array, Array]:
        """(B,) each: cross-entropy, KL with its T², squared distance of features."""
        logits = jnp.stack([exit.logits for exit in exits])
        features = jnp.stack([exit.feature for exit in exits])
        ce = context.cross_entropy(logits)
        target = lax.stop_gradient(logits[:1]) if self.detach_target else logits[:1]
        kl = self.temperature**2 * kl_of_raised(target, logits[1:], self.temperature)
        theirs, own = widen(features[1:]), lax.stop_gradient(widen(features[:1]))
        distance = jnp.where((theirs > 0) | (own > 0), bounded_square(theirs - own), 0.0).sum(-1)
        return (
            ce[0] + jnp.sum(weights * ce[1:], 0),
            jnp.sum(weights * kl, 0),
            jnp.sum(weights * distance, 0),
        )
