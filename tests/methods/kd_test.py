"""KD and its balance with the cross-entropy: float64, the authors' numbers, floating point."""

import functools
import itertools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of, outputs_of
from float64 import ce_of, close, kl_of, log_softmax
from jax.test_util import check_grads

from distill_jax.methods import KD, CrossEntropy, Hyper, LossOptions, base, kd

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
OPTIONS = [
    LossOptions(*choice)
    for choice in itertools.product(kd.KL_REDUCTIONS, kd.CROSS_ENTROPY, kd.TEACHERS)
]
MASKS = [[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]]
RANDOM = np.random.RandomState(0)
STUDENT = (3 * RANDOM.standard_normal((6, 7))).astype(np.float32)
TEACHERS = (5 * RANDOM.standard_normal((3, 6, 7))).astype(np.float32)
LABELS = RANDOM.randint(0, 7, 6)


# ------------------------------------------------------------------ the formulas again, in float64
def counts_of(options, mask, kd_weight, classes):
    """The weight of the cross-entropy and of each KL, by the words of the module's docstring."""
    kept = sum(mask)
    number = {"once": 1, "per_teacher": len(mask), "per_kept_teacher": kept}[options.cross_entropy]
    if options.teachers == "mean":
        number = 1
    of_ce = number * (1 - kd_weight)
    if not kept and (options.teachers == "mean" or options.cross_entropy != "per_teacher"):
        of_ce = 1.0  # alone
    of_kl = 1 / classes if options.kl_reduction == "element_mean" else 1.0
    return of_ce, of_kl / (max(kept, 1) if options.teachers == "mean" else 1)


def total_of(s, labels, teachers, mask, temperature, kd_weight, options):
    of_ce, of_kl = counts_of(options, mask, kd_weight, s.shape[-1])
    kept = [t for t, k in zip(teachers, mask, strict=True) if k]
    kl = sum((kl_of(t, s, temperature) for t in kept), np.zeros(len(s)))
    return of_ce * ce_of(s, labels) + kd_weight * temperature**2 * of_kl * kl


def gradient_of(s, labels, teachers, mask, temperature, kd_weight, options):
    """The gradient of the summed loss with respect to the student's logits, by hand."""
    s, teachers = np.asarray(s, np.float64), np.asarray(teachers, np.float64)
    of_ce, of_kl = counts_of(options, mask, kd_weight, s.shape[-1])
    ce = np.exp(log_softmax(s)) - np.eye(s.shape[-1])[labels]
    q = np.exp(log_softmax(s / temperature))
    kl = np.zeros(s.shape)
    for t, k in zip(teachers, mask, strict=True):
        if k:
            kl += (q - np.exp(log_softmax(t / temperature))) / temperature
    return of_ce * ce + kd_weight * temperature**2 * of_kl * kl


def terms_of(s, labels, teachers, mask, temperature, kd_weight, options=LossOptions()):
    hyper = Hyper(temperature=temperature, kd_weight=kd_weight)
    context = context_of(outputs_of(s), teachers, mask, labels, hyper)
    taught = KD(options).terms({}, context)[0] if len(teachers) else {}
    return {**CrossEntropy(options).terms({}, context)[0], **taught}


@functools.partial(jax.jit, static_argnums=6)
def _both(*case):
    def total(s):
        terms = terms_of(s, *case[1:])
        chex.assert_shape([term.value for term in terms.values()], (len(s),))
        chex.assert_shape([term.weight for term in terms.values()], ())
        loss = sum(term.weight * term.value for term in terms.values())
        values = {name: term.value for name, term in terms.items()}
        return jnp.sum(loss), (loss, values)

    gradient, (loss, values) = jax.grad(total, has_aux=True)(case[0])
    return loss, values, gradient


def both(s, labels, teachers, mask, temperature, kd_weight, options=LossOptions()):
    """Loss (B,), terms and gradient of the sum, as NumPy; compiled once for the options."""
    arrays = (s, labels, teachers, np.asarray(mask, bool))
    numbers = (np.float32(temperature), np.float32(kd_weight))
    return jax.tree.map(np.asarray, _both(*arrays, *numbers, options))


# ------------------------------------------------------------------------------------ plain values
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kd_weight", [0.0, 0.3, 1.0])
def test_loss_and_gradient_equal_float64_for_every_option(options, kd_weight):
    for mask, temperature in itertools.product(MASKS, [0.5, 1.0, 4.0, 20.0]):
        case = (STUDENT, LABELS, TEACHERS, mask, temperature, np.float32(kd_weight), options)
        loss, terms, gradient = both(*case)
        close(loss, total_of(*case))
        # Softened logits cancel in the gradient; what is left of their float32 is scaled by T.
        close(gradient, gradient_of(*case), 1e-5 * max(1, temperature))
        close(terms["ce"], ce_of(STUDENT, LABELS))
        kl = [kl_of(t, STUDENT, temperature) * k for t, k in zip(TEACHERS, mask, strict=True)]
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
            teachers = jnp.asarray(TEACHERS, jnp.float64)
            terms = terms_of(s, LABELS, teachers, jnp.array([True, False, True]), 3.0, 0.3)
            return sum(term.weight * term.value for term in terms.values())

        student = jnp.asarray(STUDENT, jnp.float64)
        assert loss(student).dtype == jnp.float64
        check_grads(loss, (student,), order=1, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]])
