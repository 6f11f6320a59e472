"""Several teachers that are weighed against one another: AVER, EBKD, AE-KD."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from distill_jax.methods.base import Context, Method, Term
from distill_jax.methods.losses import kl_divergence, kl_of_logs, soften, widen
from distill_jax.methods.ranges import above_zero, share

_TOLERANCE = 1e-6  # of the optimality of weights, where the gradients' squares add up to 1
_ROUNDS = 1000


def weighted_sum(context: Context, weights: Array, values: Array) -> Array:
    """Σ_k keep_k w_k v_k: (K, B) or (K, 1) weights and (K, B) values -> (B,)."""
    return jnp.sum(jnp.where(context.teacher_mask[:, None], weights * values, 0.0), 0)


def kept(context: Context) -> Array:
    """How many teachers are kept, at least 1."""
    return jnp.maximum(jnp.sum(context.teacher_mask.astype(jnp.float32)), 1.0)


def by_share(context: Context, shares: Array) -> Array:
    """(K, B) the weights 1 - share of the teachers, 1 where one teacher is kept."""
    return jnp.where(kept(context) > 1, 1.0 - shares, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AVER(Method):
    """T² KL(mean_k softmax(t_k/T) || softmax(s/T)), the mean over the kept teachers.

    The mean of their KLs, which is `kd` with loss.teachers="mean", has the same gradient.

    Args:
      temperature: T > 0.

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      You et al., Learning from Multiple Teacher Networks, KDD 2017.
    """

    temperature: float = 4.0

    teaches_itself: ClassVar[bool] = False

    def __post_init__(self) -> None:
        above_zero("aver", temperature=self.temperature)

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"aver"}."""
        theirs = jax.nn.softmax(soften(context.teacher_logits, self.temperature))
        mask = context.teacher_mask[:, None, None]
        targets = jnp.sum(jnp.where(mask, theirs, 0.0), 0) / kept(context)
        some = targets > 0
        log_targets = jnp.where(some, jnp.log(jnp.where(some, targets, 1.0)), -jnp.inf)
        own = jax.nn.log_softmax(soften(context.student.logits, self.temperature))
        return {"aver": Term(kl_of_logs(log_targets, own), self.temperature**2)}, variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class EBKD(Method):
    """T²/K Σ_k w_k KL(softmax(t_k/T) || softmax(s/T)), w_k = 1 - h_k / Σ_j h_j of each example.

    h_k is the entropy of softmax(t_k), and the K teachers are the kept ones. A single teacher has
    the weight 1, where the authors' code has 0. Teachers without any entropy, for which that
    divides 0 by 0, count as equally sure.

    Args:
      temperature: T > 0.

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Kwon et al., Adaptive Knowledge Distillation Based on Entropy, ICASSP 2020, as the code of
      CA-MKD computes it.
    """

    temperature: float = 4.0

    teaches_itself: ClassVar[bool] = False

    def __post_init__(self) -> None:
        above_zero("ebkd", temperature=self.temperature)

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"ebkd"}."""
        logits, mask = context.teacher_logits, context.teacher_mask[:, None]
        log_probs = jax.nn.log_softmax(widen(logits))
        entropies = jnp.where(mask, -jnp.sum(jnp.exp(log_probs) * log_probs, -1), 0.0)
        total = jnp.sum(entropies, 0, keepdims=True)
        shares = jnp.where(
            total > 0, entropies / jnp.where(total > 0, total, 1.0), 1.0 / kept(context)
        )
        kl = kl_divergence(logits, context.student.logits, self.temperature)
        value = weighted_sum(context, by_share(context, shares), kl) / kept(context)
        return {"ebkd": Term(value, self.temperature**2)}, variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class AEKD(Method):
    """T² Σ_k w_k KL(softmax(t_k/T) || softmax(s/T)), w such that no teacher's gradient is opposed.

    w minimises ‖Σ_k w_k g_k‖², where g_k is the gradient of teacher k's KL by the student's logits,
    averaged over the whole batch, with Σ w = 1 and 0 <= w <= C over the kept teachers. The authors'
    code stops at its first guess where gradients are small; here the weights do not depend on their
    scale.

    Args:
      temperature: T > 0.
      limit: C in [0, 1]; where the kept teachers are too few to reach 1 by it, they count equally.
      normalise: find w for each g_k at length 1, then divide it by that length, to the sum 1.

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Du et al., Agree to Disagree: Adaptive Ensemble Knowledge Distillation in Gradient Space,
      NeurIPS 2020, with 0.9 of this beside the whole cross-entropy.
    """

    temperature: float = 4.0
    limit: float = 0.6
    normalise: bool = False

    teaches_itself: ClassVar[bool] = False

    def __post_init__(self) -> None:
        above_zero("ae_kd", temperature=self.temperature)
        share("ae_kd", limit=self.limit)
        if not isinstance(self.normalise, bool):
            raise ValueError(f"ae_kd's normalise is True or False, got {self.normalise!r}")

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"ae_kd"}."""
        own, theirs = context.student.logits, context.teacher_logits
        weights = self.weights(self.gradients(context), context.teacher_mask)[:, None]
        value = weighted_sum(context, weights, kl_divergence(theirs, own, self.temperature))
        return {"ae_kd": Term(value, self.temperature**2)}, variables

    def gradients(self, context: Context) -> Array:
        """(K, C) the gradient of T KL of each teacher by the logits, the mean over the batch."""
        own, theirs = context.student.logits, context.teacher_logits
        gaps = jax.nn.softmax(soften(own[None], self.temperature)) - jax.nn.softmax(
            soften(theirs, self.temperature)
        )
        # The devices' shares are equally large.
        means = context.whole_batch(jnp.mean(gaps, 1)[None])
        return lax.stop_gradient(jnp.mean(means, 0))

    def weights(self, gradients: Array, mask: Array) -> Array:
        """(K,) w of gradients (K, C) of the teachers in the mask (K,)."""
        length = jnp.ones(())
        if self.normalise:
            length = jnp.maximum(jnp.linalg.norm(gradients, axis=-1, keepdims=True), 1e-12)
        weights = smallest_sum(gradients / length, mask, self.limit) / length.reshape(-1)
        whole = jnp.sum(weights)
        # XLA may multiply divisors: a least one would vanish in the product, and 0 / 0 be left.
        return weights / jnp.where(whole > 0, whole, 1.0)


