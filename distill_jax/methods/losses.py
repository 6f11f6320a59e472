"""Distillation losses: one number per example, on float32 logits (or wider), no hidden reduction.

What papers and authors' codes disagree on is a named option of `LossOptions`:

- `kl_reduction`: "batch_mean" sums the KL over classes (the field's standard); "element_mean"
  divides it by the number of classes C, as the TAKD and DGKD codes do. With "element_mean" a
  distillation weight λ weighs C times less against the cross-entropy.
- `cross_entropy`: "once" counts it once however many teachers there are (DGKD's code);
  "per_teacher" lets every edge bring its own, K (1-λ) CE in all (DGKD's text).
- `teachers`: "sum" adds the teachers' terms (both papers); "mean" divides by their number, so
  that the balance against the cross-entropy does not depend on the length of the row.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

KL_REDUCTIONS = ("batch_mean", "element_mean")
CROSS_ENTROPY = ("once", "per_teacher")
TEACHERS = ("sum", "mean")
# Far above what any network gives, and far enough below float32's 3.4e38 that the terms of a batch
# over T = 0.01 can be added up.
_FAR, _FAR_SQUARE = 1e32, 1e30


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """How the terms of the multi-teacher loss are counted; see the module's docstring.

    Raises:
      ValueError: an option that is none of those listed there.
    """

    kl_reduction: str = "batch_mean"
    cross_entropy: str = "once"
    teachers: str = "sum"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("kl_reduction", KL_REDUCTIONS),
            ("cross_entropy", CROSS_ENTROPY),
            ("teachers", TEACHERS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {allowed}, got {getattr(self, name)!r}")


# (method, protocol) -> the loss as the paper's text has it, and as the authors' code computes it.
# A chain has one teacher, so that the cross-entropy counts once either way.
PRESETS = {
    ("chain", "standard"): LossOptions(),
    ("chain", "paper"): LossOptions(),
    ("chain", "official"): LossOptions(kl_reduction="element_mean"),
    ("dense", "standard"): LossOptions(),
    ("dense", "paper"): LossOptions(cross_entropy="per_teacher"),
    ("dense", "official"): LossOptions(kl_reduction="element_mean"),
}


def preset(method: str, protocol: str) -> LossOptions:
    """The loss options of "chain" (TAKD) or "dense" (DGKD) by "standard", "paper" or "official".

    Raises:
      ValueError: no such preset.
    """
    if (method, protocol) not in PRESETS:
        known = ", ".join(f"{m}/{p}" for m, p in PRESETS)
        raise ValueError(f"no loss preset {method}/{protocol}; there are {known}")
    return PRESETS[method, protocol]


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Cross-entropy with integer labels, -log softmax(s)[y].

    Args:
      logits: (..., B, C), any float type; computed in float32.
      labels: (B,) integers in [0, C).

    Returns:
      (..., B) float32, in nats.
    """
    log_probs = jax.nn.log_softmax(_wide(logits))
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    one_hot = jnp.broadcast_to(one_hot, log_probs.shape)
    # A masked sum, not a gather: a label out of range gives 0 here instead of another class.
    return -jnp.sum(jnp.where(one_hot, log_probs, 0.0), -1)


def kl_divergence(teacher_logits: Array, logits: Array, temperature: Array | float) -> Array:
    """KL(softmax(t/T) || softmax(s/T)) summed over classes, without the factor T².

    Args:
      teacher_logits: (..., B, C).
      logits: (..., B, C), broadcast against the teacher's.
      temperature: T > 0.

    Returns:
      (..., B) float32, in nats. Zero where a class has no teacher probability (0 log 0 = 0).

    References:
      Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """
    log_targets = jax.nn.log_softmax(_soften(teacher_logits, temperature))
    log_probs = jax.nn.log_softmax(_soften(logits, temperature))
    log_targets, log_probs = jnp.broadcast_arrays(log_targets, log_probs)
    targets = jnp.exp(log_targets)
    # An underflown target has a log of -inf, and 0 * -inf is NaN in the value and in the gradient.
    gap = jnp.where(targets > 0, log_targets - log_probs, 0.0)
    return jnp.sum(targets * gap, -1)


