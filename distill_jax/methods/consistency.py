"""A network taught by what it makes of other inputs: CS-KD, DDGSD."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import lax

from distill_jax.methods.base import Context, Method, Term
from distill_jax.methods.losses import bounded_square, kl_divergence, widen
from distill_jax.methods.ranges import above_zero, not_negative


@dataclasses.dataclass(frozen=True, kw_only=True)
class CSKD(Method):
    """T² KL(softmax(s'/T) || softmax(s/T)), s' the student on another example of the same class.

    The other example is drawn anew in each epoch, and may be the same one; s' passes no gradient.
    No teacher is needed. The usual weight is 1, and 3 on fine-grained classes.

    Args:
      temperature: T > 0.

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Yun et al., Regularizing Class-wise Predictions via Self-knowledge Distillation, CVPR 2020,
      2003.13964, and its authors' code.
    """

    temperature: float = 4.0

    needs: ClassVar[tuple[str, ...]] = ()
    taught: ClassVar[bool] = False
    data_needs: ClassVar[tuple[str, ...]] = ("partner",)

    def __post_init__(self) -> None:
        above_zero("cs_kd", temperature=self.temperature)

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"cs_kd"}: the KL without T², which is in the weight."""
        assert context.partner is not None
        target = lax.stop_gradient(context.partner.logits)
        value = kl_divergence(target, context.student.logits, self.temperature)
        return {"cs_kd": Term(value, self.temperature**2)}, variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDGSD(Method):
    """CE(b) + λ/C (KL(p_a || p_b) + KL(p_b || p_a)) + μ mean (a - b)², of two views' logits.

    p are at temperature T, without a factor T². a is of the view that the cross-entropy and all
    other methods see, b of another augmentation of the same examples; nothing is detached. No
    teacher is needed. The paper compares mean features of both views in the place of the logits.

    Args:
      temperature: T > 0.
      divergence_weight: λ of 0 or more; C is the number of classes.
      distance_weight: μ of 0 or more.

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Xu and Liu, Data-Distortion Guided Self-Distillation for Deep Neural Networks, AAAI 2019, in
      the unofficial form in which it can be compared.
    """

    temperature: float = 1.0
    divergence_weight: float = 1.0
    distance_weight: float = 5e-4

    needs: ClassVar[tuple[str, ...]] = ()
    taught: ClassVar[bool] = False
    data_needs: ClassVar[tuple[str, ...]] = ("view",)
    mixes_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        above_zero("ddgsd", temperature=self.temperature)
        weights = {name: getattr(self, name) for name in ("divergence_weight", "distance_weight")}
        not_negative("ddgsd", **weights)

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"ddgsd_ce", "ddgsd", "ddgsd_distance"}: of the second view, and of both."""
        assert context.view is not None
        a, b = context.student.logits, context.view.logits
        divergence = kl_divergence(a, b, self.temperature) + kl_divergence(b, a, self.temperature)
        return {
            "ddgsd_ce": Term(context.cross_entropy(b)),
            "ddgsd": Term(divergence, self.divergence_weight / a.shape[-1]),
            "ddgsd_distance": Term(
                jnp.mean(bounded_square(widen(a) - widen(b)), -1), self.distance_weight
            ),
        }, variables
