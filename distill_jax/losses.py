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

import jax
import jax.numpy as jnp
from jax import Array

KL_REDUCTIONS = ("batch_mean", "element_mean")
CROSS_ENTROPY = ("once", "per_teacher")
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
      The loss (B,), and its unweighted terms: "ce" (B,), "kl" (B,) summed over kept teachers.

    References:
      TAKD, Mirzadeh et al., AAAI 2020, eq. 3; DGKD, Son et al., ICCV 2021, eqs. 4-7.
    """
    ce = cross_entropy(logits, labels)
    if not teacher_logits.shape[0]:
        return ce, {"ce": ce, "kl": jnp.zeros_like(ce)}
    kept = keep.astype(ce.dtype)
    number = jnp.sum(kept)
    per_teacher = kl_divergence(teacher_logits, logits, temperature)
    kl = jnp.sum(jnp.where(kept[:, None] > 0, per_teacher, 0.0), 0)
    kd = kl / logits.shape[-1] if options.kl_reduction == "element_mean" else kl
    if options.teachers == "mean":
        kd = kd / jnp.maximum(number, 1.0)
    counted = options.cross_entropy == "per_teacher" and options.teachers == "sum"
    ce_count = number if counted else 1.0
    taught = ce_count * (1.0 - kd_weight) * ce + kd_weight * temperature**2 * kd
    return jnp.where(number > 0, taught, ce), {"ce": ce, "kl": kl}


def _wide(logits: Array) -> Array:
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _soften(logits: Array, temperature: Array | float) -> Array:
    # Shifted before the division: logits near the largest half-precision number over a small
    # temperature would overflow float32, and softmax does not see the shift.
    logits = _wide(logits)
    shift = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    return (logits - shift) / temperature
