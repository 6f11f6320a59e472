"""Before the first step: teachers, weighted terms and their gradients, and what is warned of."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of

from distill_jax.methods import KD, TESKD, CrossEntropy, Hyper, LossOptions, losses
from distill_jax.models import Outputs
from distill_jax.train import preflight
from distill_jax.train.preflight import Preflight, TeacherQuality, TermSize

RANDOM = np.random.RandomState(0)
B, C, F = 8, 10, 4


def normal(*shape, scale=1.0):
    return jnp.asarray(scale * RANDOM.standard_normal(shape), jnp.float32)


def outputs_of(logits, branches=0):
    def one(logits):
        return Outputs(logits, normal(len(logits), F), (normal(len(logits), 2, 2, 3),))

    others = tuple(one(normal(*logits.shape, scale=2)) for _ in range(branches))
    return one(logits)._replace(branches=others)


LABELS = jnp.asarray(RANDOM.randint(0, C, B))
STUDENT, TEACHERS = normal(B, C, scale=2), normal(2, B, C, scale=3)
HYPER = Hyper(temperature=4.0, kd_weight=0.7)


def norm_of(function, *arguments):
    """The norm of the gradient of `function` by all of its arguments, by jax.grad."""
    gradients = jax.jit(jax.grad(function, tuple(range(len(arguments)))))(*arguments)
    return np.sqrt(sum(np.sum(np.square(np.float64(g))) for g in jax.tree.leaves(gradients)))


def balanced(options=LossOptions(), taught=True):
    """Cross-entropy and KD as they are counted against each other."""
    return (CrossEntropy(options), *([KD(options)] * taught))


def sizes_of(methods, outputs, labels, teachers, hyper):
    def terms_of(seen):
        context = context_of(seen, teachers, None, labels, hyper)
        return {k: t for method in methods for k, t in method.terms({}, context)[0].items()}

    return preflight.term_sizes(
        jax.jit(lambda seen: preflight.term_gradients(terms_of, seen))(outputs)
    )


# ----------------------------------------------------------------------------------------- teachers
def test_each_teacher_has_its_accuracy_and_its_mean_agreement_with_the_others():
    labels = np.array([0, 1, 2, 0])
    classes = {"a": [0, 1, 2, 1], "b": [0, 1, 1, 1], "c": [2, 2, 2, 2]}
    logits = [3 * np.eye(3)[picks] for picks in classes.values()]
    quality = preflight.teacher_quality(tuple(classes), logits, labels)
    assert [t.name for t in quality] == ["a", "b", "c"]
    assert [t.accuracy for t in quality] == [0.75, 0.5, 0.25]
    # a and b agree on 3 of 4, a and c on 1, b and c on none.
    assert [t.agreement for t in quality] == pytest.approx([0.5, 0.375, 0.125])
    alone = preflight.teacher_quality(("a",), logits[:1], labels)
    assert alone == [TeacherQuality("a", 0.75, None)]
    assert preflight.teacher_quality((), [], labels) == []


# -------------------------------------------------------------------------------------------- terms
@pytest.mark.parametrize(
    "options",
    [LossOptions(), LossOptions("element_mean", "per_teacher"), LossOptions(teachers="mean")],
)
def test_terms_are_those_of_the_loss_with_all_teachers_and_their_gradients(options):
    sizes = sizes_of(balanced(options), outputs_of(STUDENT), LABELS, TEACHERS, HYPER)
    assert [t.name for t in sizes] == ["ce", "kl"]

    def weighted(name, logits):
        if name == "ce":
            number = 2 if options.cross_entropy == "per_teacher" else 1
            return number * 0.3 * losses.cross_entropy(logits, LABELS).mean()
        kl = losses.kl_divergence(TEACHERS, logits, 4.0).sum(0).mean()
        share = (C if options.kl_reduction == "element_mean" else 1) * (
            2 if options.teachers == "mean" else 1
        )
        return 0.7 * 16 * kl / share

    for term in sizes:
        assert term.value == pytest.approx(float(weighted(term.name, STUDENT)), rel=1e-5)
        expected = norm_of(lambda s, name=term.name: weighted(name, s), STUDENT)
        assert term.gradient == pytest.approx(expected, rel=1e-5)


def test_the_gradients_of_cross_entropy_and_kl_by_hand():
    def softmax(x):
        e = np.exp(np.float64(x) - np.max(x, -1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    ce, kl = sizes_of(balanced(), outputs_of(STUDENT), LABELS, TEACHERS[:1], HYPER)
    by_ce = 0.3 * (softmax(STUDENT) - np.eye(C)[LABELS]) / B
    by_kl = 0.7 * 4 * (softmax(STUDENT / 4) - softmax(TEACHERS[0] / 4)) / B
    assert ce.gradient == pytest.approx(np.linalg.norm(by_ce), rel=1e-5)
    assert kl.gradient == pytest.approx(np.linalg.norm(by_kl), rel=1e-5)


def test_without_teachers_there_is_the_cross_entropy_alone():
    methods = balanced(taught=False)
    (term,) = sizes_of(methods, outputs_of(STUDENT), LABELS, TEACHERS[:0], HYPER)
    ce = losses.cross_entropy(STUDENT, LABELS).mean()
    assert term.name == "ce" and term.value == pytest.approx(float(ce))


@pytest.mark.parametrize("teachers", [0, 1])
def test_terms_of_an_evolving_network_see_every_exit(teachers):
    teskd = TESKD(feature_weight=1e-3)
    outputs = outputs_of(STUDENT, branches=2)
    methods = (teskd, *([KD()] * teachers))
    sizes = sizes_of(methods, outputs, LABELS, TEACHERS[:teachers], HYPER)
    own = ["teskd_ce", "teskd_kl", "teskd_feature"]
    assert {t.name for t in sizes} == {*own, *(["kl"] * teachers)}
    exits = (outputs, *outputs.branches)
    stacked = (jnp.stack([e.logits for e in exits]), jnp.stack([e.feature for e in exits]))

    def weighted(name, logits, features):
        if name == "kl":
            taught = losses.kl_divergence(TEACHERS[0], logits[0], 4.0)
            return 0.7 * 16 * taught.mean()
        pairs = zip(logits, features, strict=True)
        backbone, *branches = (Outputs(s, f, ()) for s, f in pairs)
        context = context_of(backbone._replace(branches=tuple(branches)), labels=LABELS)
        term = teskd.terms({}, context)[0][name]
        return term.weight * term.value.mean()

    for term in sizes:
        assert term.value == pytest.approx(float(weighted(term.name, *stacked)), rel=1e-5)
        expected = norm_of(lambda *seen, name=term.name: weighted(name, *seen), *stacked)
        assert term.gradient == pytest.approx(expected, rel=1e-5)


def test_the_norm_of_a_half_precision_gradient_is_taken_in_float32():
    wide = outputs_of(STUDENT, branches=1)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    methods = (TESKD(feature_weight=1.0),)
    sizes, expected = (
        sizes_of(methods, outputs, LABELS, TEACHERS[:0], HYPER) for outputs in (narrow, rounded)
    )
    for mine, theirs in zip(sizes, expected, strict=True):
        # Each entry of the gradient is rounded to bfloat16, by half a place at most; its norm not.
        assert mine.gradient == pytest.approx(theirs.gradient, rel=2**-9)


# ---------------------------------------------------------------------------------------- warnings
def drowned(temperature=4.0, kd_weight=0.5, classes=10, scale=2.0, options=LossOptions()):
    """(the drowning term, the drowned one) that are warned of; None where none is."""
    rng = np.random.RandomState(1)
    student, teacher = jnp.asarray(scale * rng.standard_normal((2, 8, classes)), jnp.float32)
    terms = sizes_of(
        balanced(options),
        outputs_of(student),
        jnp.asarray(rng.randint(0, classes, 8)),
        teacher[None],
        Hyper(temperature=temperature, kd_weight=kd_weight),
    )
    warnings = preflight.warnings([], terms, None)
    if not warnings:
        return None
    (warning,) = warnings
    words = warning.removeprefix("the term ").split(":")[0].split(" drowns ")
    ratio = max(t.gradient for t in terms) / min(t.gradient for t in terms)
    assert f"{ratio:.0f} times" in warning
    return tuple(words)


def test_the_usual_settings_are_not_warned_of():
    assert drowned() is None
    assert drowned(temperature=1.0) is None
    assert drowned(kd_weight=0.9) is None


def test_a_weight_near_one_or_zero_drowns_a_term():
    assert drowned(kd_weight=0.99) == ("kl", "ce")
    assert drowned(kd_weight=0.005) == ("ce", "kl")


def test_a_weight_of_one_or_zero_switches_a_term_off_and_drowns_nothing():
    assert drowned(kd_weight=1.0) is None
    assert drowned(kd_weight=0.0) is None


def test_a_high_temperature_on_far_logits_drowns_the_cross_entropy():
    assert drowned(temperature=1.0, scale=500.0) is None
    assert drowned(temperature=60.0, scale=500.0) == ("kl", "ce")


def test_many_classes_drown_an_element_mean_kl_and_no_other():
    official = LossOptions("element_mean")
    assert drowned(classes=10, kd_weight=0.7, options=official) is None
    assert drowned(classes=200, options=official) == ("ce", "kl")
    assert drowned(classes=200) is None


def test_drowning_begins_above_its_ratio_and_the_feature_term_is_left_out():
    def warned(*gradients, names=("ce", "kl", "teskd_ce")):
        terms = [TermSize(n, 1.0, g) for n, g in zip(names, gradients, strict=False)]
        return preflight.warnings([], terms, None)

    assert warned(1.0, preflight.DROWNED) == []
    (warning,) = warned(1.0, 1.01 * preflight.DROWNED)
    assert "the term kl drowns ce" in warning and "30 times" in warning
    (warning,) = warned(1.0, 0.5, 100.0)
    assert "the term teskd_ce drowns kl" in warning and "200 times" in warning
    assert warned(1.0, 1e-9, names=("ce", "teskd_feature")) == []
    assert warned(1.0, 1e-9, names=("ce", "fitnet")) == []
    assert warned(1.0) == []


def test_a_teacher_worse_than_its_student_alone_is_named():
    teachers = [TeacherQuality("plane6", 0.81, 0.9), TeacherQuality("plane4", 0.525, 0.9)]
    (warning,) = preflight.warnings(teachers, [], 0.6)
    assert warning == "teacher plane4 (52.50 %) is worse than its student trained alone (60.00 %)"
    assert len(preflight.warnings(teachers, [], 0.9)) == 2
    assert preflight.warnings(teachers, [], 0.525) == []  # as good is not worse
    assert preflight.warnings(teachers, [], None) == []


@pytest.mark.parametrize(("value", "gradient"), [(np.nan, 1.0), (1.0, np.inf)])
def test_a_term_that_is_not_finite_is_named(value, gradient):
    terms = [TermSize("ce", 1.0, 1.0), TermSize("fitnet", value, gradient)]
    (warning,) = preflight.warnings([], terms, None)
    assert warning == "the term fitnet or its gradient is not finite"


# ------------------------------------------------------------------------------------------- words
def test_lines_say_teachers_terms_and_warnings():
    result = Preflight(
        [TeacherQuality("plane6", 0.8125, 0.912), TeacherQuality("plane4", 0.5, None)],
        [TermSize("ce", 1.2345, 0.052), TermSize("kl", 20.0, 1.5)],
        ["look out", "here too"],
    )
    assert result.lines() == [
        "  teacher plane6: 81.25 % on validation, agrees with the others on 91.2 %",
        "  teacher plane4: 50.00 % on validation",
        "  loss on one batch: ce 1.23 (gradient 0.052), kl 20 (gradient 1.5); a step is 1 times "
        "that of the labels alone",
        "  warning: look out",
        "  warning: here too",
    ]


def test_plain_training_has_no_lines_and_an_evolving_one_has_its_terms():
    assert Preflight([], [TermSize("ce", 1.0, 1.0)], []).lines() == []
    terms = [TermSize("teskd_ce", 1.0, 1.0), TermSize("teskd_feature", 1e-7, 1e-8)]
    (line,) = Preflight([], terms, []).lines()
    expected = "teskd_ce 1 (gradient 1), teskd_feature 1e-07 (gradient 1e-08)"
    assert line.startswith(f"  loss on one batch: {expected}; a step is")


def test_a_step_that_is_larger_than_that_of_the_labels_is_said_with_a_remedy():
    terms = [TermSize("ce", 1.0, 1.0), TermSize("kl", 20.0, 8.0)]
    assert preflight.warnings([], terms, None, step=2.9, rate=0.1) == []
    (line,) = preflight.warnings([], terms, None, step=4.0, rate=0.1)
    assert line.startswith("the loss makes a step 4.0 times as large") and "by kl" in line
    assert "a learning rate of 0.025 in the place of 0.1" in line


@pytest.mark.parametrize(("loss", "warned"), [(1.38, False), (1.39, True), (np.inf, True)])
def test_a_first_epoch_that_ends_above_guessing_is_said(loss, warned):
    line = preflight.first_epoch_warning(loss, 4, 0.5)
    assert bool(line) == warned and (not warned or "ln(4) = 1.386" in line)


def test_the_record_survives_json():
    result = Preflight(
        preflight.teacher_quality(("a",), [np.asarray(TEACHERS[0])], np.asarray(LABELS)),
        sizes_of(balanced(), outputs_of(STUDENT), LABELS, TEACHERS, HYPER),
        ["a warning"],
    )
    stored = json.loads(json.dumps(preflight.as_json(result)))
    assert stored["teachers"] == [result.teachers[0]._asdict()]
    assert [term["name"] for term in stored["terms"]] == ["ce", "kl"]
    assert stored["terms"][1]["gradient"] == result.terms[1].gradient
    assert stored["warnings"] == ["a warning"]