def smallest_sum(vectors: Array, mask: Array, limit: float) -> Array:
    """The weights of the shortest Σ w_k v_k with Σ w = 1 and 0 <= w <= limit.

    Two weights at a time are moved to their best, those that violate optimality the most.

    Args:
      vectors: (K, N).
      mask: (K,) booleans; the others have the weight 0.
      limit: raised to 1 over their number where it is less.

    Returns:
      (K,) weights.
    """
    number = jnp.maximum(jnp.sum(mask.astype(vectors.dtype)), 1.0)
    upper = jnp.where(mask, jnp.maximum(limit, 1.0 / number), 0.0)
    # Else the size of what is masked would say how small a gain still counts.
    vectors = jnp.where(mask[:, None], vectors, 0.0)
    products = jnp.dot(vectors, vectors.T, precision=lax.Precision.HIGHEST)
    size = jnp.trace(products)
    products = products / jnp.where(size > 0, size, 1.0)

    def pair(weights: Array) -> tuple[Array, Array, Array]:
        """The weight to raise, the one to lower, and how much that gains."""
        slopes = jnp.dot(products, weights, precision=lax.Precision.HIGHEST)
        up = jnp.argmin(jnp.where(weights < upper, slopes, jnp.inf))
        down = jnp.argmax(jnp.where(weights > 0, slopes, -jnp.inf))
        return up, down, slopes[down] - slopes[up]

    def improve(state: tuple[Array, Array]) -> tuple[Array, Array]:
        weights, rounds = state
        up, down, gain = pair(weights)
        curve = products[up, up] + products[down, down] - 2 * products[up, down]
        most = jnp.minimum(upper[up] - weights[up], weights[down])
        step = jnp.minimum(gain / jnp.maximum(curve, jnp.finfo(curve.dtype).tiny), most)
        return weights.at[up].add(step).at[down].add(-step), rounds + 1

    def unfinished(state: tuple[Array, Array]) -> Array:
        weights, rounds = state
        room = jnp.any(weights < upper) & jnp.any(weights > 0)
        return room & (pair(weights)[2] > _TOLERANCE) & (rounds < _ROUNDS)

    first = jnp.where(mask, 1.0 / number, 0.0).astype(vectors.dtype)
    return lax.while_loop(unfinished, improve, (first, jnp.zeros((), jnp.int32)))[0]