def test_without_teachers_the_loss_is_the_cross_entropy(options):
    case = (STUDENT, LABELS, TEACHERS[:0], [], 4.0, 1.0, options)
    loss, terms, gradient = both(*case)
    np.testing.assert_array_equal(loss, terms["ce"])
    close(loss, ce_of(STUDENT, LABELS))
    close(gradient, np.exp(log_softmax(STUDENT)) - np.eye(7)[LABELS])
    assert sorted(terms) == ["ce"]


@pytest.mark.parametrize("options", OPTIONS)
def test_without_a_kept_teacher_it_is_too_unless_every_edge_brings_its_own(options):
    loss, terms, gradient = both(STUDENT, LABELS, TEACHERS, [0, 0, 0], 4.0, 0.75, options)
    each_brings = options.teachers == "sum" and options.cross_entropy == "per_teacher"
    factor = np.float32(3 * 0.25 if each_brings else 1)
    np.testing.assert_array_equal(loss, factor * terms["ce"])
    close(loss, factor * ce_of(STUDENT, LABELS))
    close(gradient, factor * (np.exp(log_softmax(STUDENT)) - np.eye(7)[LABELS]))
    np.testing.assert_array_equal(terms["kl"], np.zeros(6))


def test_a_dropped_teacher_leaves_no_trace():
    other = TEACHERS.copy()
    other[1] = 0
    first, second = (both(STUDENT, LABELS, t, [1, 0, 1], 4.0, 0.7) for t in (TEACHERS, other))
    chex.assert_trees_all_equal(first, second)
    two = both(STUDENT, LABELS, TEACHERS[::2], [1, 1], 4.0, 0.7)
    close(first[0], two[0].astype(np.float64), 1e-6)


@pytest.mark.parametrize("mask", [*MASKS, [1, 1, 0], [0, 0, 1]])
def test_stochastic_teaching_is_the_equation_of_dgkd(mask):
    """L = K (1-λ) CE + λ T² (KL_T + Σ b_i KL_Ai): the cross-entropy counts every edge."""
    temperature, kd_weight, teachers = 3.0, 0.4, len(mask)
    big, *assistants = (kl_of(t, STUDENT, temperature) for t in TEACHERS)
    kl = mask[0] * big + sum(b * kl for b, kl in zip(mask[1:], assistants, strict=True))
    want = teachers * (1 - kd_weight) * ce_of(STUDENT, LABELS) + kd_weight * temperature**2 * kl
    options = LossOptions(cross_entropy="per_teacher")
    close(both(STUDENT, LABELS, TEACHERS, mask, temperature, kd_weight, options)[0], want)


def test_the_total_is_weight_times_mean_of_every_term():
    terms = terms_of(STUDENT, LABELS, TEACHERS, jnp.array([True, False, True]), 4.0, 0.3)
    want = total_of(STUDENT, LABELS, TEACHERS, [1, 0, 1], 4.0, 0.3, LossOptions()).mean()
    assert float(base.total(terms)) == pytest.approx(want, rel=1e-5)
    for_the_batch = {"a": base.Term(jnp.float32(3.0), 2.0), "b": base.Term(jnp.arange(4.0))}
    assert float(base.total(for_the_batch)) == 7.5
    assert float(base.total({})) == 0.0


def test_unbalanced_the_cross_entropy_has_the_weight_one():
    hyper = Hyper(temperature=4.0, kd_weight=0.7)
    context = context_of(outputs_of(STUDENT), TEACHERS, None, LABELS, hyper)
    (term,) = CrossEntropy().terms({}, context)[0].values()
    assert term.weight == 1.0
    close(np.asarray(term.value), ce_of(STUDENT, LABELS))


def test_temperature_and_weight_are_traced():
    chex.clear_trace_counter()
    traced = jax.jit(chex.assert_max_traces(lambda *case: _both.__wrapped__(*case, OPTIONS[1]), 1))
    arrays = (STUDENT, LABELS, TEACHERS)
    for temperature, kd_weight in [(4.0, 0.5), (1.0, 0.5), (2.0, 0.0), (20.0, 1.0)]:
        mask = np.array([True, kd_weight > 0.2, True])
        traced(*arrays, mask, np.float32(temperature), np.float32(kd_weight))


# ---------------------------------------------------------------------------------- authors' code
TOTALS = {
    "element_mean": LossOptions(kl_reduction="element_mean"),
    "batch_mean": LossOptions(),
    "batch_mean_ce_per_teacher": LossOptions(cross_entropy="per_kept_teacher"),
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
