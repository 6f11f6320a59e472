"""Cross-entropy and KL against NumPy in float64, and the limits of floating point."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import ce_of, close, kl_of

from distill_jax.methods import losses

RANDOM = np.random.RandomState(0)
STUDENT = (3 * RANDOM.standard_normal((6, 7))).astype(np.float32)
TEACHERS = (5 * RANDOM.standard_normal((3, 6, 7))).astype(np.float32)
LABELS = RANDOM.randint(0, 7, 6)


def test_losses_broadcast_over_leading_axes():
    ce = losses.cross_entropy(TEACHERS, LABELS)
    kl = losses.kl_divergence(TEACHERS, STUDENT, 2.0)
    assert ce.shape == kl.shape == (3, 6)
    for k in range(3):
        close(np.asarray(ce[k]), ce_of(TEACHERS[k], LABELS))
        close(np.asarray(kl[k]), kl_of(TEACHERS[k], STUDENT, 2.0))


def test_kl_of_a_distribution_with_itself_is_zero_and_else_above():
    assert np.all(losses.kl_divergence(STUDENT, STUDENT, 4.0) == 0)
    shifted = losses.kl_divergence(STUDENT + 100, STUDENT, 4.0)
    np.testing.assert_allclose(shifted, 0, atol=1e-4)
    assert np.all(losses.kl_divergence(TEACHERS[0], STUDENT, 4.0) > 0.01)


def test_a_label_out_of_range_counts_as_no_class():
    ce = losses.cross_entropy(STUDENT[:3], jnp.array([-1, 7, 6]))
    np.testing.assert_array_equal(ce[:2], 0)
    assert ce[2] > 0


def test_what_is_not_finite_shows_and_far_numbers_keep_their_gradient():
    far = jnp.array([[3e38, -3e38, 0.0]])
    loss, gradient = jax.value_and_grad(lambda s: losses.cross_entropy(s, jnp.array([1]))[0])(far)
    assert 1e32 < loss < np.inf
    np.testing.assert_array_equal(gradient, [[1.0, -1.0, 0.0]])
    for value in (np.nan, np.inf):
        assert not np.isfinite(losses.cross_entropy(far.at[0, 2].set(value), jnp.array([1])))
        broken = losses.kl_divergence(far.at[0, 2].set(value), far, 4.0)
        assert not np.isfinite(broken)


@pytest.mark.parametrize(("value", "slope"), [(-3.0, -6.0), (-1e30, -2e30)])
def test_squares_are_bounded_and_keep_their_gradient(value, slope):
    squared, gradient = jax.value_and_grad(losses.bounded_square)(jnp.float32(value))
    assert gradient == np.float32(slope)
    assert squared == 9.0 if value == -3.0 else 1e29 < squared < np.inf
