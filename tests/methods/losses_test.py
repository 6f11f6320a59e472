"""Losses against NumPy in float64, the authors' numbers, and the limits of floating point."""

import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from distill_jax.methods import losses
from distill_jax.methods.losses import LossOptions

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
OPTIONS = [
    LossOptions(*choice)
    for choice in itertools.product(losses.KL_REDUCTIONS, losses.CROSS_ENTROPY, losses.TEACHERS)
]
MASKS = [[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]]
RANDOM = np.random.RandomState(0)
STUDENT = (3 * RANDOM.standard_normal((6, 7))).astype(np.float32)
TEACHERS = (5 * RANDOM.standard_normal((3, 6, 7))).astype(np.float32)
LABELS = RANDOM.randint(0, 7, 6)


# ------------------------------------------------------------------ the formulas again, in float64
def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def ce_of(s, labels):
    return -np.take_along_axis(log_softmax(s), labels[:, None], -1)[:, 0]


def kl_of(t, s, temperature):
    log_p = log_softmax(np.asarray(t, np.float64) / temperature)
    log_q = log_softmax(np.asarray(s, np.float64) / temperature)
    p = np.exp(log_p)
    return np.where(p > 0, p * (np.where(p > 0, log_p, 0) - log_q), 0).sum(-1)


def counts_of(options, keep, classes):
    """The weights of the cross-entropy and of each KL, by the words of the module's docstring."""
    kept = sum(keep)
    n, r = 1, 1.0
    if options.cross_entropy == "per_teacher":
        n = kept
    if options.kl_reduction == "element_mean":
        r = 1 / classes
    if options.teachers == "mean" and kept:
        n, r = n / (kept if options.cross_entropy == "per_teacher" else 1), r / kept
    return n, r


def total_of(s, labels, teachers, keep, temperature, kd_weight, options):
    ce = ce_of(s, labels)
    if not sum(keep):
        return ce
    n, r = counts_of(options, keep, s.shape[-1])
    kl = sum(kl_of(t, s, temperature) for t, k in zip(teachers, keep, strict=True) if k)
    return n * (1 - kd_weight) * ce + kd_weight * temperature**2 * r * kl


def gradient_of(s, labels, teachers, keep, temperature, kd_weight, options):
    """The gradient of the summed loss with respect to the student's logits, by hand."""
    s, teachers = np.asarray(s, np.float64), np.asarray(teachers, np.float64)
    ce = np.exp(log_softmax(s)) - np.eye(s.shape[-1])[labels]
    if not sum(keep):
        return ce
    n, r = counts_of(options, keep, s.shape[-1])
    q = np.exp(log_softmax(s / temperature))
    kl = sum(
        (q - np.exp(log_softmax(t / temperature))) / temperature
        for t, k in zip(teachers, keep, strict=True)
        if k
    )
    return n * (1 - kd_weight) * ce + kd_weight * temperature**2 * r * kl


@functools.partial(jax.jit, static_argnums=6)
def _both(s, labels, teachers, keep, temperature, kd_weight, options):
    def total(s):
        loss, terms = losses.multi_teacher(
            s, labels, teachers, keep, temperature=temperature, kd_weight=kd_weight, options=options
        )
        return jnp.sum(loss), (loss, terms)

    gradient, (loss, terms) = jax.grad(total, has_aux=True)(s)
    return loss, terms, gradient


def both(s, labels, teachers, keep, temperature, kd_weight, options=LossOptions()):
    """Loss (B,), terms and gradient of the sum, as NumPy; compiled once for the options."""
    arrays = (s, labels, teachers, np.asarray(keep, bool))
    numbers = (np.float32(temperature), np.float32(kd_weight))
    return jax.tree.map(np.asarray, _both(*arrays, *numbers, options))


def close(got, want, tolerance=1e-5):
    assert got.shape == want.shape and got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


