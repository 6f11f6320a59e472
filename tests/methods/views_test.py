"""Methods of views, partners, past predictions and views of one's own, against plain NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of, outputs_of

from distill_jax import methods
from distill_jax.methods import CSKD, DDGSD, KDCL, PSKD, Shapes, total
from distill_jax.methods.base import MixedLabels

B, C, N = 5, 4, 9
DRAW = np.random.default_rng(0)
A, OTHER, THIRD = DRAW.normal(size=(3, B, C)) * 3
LABELS = DRAW.integers(0, C, B)
SECOND = (LABELS + 1) % C


def log_softmax(x, temperature=1.0):
    x = x / temperature - (x / temperature).max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl(target, logits, temperature):
    p, q = log_softmax(target, temperature), log_softmax(logits, temperature)
    return (np.exp(p) * (p - q)).sum(-1)


def ce(logits, labels):
    return -log_softmax(logits)[np.arange(B), labels]


def of(logits=A, teachers=(), **others):
    teachers = [jnp.asarray(x) for x in teachers]
    context = {"labels": jnp.asarray(LABELS, jnp.int32), **others}
    return context_of(outputs_of(jnp.asarray(logits)), teachers, **context)


def test_cs_kd_is_the_divergence_from_the_partner():
    terms, _ = CSKD(temperature=3.0).terms({}, of(partner=outputs_of(jnp.asarray(OTHER))))
    np.testing.assert_allclose(total(terms), 9 * kl(OTHER, A, 3.0).mean(), rtol=1e-5)


@pytest.mark.parametrize("mixed", [False, True])
def test_ddgsd_compares_two_views_and_counts_the_labels_of_the_second(mixed):
    method = DDGSD(temperature=2.0, divergence_weight=0.7, distance_weight=0.1)
    labels = MixedLabels(jnp.asarray(SECOND, jnp.int32), jnp.asarray(0.3)) if mixed else None
    terms, _ = method.terms({}, of(view=outputs_of(jnp.asarray(OTHER)), mixed=labels))
    counted = ce(OTHER, LABELS)
    if mixed:
        counted = 0.3 * counted + 0.7 * ce(OTHER, SECOND)
    both = (kl(A, OTHER, 2.0) + kl(OTHER, A, 2.0)) / C
    expected = counted + 0.7 * both + 0.1 * ((A - OTHER) ** 2).mean(-1)
    np.testing.assert_allclose(total(terms), expected.mean(), rtol=1e-5)


def test_kdcl_is_taught_by_the_mean_of_all_its_own_among_them():
    terms, _ = KDCL(temperature=3.0, alpha=0.2).terms({}, of(teachers=(OTHER, THIRD)))
    mean = (A + OTHER + THIRD) / 3
    expected = 0.8 * ce(A, LABELS) + 0.2 * 9 * kl(mean, A, 3.0)
    np.testing.assert_allclose(total(terms), expected.mean(), rtol=1e-5)


def test_ps_kd_remembers_what_it_said_and_trusts_it_more_with_every_epoch():
    method, every = PSKD(alpha=0.6), DRAW.integers(0, C, N)
    shapes = Shapes(outputs_of(jnp.zeros((B, C))), (), C, N, labels=every)
    variables, index = method.init(None, shapes), np.array([3, 0, 8, 5, 2])
    expected = np.eye(C)[every]
    np.testing.assert_array_equal(variables["memory"]["probabilities"], expected)
    for epoch, logits in ((0.0, A), (0.9, OTHER), (1.0, THIRD), (4.99, A)):
        context = of(
            logits,
            index=jnp.asarray(index),
            epoch=jnp.float32(epoch),
            epochs=5,
            labels=jnp.asarray(every[index], jnp.int32),
        )
        alpha = 0.6 * (int(epoch) + 1) / 5
        label = np.eye(C)[every[index]]
        targets = (1 - alpha) * label + alpha * (expected[index] if epoch >= 1 else label)
        terms, variables = method.terms(variables, context)
        value = -(targets * log_softmax(logits)).sum(-1).mean()
        np.testing.assert_allclose(total(terms), value, rtol=1e-5)
        expected[index] = np.exp(log_softmax(logits))
        np.testing.assert_allclose(variables["memory"]["probabilities"], expected, rtol=1e-5)


def test_a_memory_that_is_large_is_warned_of():
    shapes = Shapes(outputs_of(jnp.zeros((B, 1000))), (), 1000, 1281167)
    (line,) = PSKD().warnings(shapes)
    assert line.startswith("ps_kd remembers 1281167 x 1000 probabilities: 4.8 GiB on every device")
    assert not PSKD().warnings(shapes._replace(examples=50000, classes=100))


@pytest.mark.parametrize("name", ["ce", "label_smoothing", "tfkd_reg", "tfkd_self", "teskd"])
def test_what_counts_labels_counts_both_of_a_mixture_by_their_shares(name):
    options = {"alpha": 0.1, "multiplier": 1.0} if name == "tfkd_self" else {}
    method = methods.build(name, options)
    assert method.mixes_labels
    branch = outputs_of(jnp.asarray(OTHER), jnp.asarray(OTHER))
    student = outputs_of(jnp.asarray(A), jnp.asarray(A), branches=(branch,))

    def loss(first, second=None):
        labels, other = (None if x is None else jnp.asarray(x, jnp.int32) for x in (first, second))
        mixed = None if other is None else MixedLabels(other, jnp.asarray(0.3))
        context = context_of(student, [jnp.asarray(THIRD)], labels=labels, mixed=mixed)
        return float(total(method.terms({}, context)[0]))

    expected = 0.3 * loss(LABELS) + 0.7 * loss(SECOND)
    assert loss(LABELS, SECOND) == pytest.approx(expected, rel=1e-5)
    assert abs(loss(LABELS) - loss(SECOND)) > 1e-3
