"""Before the first step: teachers, weighted terms and their gradients, and what to worry about."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.methods import losses
from distill_jax.methods.losses import EvolveOptions, LossOptions
from distill_jax.models import Outputs
from distill_jax.train import preflight
from distill_jax.train.preflight import Preflight, Teacher, Term
from distill_jax.train.step import Hyper, evolving_objective, multi_teacher_objective

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
HYPER = Hyper(1.0, 0.0, 4.0, 0.7, 1.0)


def norm_of(function, *arguments):
    """The norm of the gradient of `function` by all of its arguments, by jax.grad."""
    gradients = jax.grad(function, tuple(range(len(arguments))))(*arguments)
    return np.sqrt(sum(np.sum(np.square(np.float64(g))) for g in jax.tree.leaves(gradients)))


def terms_of(*arguments):
    return preflight.look_at_terms(preflight.weighted_terms(*arguments))


# ----------------------------------------------------------------------------------------- teachers
def test_each_teacher_has_its_accuracy_and_its_mean_agreement_with_the_others():
    labels = np.array([0, 1, 2, 0])
    classes = {"a": [0, 1, 2, 1], "b": [0, 1, 1, 1], "c": [2, 2, 2, 2]}
    logits = [3 * np.eye(3)[picks] for picks in classes.values()]
    found = preflight.look_at_teachers(tuple(classes), logits, labels)
    assert [t.name for t in found] == ["a", "b", "c"]
    assert [t.accuracy for t in found] == [0.75, 0.5, 0.25]
    # a and b agree on 3 of 4, a and c on 1, b and c on none.
    assert [t.agreement for t in found] == pytest.approx([0.5, 0.375, 0.125])
    assert preflight.look_at_teachers(("a",), logits[:1], labels) == [Teacher("a", 0.75, None)]
    assert preflight.look_at_teachers((), [], labels) == []


# -------------------------------------------------------------------------------------------- terms
@pytest.mark.parametrize(
    "options",
    [LossOptions(), LossOptions("element_mean", "per_teacher"), LossOptions(teachers="mean")],
)
def test_terms_are_those_of_the_loss_with_all_teachers_and_their_gradients(options):
    found = terms_of(multi_teacher_objective(options), outputs_of(STUDENT), LABELS, TEACHERS, HYPER)
    assert [t.name for t in found] == ["ce", "kl"]

    def weighted(name, logits):
        terms = losses.multi_teacher(
            logits,
            LABELS,
            TEACHERS,
            jnp.ones(2, bool),
            temperature=4.0,
            kd_weight=0.7,
            options=options,
        )[1]
        return terms[f"weighted_{name}"].mean()

    for term in found:
        assert term.value == pytest.approx(float(weighted(term.name, STUDENT)), rel=1e-5)
        expected = norm_of(lambda s, name=term.name: weighted(name, s), STUDENT)
        assert term.gradient == pytest.approx(expected, rel=1e-5)


def test_the_gradients_of_cross_entropy_and_kl_by_hand():
    def softmax(x):
        e = np.exp(np.float64(x) - np.max(x, -1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    ce, kl = terms_of(
        multi_teacher_objective(LossOptions()), outputs_of(STUDENT), LABELS, TEACHERS[:1], HYPER
    )
    by_ce = 0.3 * (softmax(STUDENT) - np.eye(C)[LABELS]) / B
    by_kl = 0.7 * 4 * (softmax(STUDENT / 4) - softmax(TEACHERS[0] / 4)) / B
    assert ce.gradient == pytest.approx(np.linalg.norm(by_ce), rel=1e-5)
    assert kl.gradient == pytest.approx(np.linalg.norm(by_kl), rel=1e-5)


def test_without_teachers_there_is_the_cross_entropy_alone():
    (term,) = terms_of(
        multi_teacher_objective(LossOptions()), outputs_of(STUDENT), LABELS, TEACHERS[:0], HYPER
    )
    ce = losses.cross_entropy(STUDENT, LABELS).mean()
    assert term.name == "ce" and term.value == pytest.approx(float(ce))


@pytest.mark.parametrize("teachers", [0, 1])
def test_terms_of_an_evolving_network_see_every_exit(teachers):
    options = EvolveOptions(feature_weight=1e-3)
    outputs = outputs_of(STUDENT, branches=2)
    found = terms_of(
        evolving_objective(options, LossOptions()), outputs, LABELS, TEACHERS[:teachers], HYPER
    )
    assert {t.name for t in found} == {"ce", "kl", "feature", "frozen_kl"[: 9 * teachers]} - {""}
    exits = (outputs, *outputs.branches)
    stacked = (jnp.stack([e.logits for e in exits]), jnp.stack([e.feature for e in exits]))

    def weighted(name, logits, features):
        if name == "frozen_kl":
            taught = losses.kl_divergence(TEACHERS[0], logits[0], 4.0)
            return 0.7 * 16 * taught.mean()
        _, terms = losses.self_distillation(logits, features, LABELS, batch_size=B, options=options)
        return terms[f"weighted_{name}"].mean()

    for term in found:
        assert term.value == pytest.approx(float(weighted(term.name, *stacked)), rel=1e-5)
        expected = norm_of(lambda *seen, name=term.name: weighted(name, *seen), *stacked)
        assert term.gradient == pytest.approx(expected, rel=1e-5)


def test_the_norm_of_a_half_precision_gradient_is_taken_in_float32():
    wide = outputs_of(STUDENT, branches=1)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    objective = evolving_objective(EvolveOptions(feature_weight=1.0), LossOptions())
    found, expected = (
        terms_of(objective, outputs, LABELS, TEACHERS[:0], HYPER) for outputs in (narrow, rounded)
    )
    for mine, theirs in zip(found, expected, strict=True):
        # Each entry of the gradient is rounded to bfloat16, by half a place at most; its norm not.
        assert mine.gradient == pytest.approx(theirs.gradient, rel=2**-9)


# ------------------------------------------------------------------------------------------- worry
def drowned(temperature=4.0, kd_weight=0.5, classes=10, scale=2.0, options=LossOptions()):
    """(the drowning term, the drowned one) that are warned of; None where none is."""
    rng = np.random.RandomState(1)
    student, teacher = jnp.asarray(scale * rng.standard_normal((2, 8, classes)), jnp.float32)
    terms = terms_of(
        multi_teacher_objective(options),
        outputs_of(student),
        jnp.asarray(rng.randint(0, classes, 8)),
        teacher[None],
        Hyper(1.0, 0.0, temperature, kd_weight, 1.0),
    )
    warnings = preflight.worry([], terms, None)
    if not warnings:
        return None
    (warning,) = warnings
    words = warning.removeprefix("the term ").split(":")[0].split(" drowns ")
    ratio = max(t.gradient for t in terms) / min(t.gradient for t in terms)
    assert f"{ratio:.0f} times" in warning
    return tuple(words)


def test_the_usual_settings_worry_nobody():
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
    def warned(*gradients, names=("ce", "kl", "frozen_kl")):
        terms = [Term(n, 1.0, g) for n, g in zip(names, gradients, strict=False)]
        return preflight.worry([], terms, None)

    assert warned(1.0, preflight.DROWNED) == []
    (found,) = warned(1.0, 1.01 * preflight.DROWNED)
    assert "the term kl drowns ce" in found and "30 times" in found
    (found,) = warned(1.0, 0.5, 100.0)
    assert "the term frozen_kl drowns kl" in found and "200 times" in found
    assert warned(1.0, 1e-9, names=("ce", "feature")) == []
    assert warned(1.0) == []


def test_a_teacher_worse_than_its_student_alone_is_named():
    teachers = [Teacher("plane6", 0.81, 0.9), Teacher("plane4", 0.525, 0.9)]
    (found,) = preflight.worry(teachers, [], 0.6)
    assert found == "teacher plane4 (52.50 %) is worse than its student trained alone (60.00 %)"
    assert len(preflight.worry(teachers, [], 0.9)) == 2
    assert preflight.worry(teachers, [], 0.525) == []  # as good is not worse
    assert preflight.worry(teachers, [], None) == []


# ------------------------------------------------------------------------------------------- words
def test_lines_say_teachers_terms_and_warnings():
    found = Preflight(
        [Teacher("plane6", 0.8125, 0.912), Teacher("plane4", 0.5, None)],
        [Term("ce", 1.2345, 0.052), Term("kl", 20.0, 1.5)],
        ["look out", "here too"],
    )
    assert found.lines() == [
        "  teacher plane6: 81.25 % on validation, agrees with the others on 91.2 %",
        "  teacher plane4: 50.00 % on validation",
        "  loss on one batch: ce 1.23 (gradient 0.052), kl 20 (gradient 1.5)",
        "  warning: look out",
        "  warning: here too",
    ]


def test_plain_training_has_no_lines_and_an_evolving_one_has_its_terms():
    assert Preflight([], [Term("ce", 1.0, 1.0)], []).lines() == []
    (line,) = Preflight([], [Term("ce", 1.0, 1.0), Term("feature", 1e-7, 1e-8)], []).lines()
    assert line == "  loss on one batch: ce 1 (gradient 1), feature 1e-07 (gradient 1e-08)"


def test_the_record_survives_json():
    found = Preflight(
        preflight.look_at_teachers(("a",), [np.asarray(TEACHERS[0])], np.asarray(LABELS)),
        terms_of(
            multi_teacher_objective(LossOptions()), outputs_of(STUDENT), LABELS, TEACHERS, HYPER
        ),
        ["a warning"],
    )
    stored = json.loads(json.dumps(preflight.as_json(found)))
    assert stored["teachers"] == [found.teachers[0]._asdict()]
    assert [term["name"] for term in stored["terms"]] == ["ce", "kl"]
    assert stored["terms"][1]["gradient"] == found.terms[1].gradient
    assert stored["warnings"] == ["a warning"]
