"""Targets made of the labels, and teachers that are the student itself: label smoothing, Tf-KD."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from distill_jax.methods.base import Context, Method, Term
from distill_jax.methods.losses import kl_divergence, kl_of_logs, widen
from distill_jax.methods.ranges import above_zero, not_negative, one_of, share
from distill_jax.models import Outputs

OVER = ("all", "others")


def label_and_others(labels: Array, classes: int, own: float, dtype: Any) -> Array:
    """(B, C): `own` at the label, and what is left to 1 spread over the other classes."""
    at_label = jax.nn.one_hot(labels, classes, dtype=bool)
    return jnp.where(at_label, own, (1 - own) / (classes - 1)).astype(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelSmoothing(Method):
    """-Σ_c u_c log softmax(s)_c, where u takes ε from the label and spreads it over the classes.

    It stands in the place of the cross-entropy, with teachers or without. A recipe's own
    `label_smoothing` is this over all classes, of whatever cross-entropy there is.

    Args:
      smoothing: ε in [0, 1].
      over: "all" classes, the label's too, or the "others" alone, as in the code of Tf-KD.

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Szegedy et al., Rethinking the Inception Architecture for Computer Vision, CVPR 2016,
      1512.00567, section 7.
    """

    smoothing: float = 0.1
    over: str = "all"

    needs: ClassVar[tuple[str, ...]] = ()
    taught: ClassVar[bool] = False
    replaces_ce: ClassVar[bool] = True
    mixes_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        share("label_smoothing", smoothing=self.smoothing)
        one_of("label_smoothing", OVER, over=self.over)

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"label_smoothing"}."""
        log_probs = jax.nn.log_softmax(widen(context.student.logits))
        classes, own = log_probs.shape[-1], 1 - self.smoothing
        if self.over == "all":
            own += self.smoothing / classes
        targets = context.over_labels(
            lambda labels: label_and_others(labels, classes, own, log_probs.dtype)
        )
        return {"label_smoothing": Term(-jnp.sum(targets * log_probs, -1))}, variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfKDReg(Method):
    """(1-α) CE + α m / C KL(softmax(u/T) || softmax(s)), where u has `correct` at the label.

    u, which spreads the rest over the other classes, is a teacher without a network. The
    temperature divides its probabilities, not logits. It stands in the place of the cross-entropy,
    with teachers or without. The authors' code divides by the number C of classes, which m undoes.

    Args:
      temperature: T > 0.
      alpha: α in [0, 1].
      multiplier: m.
      correct: the label's probability, in [0, 1].

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Yuan et al., Revisiting Knowledge Distillation via Label Smoothing Regularization, CVPR 2020,
      1909.11723; the numbers are those of its ResNet18.
    """

    temperature: float = 20.0
    alpha: float = 0.1
    multiplier: float = 100.0
    correct: float = 0.99

    needs: ClassVar[tuple[str, ...]] = ()
    taught: ClassVar[bool] = False
    replaces_ce: ClassVar[bool] = True
    mixes_labels: ClassVar[bool] = True
    takes_label_smoothing: ClassVar[bool] = True

    def __post_init__(self) -> None:
        above_zero("tfkd_reg", temperature=self.temperature)
        not_negative("tfkd_reg", multiplier=self.multiplier)
        share("tfkd_reg", alpha=self.alpha, correct=self.correct)

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"tfkd_reg_ce", "tfkd_reg"}."""
        log_probs = jax.nn.log_softmax(widen(context.student.logits))
        classes = log_probs.shape[-1]

        def divergence(labels: Array) -> Array:
            virtual = label_and_others(labels, classes, self.correct, log_probs.dtype)
            return kl_of_logs(jax.nn.log_softmax(virtual / self.temperature), log_probs)

        kl = context.over_labels(divergence)
        ce = context.cross_entropy(context.student.logits)
        return {
            "tfkd_reg_ce": Term(ce, 1 - self.alpha),
            "tfkd_reg": Term(kl, self.alpha * self.multiplier / classes),
        }, variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfKDSelf(Method):
    """(1-α) CE + α m T² / C Σ_k keep_k KL(softmax(t_k/T) || softmax(s/T)).

    Its teacher is the student's architecture, trained before: networks "plane2, plane2#2" with the
    guidance "direct". It stands in the place of the cross-entropy, which counts 1 in a mini-batch
    without teachers. The authors' code divides by the number C of classes, which m undoes.

    Args:
      temperature: T > 0.
      alpha: α in [0, 1].
      multiplier: m.

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Yuan et al., Revisiting Knowledge Distillation via Label Smoothing Regularization, CVPR 2020,
      1909.11723; the numbers are those of its ResNet18.
    """

    temperature: float = 6.0
    alpha: float = 0.95
    multiplier: float = 50.0

    replaces_ce: ClassVar[bool] = True
    mixes_labels: ClassVar[bool] = True
    takes_label_smoothing: ClassVar[bool] = True
    teaches_itself: ClassVar[bool] = False

    def __post_init__(self) -> None:
        above_zero("tfkd_self", temperature=self.temperature)
        not_negative("tfkd_self", multiplier=self.multiplier)
        share("tfkd_self", alpha=self.alpha)

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"tfkd_self_ce", "tfkd_self"}."""
        logits = context.student.logits

        def divergence(k: int, teacher: Outputs) -> Array:
            return kl_divergence(teacher.logits, logits, self.temperature)

        weight = self.alpha * self.multiplier * self.temperature**2 / logits.shape[-1]
        of_ce = jnp.where(jnp.any(context.teacher_mask), 1 - self.alpha, 1.0)
        return {
            "tfkd_self_ce": Term(context.cross_entropy(logits), of_ce),
            "tfkd_self": Term(context.over_teachers(divergence), weight),
        }, variables
