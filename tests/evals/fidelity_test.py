"""Fidelity by hand and against NumPy in float64."""

import math

import numpy as np
import pytest

from distill_jax.evals import classification

RANDOM = np.random.RandomState(0)
OWN = (3 * RANDOM.standard_normal((50, 6))).astype(np.float32)
THEIRS = (4 * RANDOM.standard_normal((50, 6))).astype(np.float32)
LABELS = RANDOM.randint(0, 6, 50)


def confident(*probabilities):
    """Logits (N, 2) whose first class has these probabilities."""
    p = np.asarray(probabilities, np.float64)
    with np.errstate(divide="ignore"):
        return np.log(np.stack([p, 1 - p], -1))


# ------------------------------------------------------------------------- accuracy and agreement
def test_accuracy_by_hand():
    logits = np.array([[2.0, 1.0, 0.0], [0.0, -1.0, 3.0], [1.0, 5.0, 4.0], [0.0, 7.0, 1.0]])
    assert classification.accuracy(logits, np.array([0, 2, 2, 0])) == 0.5
    assert classification.accuracy(logits, np.array([0, 2, 1, 1])) == 1.0
    assert classification.accuracy(logits, np.array([1, 1, 2, 0])) == 0.0


def test_agreement_by_hand_is_about_classes_and_not_about_labels():
    logits = np.array([[2.0, 1.0, 0.0], [0.0, -1.0, 3.0], [1.0, 5.0, 4.0], [0.0, 7.0, 1.0]])
    others = np.array([[9.0, 8.0, 7.0], [0.0, 9.0, 3.0], [-5.0, -3.0, -4.0], [1.0, 0.0, 0.5]])
    assert (
        classification.agreement(logits, others) == classification.agreement(others, logits) == 0.5
    )
    assert classification.agreement(logits, 0.1 * logits - 5) == 1.0


# ------------------------------------------------------------------------------------------ the KL
def test_kl_equals_float64_and_goes_from_teacher_to_student():
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in map(np.float64, (THEIRS, OWN)))
    expected = np.mean(np.sum(p * np.log(p / q), -1))
    assert classification.kl(THEIRS, OWN) == pytest.approx(expected, rel=1e-12)
    assert abs(classification.kl(OWN, THEIRS) - expected) > 0.1


def test_kl_by_hand():
    half, quarter = confident(0.5), confident(0.25)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert classification.kl(half, quarter) == pytest.approx(expected, rel=1e-12)
    assert classification.kl(np.concatenate([half, half]), np.concatenate([quarter, half])) == (
        pytest.approx(expected / 2, rel=1e-12)  # the mean over examples
    )
    assert classification.kl(OWN, OWN + 7) == pytest.approx(0, abs=1e-6)


def test_kl_of_far_logits_is_finite_and_a_class_ruled_out_adds_nothing():
    teacher = np.array([[1e5, 0.0, -1e5]], np.float32)
    assert classification.kl(teacher, np.zeros((1, 3), np.float32)) == pytest.approx(math.log(3))
    assert classification.kl(np.zeros((1, 3)), teacher) == pytest.approx(
        1e5 - math.log(3), rel=1e-6
    )
    largest = np.finfo(np.float32).max
    extreme = np.array([[largest, -largest]], np.float32)
    assert classification.kl(extreme, -extreme) == pytest.approx(2.0 * float(largest))


# ------------------------------------------------------------------------------------- calibration
def ece_by_loop(logits, labels):
    """Guo et al.'s formula, bin by bin, on (a, b]."""
    shifted = np.float64(logits) - np.float64(logits).max(-1, keepdims=True)
    probabilities = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    total = 0.0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            total += inside.mean() * gap
    return total


@pytest.mark.parametrize("scale", [0.1, 0.5, 1.0, 3.0])
def test_calibration_error_equals_the_formula_bin_by_bin(scale):
    found = classification.expected_calibration_error(scale * OWN, LABELS)
    assert found == pytest.approx(ece_by_loop(scale * OWN, LABELS), rel=1e-12)
    assert 0.01 < found < 1


def test_calibration_error_by_hand():
    # Bins of 1/15: .95 and .97 share the last one; .62 is alone, and so is .55.
    logits = confident(0.95, 0.97, 0.62, 0.55)
    by_bin = abs(1 - 1.92) + abs(1 - 0.62) + abs(0 - 0.55)
    found = classification.expected_calibration_error(logits, np.array([0, 1, 0, 1]))
    assert found == pytest.approx(by_bin / 4, rel=1e-12)


def test_gaps_of_one_bin_cancel_and_gaps_of_two_do_not():
    shared = classification.expected_calibration_error(confident(0.74, 0.74), np.array([0, 1]))
    assert shared == pytest.approx(0.24)
    apart = classification.expected_calibration_error(confident(0.74, 0.65), np.array([0, 1]))
    assert apart == pytest.approx((0.26 + 0.65) / 2)


def test_certainty_is_in_the_last_bin_and_an_edge_in_the_one_below():
    sure = np.array([[1e4, 0.0], [1e4, 0.0], [3.0, 0.0]])
    assert classification.expected_calibration_error(sure, np.array([0, 0, 0])) == pytest.approx(
        (1 - 1 / (1 + math.exp(-3))) / 3
    )
    assert classification.expected_calibration_error(sure[:2], np.array([1, 1])) == 1.0
    # Even logits of three classes: a confidence of 5/15, whose bin is (4/15, 5/15].
    even, above = np.zeros((1, 3)), np.log([[0.34, 0.33, 0.33]])
    below = np.log([[0.3, 0.3, 0.2, 0.2]])
    even4 = np.concatenate([even, [[-1e9]]], -1)
    above4 = np.concatenate([above, [[-1e9]]], -1)
    both = classification.expected_calibration_error
    right, wrong = 0, 1  # the first of equal logits counts
    together = both(np.concatenate([even4, below]), np.array([right, wrong]))
    assert together == pytest.approx(abs(2 / 3 - 0.3) / 2)
    apart = both(np.concatenate([even4, above4]), np.array([right, wrong]))
    assert apart == pytest.approx((2 / 3 + 0.34) / 2)
