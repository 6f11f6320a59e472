"""Losses of logits: one number per example, in float32 (or wider), no hidden reduction."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax import Array, lax

# Far above what any network gives, and far enough below float32's 3.4e38 that the terms of a batch
# over T = 0.01 can be added up.
_FAR, _FAR_SQUARE = 1e32, 1e30


def cross_entropy(logits: Array, labels: Array, smoothing: Array | float | None = None) -> Array:
    """Cross-entropy with integer labels, -log softmax(s)[y].

    Args:
      logits: (..., B, C), any float type; computed in float32.
      labels: (B,) integers in [0, C).
      smoothing: ε that is taken from the label and spread over all C classes; None for none.

    Returns:
      (..., B) float32, in nats.
    """
    chex.assert_type(labels, int)
    chex.assert_shape(logits, (..., len(labels), None))
    log_probs = jax.nn.log_softmax(widen(logits))
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    one_hot = jnp.broadcast_to(one_hot, log_probs.shape)
    # A masked sum, not a gather: a label out of range gives 0 here instead of another class.
    value = -jnp.sum(jnp.where(one_hot, log_probs, 0.0), -1)
    if smoothing is None:
        return value
    return (1 - smoothing) * value - smoothing * jnp.mean(log_probs, -1)


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
    chex.assert_equal(teacher_logits.shape[-2:], logits.shape[-2:])
    log_targets = jax.nn.log_softmax(soften(teacher_logits, temperature))
    log_probs = jax.nn.log_softmax(soften(logits, temperature))
    return kl_of_logs(log_targets, log_probs)


def kl_of_logs(log_targets: Array, log_probs: Array) -> Array:
    """KL(p || q) from log p and log q (..., C), broadcast; no term where p is 0."""
    log_targets, log_probs = jnp.broadcast_arrays(log_targets, log_probs)
    targets = jnp.exp(log_targets)
    # An underflown target has a log of -inf, and 0 * -inf is NaN in the value and in the gradient.
    gap = jnp.where(targets > 0, log_targets - log_probs, 0.0)
    return jnp.sum(targets * gap, -1)


def kl_of_raised(
    targets: Array, logits: Array, temperature: Array | float, epsilon: float = 1e-7
) -> Array:
    """KL of softmax(t/T) + ε to softmax(s/T), without the factor T²; the targets sum to 1 + C ε.

    Args:
      targets: (..., B, C) logits t, broadcast against the others.
      logits: (..., B, C) logits s.
      temperature: T > 0.
      epsilon: ε > 0.

    Returns:
      (..., B) float32, in nats.
    """
    raised = jax.nn.softmax(soften(targets, temperature)) + epsilon
    log_probs = jax.nn.log_softmax(soften(logits, temperature))
    raised, log_probs = jnp.broadcast_arrays(raised, log_probs)
    return jnp.sum(raised * (jnp.log(raised) - log_probs), -1)


def widen(values: Array) -> Array:
    """Widens to float32; finite numbers beyond `_FAR` count as that, with their own gradient.

    The differences and sums of larger ones are not in float32's range. What is not finite stays so,
    as it is a mistake that has to show.
    """
    wide = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if float(jnp.finfo(values.dtype).max) <= _FAR:
        return wide
    far = jnp.isfinite(wide) & (jnp.abs(wide) > _FAR)
    passed = wide - lax.stop_gradient(wide)  # zero, of slope one
    return jnp.where(far, lax.stop_gradient(jnp.sign(wide) * _FAR) + passed, wide)


def bounded_square(values: Array) -> Array:
    """Squares x, at most `_FAR_SQUARE`, with the gradient 2x everywhere."""
    fixed = lax.stop_gradient(values)
    far = jnp.isfinite(fixed) & (jnp.abs(fixed) > _FAR_SQUARE**0.5)
    return jnp.where(far, _FAR_SQUARE + 2 * fixed * (values - fixed), jnp.square(values))


def soften(logits: Array, temperature: Array | float) -> Array:
    """Divides logits, less their largest, by the temperature: softmax does not see the shift."""
    # Shifted before the division: logits near the largest half-precision number over a small
    # temperature would overflow float32, and softmax does not see the shift.
    logits = widen(logits)
    shift = lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    return (logits - shift) / temperature