def multi_teacher(
    logits: Array,
    labels: Array,
    teacher_logits: Array,
    keep: Array,
    *,
    temperature: Array | float,
    kd_weight: Array | float,
    options: LossOptions = LossOptions(),
) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy and softened KL to every kept teacher, per example.

    L = n (1-λ) CE + λ T² r Σ_k keep_k KL(softmax(t_k/T) || softmax(s/T)), where n and r follow
    from `options`: n is 1, or the number of kept teachers; r is 1, or 1/C for "element_mean", and
    both are divided by the number of kept teachers for "mean". No teacher kept: L = CE.

    Args:
      logits: (B, C) student logits.
      labels: (B,) integers in [0, C).
      teacher_logits: (K, B, C); K may be 0.
      keep: (K,) booleans, the teachers of this mini-batch.
      temperature: T > 0.
      kd_weight: λ in [0, 1].
      options: how the terms are counted.

    Returns:
      The loss (B,), and its terms (B,): "ce" and "kl" (summed over kept teachers) as they are, and
      "weighted_ce" and "weighted_kl" as they stand in the loss, which is their sum.

    References:
      TAKD, Mirzadeh et al., AAAI 2020, eq. 3; DGKD, Son et al., ICCV 2021, eqs. 4-7.
    """
    ce = cross_entropy(logits, labels)
    if not teacher_logits.shape[0]:
        return ce, {"ce": ce, "weighted_ce": ce}
    kept = keep.astype(ce.dtype)
    number = jnp.sum(kept)
    per_teacher = kl_divergence(teacher_logits, logits, temperature)
    kl = jnp.sum(jnp.where(kept[:, None] > 0, per_teacher, 0.0), 0)
    kd = kl / logits.shape[-1] if options.kl_reduction == "element_mean" else kl
    if options.teachers == "mean":
        kd = kd / jnp.maximum(number, 1.0)
    counted = options.cross_entropy == "per_teacher" and options.teachers == "sum"
    ce_count = number if counted else 1.0
    weighted_ce = jnp.where(number > 0, ce_count * (1.0 - kd_weight), 1.0) * ce
    weighted_kl = kd_weight * temperature**2 * kd
    terms = {"ce": ce, "kl": kl, "weighted_ce": weighted_ce, "weighted_kl": weighted_kl}
    return weighted_ce + weighted_kl, terms


@dataclasses.dataclass(frozen=True)
class EvolveOptions:
    """How an evolving backbone and its branches teach each other (TESKD); see `self_distillation`.

    Args:
      temperature: T of the softened distributions; 4, and 3 in the authors' first release.
      ce_weight: of the cross-entropies of all exits.
      kd_weight: of the KL from the backbone to each branch.
      feature_weight: of the feature term.
      detach_target: stop the KL's gradient at the backbone, so that branches only learn from it.
      branch_weights: one factor for each branch on its three terms, deepest first; empty for ones.
      feature_reduction: "sum" over the batch, as the authors' code does, so that the term grows
        with the batch size; or "mean" over it.

    Raises:
      ValueError: a value out of its range, naming it.
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


def self_distillation(
    logits: Array,
    features: Array,
    labels: Array,
    *,
    batch_size: int,
    options: EvolveOptions = EvolveOptions(),
) -> tuple[Array, dict[str, Array]]:
    """TESKD's loss of a backbone (index 0) and its student branches, per example.

    L = a Σ_i w_i CE(s_i) + b T² Σ_{i>0} w_i KL(softmax(t/T) + 1e-7 || softmax(s_i/T))
      + c Σ_{i>0} w_i Σ_channels (f_i - sg f_t)² [f_i > 0 or f_t > 0], with t = s_0 and w_0 = 1.

    The KL's gradient reaches the backbone through t (unless detached), the feature term's does
    not. The target is not renormalised after 1e-7 is added.

    Args:
      logits: (1 + branches, B, C).
      features: (1 + branches, B, F), the vectors before the classifiers.
      labels: (B,) integers in [0, C).
      batch_size: examples over all devices; the feature term is their sum, so that its mean is
        multiplied by this number.
      options: the weights a, b, c and the rest.

    Returns:
      The loss (B,), and its terms (B,): "ce", "kl" and "feature" as they are, and the weighted
      ones, which add up to it.

    Raises:
      ValueError: a number of branch weights other than of branches.

    References:
      Student Helping Teacher, arXiv 2110.00329, and its authors' code.
    """
    branches = logits.shape[0] - 1
    if len(options.branch_weights) not in (0, branches):
        raise ValueError(f"{branches} branches need as many branch_weights, got {options}")
    weights = jnp.asarray(options.branch_weights or (1.0,) * branches, _wide(logits).dtype)[:, None]
    ce = cross_entropy(logits, labels)
    target = lax.stop_gradient(logits[:1]) if options.detach_target else logits[:1]
    targets = jax.nn.softmax(_soften(target, options.temperature)) + 1e-7
    log_probs = jax.nn.log_softmax(_soften(logits[1:], options.temperature))
    kl = options.temperature**2 * jnp.sum(targets * (jnp.log(targets) - log_probs), -1)
    theirs, own = _wide(features[1:]), lax.stop_gradient(_wide(features[:1]))
    distance = jnp.where((theirs > 0) | (own > 0), _square(theirs - own), 0.0).sum(-1)
    feature = distance * (batch_size if options.feature_reduction == "sum" else 1)
    terms = {
        "ce": ce[0] + jnp.sum(weights * ce[1:], 0),
        "kl": jnp.sum(weights * kl, 0),
        "feature": jnp.sum(weights * feature, 0),
    }
    weighted = {
        "weighted_ce": options.ce_weight * terms["ce"],
        "weighted_kl": options.kd_weight * terms["kl"],
        "weighted_feature": options.feature_weight * terms["feature"],
    }
    return sum(weighted.values(), jnp.zeros_like(ce[0])), {**terms, **weighted}


def _wide(values: Array) -> Array:
    """In float32 (or wider); finite numbers beyond `_FAR` count as that, with their own gradient.

    The differences and sums of larger ones are not in float32's range. What is not finite stays so,
    as it is a mistake that has to show.
    """
    wide = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if float(jnp.finfo(values.dtype).max) <= _FAR:
        return wide
    far = jnp.isfinite(wide) & (jnp.abs(wide) > _FAR)
    passed = wide - lax.stop_gradient(wide)  # zero, of slope one
    return jnp.where(far, lax.stop_gradient(jnp.sign(wide) * _FAR) + passed, wide)


def _square(values: Array) -> Array:
    """x², or `_FAR_SQUARE` where it is more, with the gradient 2x everywhere."""
    fixed = lax.stop_gradient(values)
    far = jnp.isfinite(fixed) & (jnp.abs(fixed) > _FAR_SQUARE**0.5)
    return jnp.where(far, _FAR_SQUARE + 2 * fixed * (values - fixed), jnp.square(values))


def _soften(logits: Array, temperature: Array | float) -> Array:
    # Shifted before the division: logits near the largest half-precision number over a small
    # temperature would overflow float32, and softmax does not see the shift.
    logits = _wide(logits)
    shift = lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    return (logits - shift) / temperature
