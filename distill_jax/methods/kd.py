"""Cross-entropy with the labels and softened KL to the teachers: KD, TAKD, DGKD.

What papers and authors' codes disagree on is a named option of `LossOptions`:

- `kl_reduction`: "batch_mean" sums the KL over classes (the field's standard); "element_mean"
  divides it by the number of classes C, as the TAKD and DGKD codes do. With "element_mean" a
  distillation weight λ weighs C times less against the cross-entropy.
- `cross_entropy`: "once" counts it once however many teachers there are (DGKD's code);
  "per_teacher" lets each of the K edges bring its own, K (1-λ) CE in all, whatever is dropped
  (DGKD's equation for stochastic teaching); "per_kept_teacher" counts the kept ones alone.
- `teachers`: "sum" adds the teachers' terms (both papers); "mean" divides by their number, so
  that the balance against the cross-entropy does not depend on how many there are.
- `standardise`: takes mean and standard deviation out of each example's logits, of student and
  teachers, before the KL (`scaling.standardise`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from distill_jax.methods.base import Context, Method, Term
from distill_jax.methods.losses import kl_divergence
from distill_jax.methods.scaling import standardise

KL_REDUCTIONS = ("batch_mean", "element_mean")
CROSS_ENTROPY = ("once", "per_teacher", "per_kept_teacher")
TEACHERS = ("sum", "mean")


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """How the terms of the multi-teacher loss are counted; see the module's docstring.

    Raises:
      ValueError: an option that is none of those listed there.
    """

    kl_reduction: str = "batch_mean"
    cross_entropy: str = "once"
    teachers: str = "sum"
    standardise: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("kl_reduction", KL_REDUCTIONS),
            ("cross_entropy", CROSS_ENTROPY),
            ("teachers", TEACHERS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {allowed}, got {getattr(self, name)!r}")
        if not isinstance(self.standardise, bool):
            raise ValueError(f"standardise is True or False, got {self.standardise!r}")


@dataclasses.dataclass(frozen=True)
class CrossEntropy(Method):
    """Cross-entropy with the labels: a term of its own beside those of any method.

    Args:
      balance: how it is counted against the KL of KD, n (1-λ) CE; None gives it the weight 1.
    """

    balance: LossOptions | None = None

    needs: ClassVar[tuple[str, ...]] = ()
    taught: ClassVar[bool] = False
    teaches_itself: ClassVar[bool] = False  # it is balanced against the teachers that KD hears
    mixes_labels: ClassVar[bool] = True

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"ce"}; its weight is n (1-λ) where KD has teachers, else 1."""
        value = context.cross_entropy(context.student.logits)
        weight: Array | float = 1.0
        if self.balance is not None and context.teachers:
            weight = ce_weight(context.teacher_mask, context.hyper.kd_weight, self.balance)
        return {"ce": Term(value, weight)}, variables


@dataclasses.dataclass(frozen=True)
class KD(Method):
    """λ T² r Σ_k keep_k KL(softmax(t_k/T) || softmax(s/T)), of any number of teachers.

    r is 1, or 1/C for "element_mean"; with "mean" it is divided by the number of kept teachers.

    References:
      Hinton et al. 2015, 1503.02531; TAKD, Mirzadeh et al., AAAI 2020, eq. 3; DGKD, Son et al.,
      ICCV 2021, eqs. 4-7.
    """

    options: LossOptions = LossOptions()

    teaches_itself: ClassVar[bool] = False

    @property
    def least_classes(self) -> int:  # type: ignore[override]
        """3 of standardised logits."""
        return 3 if self.options.standardise else 1

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"kl"}: the KL summed over kept teachers, as it is."""
        term = kl_term(
            context.student.logits,
            context.teacher_logits,
            context.teacher_mask,
            temperature=context.hyper.temperature,
            kd_weight=context.hyper.kd_weight,
            options=self.options,
        )
        return {"kl": term}, variables


def ce_weight(teacher_mask: Array, kd_weight: Array | float, options: LossOptions) -> Array | float:
    """The weight n (1-λ) of the cross-entropy beside the KL to teachers.

    n is 1, the number K of teachers, or that of the kept ones; always 1 where the KL is their mean.
    Where no teacher is kept the cross-entropy stands alone with weight 1, but for "per_teacher".
    """
    number = jnp.sum(teacher_mask.astype(jnp.float32))
    balanced = 1.0 - kd_weight
    if options.teachers == "sum" and options.cross_entropy == "per_teacher":
        return len(teacher_mask) * balanced
    if options.teachers == "sum" and options.cross_entropy == "per_kept_teacher":
        balanced = number * balanced
    return jnp.where(number > 0, balanced, 1.0)


def kl_term(
    logits: Array,
    teacher_logits: Array,
    teacher_mask: Array,
    *,
    temperature: Array | float,
    kd_weight: Array | float,
    options: LossOptions = LossOptions(),
) -> Term:
    """The softened KL from every kept teacher to the student.

    Args:
      logits: (B, C) of the student.
      teacher_logits: (K, B, C).
      teacher_mask: (K,) booleans, the teachers of this mini-batch.
      temperature: T > 0.
      kd_weight: λ in [0, 1].
      options: how the terms are counted.
    """
    if options.standardise:
        logits, teacher_logits = standardise(logits), standardise(teacher_logits)
    per_teacher = kl_divergence(teacher_logits, logits, temperature)
    kl = jnp.sum(jnp.where(teacher_mask[:, None], per_teacher, 0.0), 0)
    weight = kd_weight * temperature**2
    if options.kl_reduction == "element_mean":
        weight = weight / logits.shape[-1]
    if options.teachers == "mean":
        weight = weight / jnp.maximum(jnp.sum(teacher_mask.astype(kl.dtype)), 1.0)
    return Term(kl, weight)
