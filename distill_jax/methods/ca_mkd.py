"""Several teachers, each as far as it is right about an example: CA-MKD."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from distill_jax.methods import adapters, features
from distill_jax.methods.base import Context, Method, Shapes, Term
from distill_jax.methods.fitnet import Regressor
from distill_jax.methods.losses import bounded_square, cross_entropy, kl_divergence
from distill_jax.methods.ranges import above_zero, not_negative
from distill_jax.methods.several import by_share, kept, weighted_sum
from distill_jax.models import Outputs
from distill_jax.models.basics import at_least_float32

_FAR = -1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class CAMKD(Method):
    """T²/K Σ_k w_k KL(softmax(t_k/T) || softmax(s/T)) + c/K Σ_k w'_k mean (z_k - f_k)².

    Of each example w_k = (1 - softmax_k CE(t_k, y)) / (K-1), which is large where teacher k is
    right. f_k is the map at the end of its last stage and z_k = ReLU(BN(conv 1×1)) of the
    student's, the larger of the two pooled to the smaller; the student's is passed on from teacher
    to teacher as it was pooled. w'_k is the same of the logits that teacher k's classifier gives
    for z_k, and has a gradient. The K teachers are the kept ones; a single one has the weight 1.

    Args:
      temperature: T > 0.
      feature_weight: c; with 0 logits alone are compared, and nothing is trained for it.
      feature_from: the epochs that go before the features count.

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Zhang et al., Confidence-Aware Multi-Teacher Knowledge Distillation, ICASSP 2022, 2201.00007,
      beside the whole cross-entropy.
    """

    temperature: float = 4.0
    feature_weight: float = 50.0
    feature_from: float = 1.0

    teaches_itself: ClassVar[bool] = False

    def __post_init__(self) -> None:
        above_zero("ca_mkd", temperature=self.temperature)
        weights = {"feature_weight": self.feature_weight, "feature_from": self.feature_from}
        not_negative("ca_mkd", **weights)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The logits; for features also the stages and the classifier."""
        return ("logits", "stages", "head") if self.feature_weight else ("logits",)

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where a map of a teacher's size is none for its classifier."""
        if not self.feature_weight:
            return
        features.check_stages("ca_mkd", shapes)
        for teacher in shapes.teachers:
            features.check_maps("ca_mkd", shapes.student.stages[-1:], teacher.stages[-1:])
            last = teacher.stages[-1].shape[1:]
            taken = () if teacher.feature is None else teacher.feature.shape[1:]
            if taken != last[-1:]:
                raise ValueError(
                    "ca_mkd puts the mean of a map into a teacher's classifier: the teacher's last "
                    f"map is {last}, its classifier takes {taken or 'no vector'}, expected "
                    f"{last[-1:]}; feature_weight 0 leaves it out"
                )

    def init(self, key: Array, shapes: Shapes) -> dict[str, Any]:
        """{"params", "batch_stats"}, each {"0": of the largest teacher, "1": ...}."""
        if not self.feature_weight:
            return {}
        pairs = jax.eval_shape(_pooled_pairs, shapes.student, shapes.teachers)
        return adapters.by_kind(
            {
                str(k): adapters.drawn(
                    jax.random.fold_in(key, k), Regressor(theirs.shape[1:]), own.shape[1:]
                )
                for k, (own, theirs) in enumerate(pairs)
            }
        )

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"ca_mkd"} and, where they have a weight, {"ca_mkd_feature"}."""
        theirs = context.teacher_logits
        kl = kl_divergence(theirs, context.student.logits, self.temperature)
        weights = confidence(context, cross_entropy(theirs, context.labels))
        value = weighted_sum(context, weights, kl) / kept(context)
        terms = {"ca_mkd": Term(value, self.temperature**2)}
        if not self.feature_weight:
            return terms, variables
        wrong, distances, stats = self.compared(variables, context)
        value = weighted_sum(context, confidence(context, wrong), distances) / kept(context)
        weight = jnp.where(context.epoch >= self.feature_from, self.feature_weight, 0.0)
        terms["ca_mkd_feature"] = Term(value, weight)
        return terms, {**variables, "batch_stats": stats}

    def compared(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[Array, Array, dict[str, Any]]:
        """(K, B) CE of z_k's logits, (K, B) mean (z_k - f_k)², and the statistics after it."""
        wrong, distances, stats = [], [], {}
        pairs = _pooled_pairs(context.student, context.teachers)
        for k, (own, target) in enumerate(pairs):
            adapter = adapters.of_module(variables, str(k))
            height, width, channels = target.shape[1:]
            module = Regressor((height, width, channels))
            regressed, stats[str(k)] = adapters.applied(module, adapter, own, context)
            target = at_least_float32(target)
            logits = context.teacher_heads[k](jnp.mean(regressed, (1, 2)))
            wrong.append(cross_entropy(logits, context.labels))
            distances.append(jnp.mean(bounded_square(regressed - target), (1, 2, 3)))
        return jnp.stack(wrong), jnp.stack(distances), stats


def confidence(context: Context, wrong: Array) -> Array:
    """(K, B) the weights of teachers whose cross-entropies are `wrong`, (K, B)."""
    shares = jax.nn.softmax(jnp.where(context.teacher_mask[:, None], wrong, _FAR), 0)
    return by_share(context, shares) / jnp.maximum(kept(context) - 1, 1.0)


def _pooled_pairs(student: Outputs, teachers: tuple[Outputs, ...]) -> list[tuple[Array, Array]]:
    """The last stages' maps of the student and each teacher, of one size."""
    own, pairs = student.stages[-1], []
    for teacher in teachers:
        theirs = teacher.stages[-1]
        own, theirs = features.pool_to_smaller(own, theirs)
        pairs.append((own, theirs))
    return pairs