# ------------------------------------------------------------------------------------ plain values
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kd_weight", [0.0, 0.3, 1.0])
def test_loss_and_gradient_equal_float64_for_every_option(options, kd_weight):
    for keep, temperature in itertools.product(MASKS, [0.5, 1.0, 4.0, 20.0]):
        case = (STUDENT, LABELS, TEACHERS, keep, temperature, np.float32(kd_weight), options)
        loss, terms, gradient = both(*case)
        close(loss, total_of(*case))
        # Softened logits cancel in the gradient; what is left of their float32 is scaled by T.
        close(gradient, gradient_of(*case), 1e-5 * max(1, temperature))
        close(terms["ce"], ce_of(STUDENT, LABELS))
        kl = [kl_of(t, STUDENT, temperature) * k for t, k in zip(TEACHERS, keep, strict=True)]
        close(terms["kl"], sum(kl), 2e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_gradient_by_hand_equals_numeric_differences(options):
    case = (LABELS, TEACHERS, [1, 0, 1], 3.0, 0.3, options)
    step, numeric = 1e-5, np.zeros(STUDENT.shape)
    for index in np.ndindex(STUDENT.shape):
        moved = np.zeros(STUDENT.shape)
        moved[index] = step
        up, down = (total_of(STUDENT + sign * moved, *case).sum() for sign in (1, -1))
        numeric[index] = (up - down) / (2 * step)
    np.testing.assert_allclose(gradient_of(STUDENT, *case), numeric, atol=1e-8)


def test_gradients_in_float64_pass_check_grads():
    with jax.enable_x64(True):

        @jax.jit
        def loss(s):
            wide = (s, LABELS, jnp.asarray(TEACHERS, jnp.float64), jnp.array([True, False, True]))
            return losses.multi_teacher(*wide, temperature=3.0, kd_weight=0.3)[0]

        student = jnp.asarray(STUDENT, jnp.float64)
        assert loss(student).dtype == jnp.float64
        check_grads(loss, (student,), order=1, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("teachers", "options"), [(0, OPTIONS[0]), (0, OPTIONS[-1]), *((3, o) for o in OPTIONS)]
)
def test_without_a_teacher_the_loss_is_the_cross_entropy(options, teachers):
    case = (STUDENT, LABELS, TEACHERS[:teachers], [0] * teachers, 4.0, 1.0, options)
    loss, terms, gradient = both(*case)
    np.testing.assert_array_equal(loss, terms["ce"])
    close(loss, ce_of(STUDENT, LABELS))
    close(gradient, gradient_of(*case))
    if teachers:
        np.testing.assert_array_equal(terms["kl"], np.zeros(6))
    else:
        assert sorted(terms) == ["ce", "weighted_ce"]


def test_a_dropped_teacher_leaves_no_trace():
    other = TEACHERS.copy()
    other[1] = 0
    first, second = (both(STUDENT, LABELS, t, [1, 0, 1], 4.0, 0.7) for t in (TEACHERS, other))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    two = both(STUDENT, LABELS, TEACHERS[::2], [1, 1], 4.0, 0.7)
    close(first[0], two[0].astype(np.float64), 1e-6)


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


def test_temperature_and_weight_are_traced():
    before = _both._cache_size()
    both(STUDENT[:5], LABELS[:5], TEACHERS[:, :5], [1, 1, 1], 4.0, 0.5)
    for temperature, kd_weight in [(1.0, 0.5), (2.0, 0.0), (20.0, 1.0)]:
        both(STUDENT[:5], LABELS[:5], TEACHERS[:, :5], [1, 0, 1], temperature, kd_weight)
    assert _both._cache_size() == before + 1


# ---------------------------------------------------------------------------------- authors' code
TOTALS = {
    "element_mean": LossOptions(kl_reduction="element_mean"),
    "batch_mean": LossOptions(),
    "batch_mean_ce_per_teacher": LossOptions(cross_entropy="per_teacher"),
}


def golden():
    with np.load(GOLDEN / "losses_multi_teacher.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def test_every_golden_case_and_its_gradients_agree():
    arrays = golden()
    cases = json.loads(str(arrays["meta"]))["cases"]
    assert len(cases) == 48
    data = (arrays["student"], arrays["labels"], arrays["teachers"])
    for i, case in enumerate(cases):
        for total, options, want in zip(TOTALS, TOTALS.values(), arrays[f"grads_{i}"], strict=True):
            loss, terms, gradient = both(*data, case["mask"], case["T"], case["lam"], options)
            assert loss.mean(dtype=np.float64) == pytest.approx(case[total], rel=1e-5), (i, total)
            assert terms["ce"].mean() == pytest.approx(case["ce"], rel=1e-5)
            error = np.abs(gradient / len(loss) - want).max() / np.abs(want).max()
            assert error < 1e-5, (i, total)


@pytest.mark.parametrize(
    ("method", "protocol", "total"),
    [
        ("chain", "standard", "batch_mean"),
        ("chain", "paper", "batch_mean"),
        ("chain", "official", "element_mean"),
        ("dense", "standard", "batch_mean"),
        ("dense", "paper", "batch_mean_ce_per_teacher"),
        ("dense", "official", "element_mean"),
    ],
)
def test_presets_are_the_losses_of_papers_and_codes(method, protocol, total):
    assert losses.preset(method, protocol) == TOTALS[total]


# ------------------------------------------------------------------------- limits of floating point
TEMPERATURES = [0.01, 0.5, 1.0, 4.0, 100.0]


def extreme(dtype, magnitude):
    """Student and teachers (3, B, C) that are as far apart as `magnitude` allows."""
    values = np.zeros((3, 4), np.float64)
    values[0, 0], values[1] = magnitude, [magnitude, -magnitude, magnitude, 0]
    teachers = np.stack([values, -values, values[:, ::-1]])
    return jnp.asarray(values, dtype), jnp.asarray(teachers, dtype)


@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [
        (jnp.float16, 65504.0),
        (jnp.bfloat16, 1e30),
        (jnp.float32, 1e30),
        (jnp.float32, 1e-30),
        (jnp.float32, 100.0),
    ],
)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_extreme_logits_give_finite_and_right_values_and_gradients(dtype, magnitude, temperature):
    student, teachers = extreme(dtype, magnitude)
    labels = np.array([1, 1, 2])
    case = (labels, np.asarray(teachers, np.float64), [1, 1, 1], temperature, 0.3, LossOptions())
    loss, _, gradient = both(student, labels, teachers, *case[2:])
    assert gradient.dtype == dtype
    want = total_of(np.asarray(student, np.float64), *case)
    close(loss, want, 2e-5)
    want = gradient_of(np.asarray(student, np.float64), *case)
    tolerance = max(float(jnp.finfo(dtype).eps), 2e-5 * max(1, temperature))
    np.testing.assert_allclose(
        gradient.astype(np.float64), want, rtol=tolerance, atol=tolerance * np.abs(want).max()
    )


LIMITS = [
    (dtype, float(limit))
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32)
    for limit in (jnp.finfo(dtype).max, jnp.finfo(dtype).tiny, jnp.finfo(dtype).smallest_subnormal)
]
ALL_TEMPERATURES = [0.01, 0.03, 0.5, 1.0, 4.0, 20.0, 100.0]


def finite(tree):
    return all(np.isfinite(np.asarray(x, np.float64)).all() for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(("dtype", "magnitude"), LIMITS)
@pytest.mark.parametrize("options", OPTIONS[::3])
def test_no_number_of_any_type_makes_a_loss_or_gradient_that_is_not_finite(
    dtype, magnitude, options
):
    student, teachers = extreme(dtype, magnitude)
    for temperature, kd_weight in itertools.product(ALL_TEMPERATURES, (0.0, 0.3, 1.0)):
        case = (student, np.array([1, 1, 2]), teachers, [1, 1, 1], temperature, kd_weight, options)
        assert finite(both(*case)), (temperature, kd_weight)


@functools.partial(jax.jit, static_argnums=2)
def _evolving(logits, features, options):
    def total(logits, features):
        loss, terms = losses.self_distillation(
            logits, features, jnp.array([1, 1, 2]), batch_size=3, options=options
        )
        return jnp.sum(loss), (loss, terms)

    return jax.grad(total, (0, 1), has_aux=True)(logits, features)


@pytest.mark.parametrize(("dtype", "magnitude"), LIMITS)
@pytest.mark.parametrize("temperature", ALL_TEMPERATURES)
def test_nor_does_one_in_the_loss_of_an_evolving_network(dtype, magnitude, temperature):
    values = jnp.stack([extreme(dtype, magnitude)[0], *extreme(dtype, magnitude)[1][1:]])
    options = losses.EvolveOptions(temperature=temperature)
    assert finite(_evolving(values, values, options))


def test_what_is_not_finite_shows_and_far_numbers_keep_their_gradient():
    far = jnp.array([[3e38, -3e38, 0.0]])
    loss, gradient = jax.value_and_grad(lambda s: losses.cross_entropy(s, jnp.array([1]))[0])(far)
    assert 1e32 < loss < np.inf
    np.testing.assert_array_equal(gradient, [[1.0, -1.0, 0.0]])
    for value in (np.nan, np.inf):
        assert not np.isfinite(losses.cross_entropy(far.at[0, 2].set(value), jnp.array([1])))
        broken = losses.kl_divergence(far.at[0, 2].set(value), far, 4.0)
        assert not np.isfinite(broken)
    squared, slope = jax.value_and_grad(losses._square)(jnp.float32(-1e30))
    assert 1e29 < squared < np.inf and slope == np.float32(-2e30)
    squared, slope = jax.value_and_grad(losses._square)(jnp.float32(-3.0))
    assert (squared, slope) == (9.0, -6.0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_class_that_the_teacher_rules_out_adds_nothing(temperature):
    teachers = TEACHERS.copy()
    teachers[:, :, 2] = -np.inf
    labels = np.where(LABELS == 2, 3, LABELS)
    case = (STUDENT, labels, teachers, [1, 1, 1], temperature, np.float32(0.5), LossOptions())
    loss, terms, gradient = both(*case)
    close(loss, total_of(*case))
    close(gradient, gradient_of(*case), 1e-5 * max(1, temperature))
    assert np.isfinite(terms["kl"]).all()


def test_half_precision_is_computed_in_float32():
    student, teachers = jnp.asarray(STUDENT, jnp.bfloat16), jnp.asarray(TEACHERS, jnp.bfloat16)
    loss, _, _ = both(student, LABELS, teachers, [1, 1, 1], 4.0, 0.5)
    rest = (LABELS, np.asarray(teachers, np.float64), [1, 1, 1], 4.0, 0.5, LossOptions())
    close(loss, total_of(np.asarray(student, np.float64), *rest))


# --------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kl_reduction": "mean"}, "kl_reduction is one of .*batch_mean.*, got 'mean'"),
        ({"cross_entropy": "twice"}, "cross_entropy is one of .*per_teacher.*, got 'twice'"),
        ({"teachers": ""}, "teachers is one of .*sum.*, got ''"),
    ],
)
def test_unknown_options_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LossOptions(**values)


@pytest.mark.parametrize("unknown", [("chain", "papers"), ("tree", "paper")])
def test_unknown_presets_are_refused(unknown):
    with pytest.raises(ValueError, match=f"no loss preset {'/'.join(unknown)}; .*dense/paper"):
        losses.preset(*unknown)
