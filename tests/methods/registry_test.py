"""Methods by name, and functions of one edge as methods."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of, outputs_of

from distill_jax import methods
from distill_jax.methods import KD, TESKD, CrossEntropy, Hyper, LossOptions, Method, Shapes, Term
from distill_jax.methods import registry as registry_module
from distill_jax.methods.base import OUTPUTS
from distill_jax.methods.fitnet import FitNet
from distill_jax.methods.registry import EdgeMethod

B, C, F = 4, 3, 5
RANDOM = np.random.default_rng(0)


def drawn(*shape):
    return jnp.asarray(RANDOM.standard_normal(shape), jnp.float32)


def shown(channels):
    return outputs_of(drawn(B, C), drawn(B, F), stages=(drawn(B, 2, 2, channels),))


STUDENT, TEACHERS = shown(2), (shown(3), shown(4))


def gap(student, teacher, labels, hyper):
    """A loss of one edge."""
    own = jnp.square(student.feature - teacher.feature).mean(-1)
    return hyper.temperature * own + teacher.stages[0].mean((1, 2, 3)) * labels


@dataclasses.dataclass(frozen=True)
class Scaled(Method):
    """Some number of the logits."""

    factor: float = 2.0
    layers: tuple[int, ...] = (1, 2)

    def terms(self, variables, context):
        """{"scaled"}."""
        return {"scaled": Term(self.factor * context.student.logits.mean(-1))}, variables


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What is registered in a test is forgotten after it."""
    monkeypatch.setattr(registry_module, "_registered", {})


# ----------------------------------------------------------------------- a function of one edge
@pytest.mark.parametrize("mask", [[1, 1], [1, 0], [0, 1], [0, 0]])
def test_the_values_of_kept_teachers_add_up(mask):
    labels, hyper = jnp.arange(B), Hyper(temperature=3.0)
    context = context_of(STUDENT, TEACHERS, jnp.array(mask, bool), labels, hyper)
    methods.register_method("gap", gap)
    terms, after = methods.build("gap").terms({}, context)
    assert terms.keys() == {"gap"} and terms["gap"].weight == 1.0 and after == {}
    want = sum(k * gap(STUDENT, t, labels, hyper) for k, t in zip(mask, TEACHERS, strict=True))
    np.testing.assert_allclose(terms["gap"].value, want, rtol=1e-6)


def test_its_gradient_is_that_of_the_kept_alone():
    def total(feature):
        student = STUDENT._replace(feature=feature)
        context = context_of(student, TEACHERS, jnp.array([False, True]))
        return EdgeMethod(name="gap", loss=gap).terms({}, context)[0]["gap"].value.sum()

    want = 2 * (STUDENT.feature - TEACHERS[1].feature) / F
    np.testing.assert_allclose(jax.grad(total)(STUDENT.feature), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "measure",
    [
        lambda f: f / jnp.linalg.norm(f, axis=-1, keepdims=True),
        lambda f: (f - f.mean(-1, keepdims=True)) / f.std(-1, keepdims=True),
        lambda f: jnp.log(jnp.abs(f)),
    ],
    ids=["direction", "standard", "logarithm"],
)
def test_a_dropped_teacher_whose_zeros_have_no_such_measure_leaves_no_trace(measure):
    def loss(student, teacher, labels, hyper):
        return jnp.square(measure(student.feature) - measure(teacher.feature)).sum(-1)

    @jax.jit
    def gradient(feature, teachers, mask):
        def total(feature):
            context = context_of(STUDENT._replace(feature=feature), teachers, mask)
            return EdgeMethod(name="m", loss=loss).terms({}, context)[0]["m"].value.sum()

        return jax.value_and_grad(total)(feature)

    dropped = jax.tree.map(jnp.zeros_like, TEACHERS[0])
    found = gradient(STUDENT.feature, (dropped, TEACHERS[1]), jnp.array([False, True]))
    want = gradient(STUDENT.feature, TEACHERS[1:], jnp.array([True]))
    chex.assert_trees_all_close(found, want, rtol=1e-5, atol=1e-6)
    chex.assert_tree_all_finite(found)
    assert np.any(found[1])


def test_one_that_gives_no_number_an_example_is_refused():
    shapes = jax.eval_shape(lambda: Shapes(STUDENT, TEACHERS, C, 8))
    EdgeMethod(name="gap", loss=gap).check(shapes)
    for loss, given in (
        (lambda *edge: gap(*edge).mean(), r"\(\)"),
        (lambda s, t, labels, hyper: s.logits - t.logits, r"\(4, 3\)"),
        (lambda *edge: (gap(*edge),), r"\(ShapeDtypeStruct"),
    ):
        message = f"'gap' gives {given}.* for a batch of 4: expected one number an example, .4,."
        with pytest.raises(ValueError, match=message):
            EdgeMethod(name="gap", loss=loss).check(shapes)


def test_it_needs_what_is_said_or_what_it_reads():
    methods.register_method("gap", gap)
    methods.register_method("told", gap, needs=("stages",))
    shapes = jax.eval_shape(lambda: Shapes(STUDENT, TEACHERS, C, 8))
    read = methods.build("gap").for_shapes(shapes).needs
    assert set(read) == {"feature", "stages"} < set(OUTPUTS)
    assert methods.build("told").for_shapes(shapes).needs == ("stages",)


# ---------------------------------------------------------------------------------------- by name
def test_the_librarys_methods_are_there_with_their_numbers():
    assert methods.names()[: len(methods.METHODS)] == tuple(methods.METHODS)
    assert methods.build("kd") == KD() and methods.build("teskd") == TESKD()
    assert methods.build("fitnet", {"hint_layer": 1}) == FitNet(1)
    assert methods.build("ce") == CrossEntropy()


def test_a_registered_method_takes_its_numbers_and_replaces_the_one_before():
    methods.register_method("scaled", Scaled(3.0))
    assert methods.names()[-1] == "scaled"
    assert methods.build("scaled") == Scaled(3.0)
    assert methods.build("scaled", {"layers": [4]}) == Scaled(3.0, (4,))
    hash(methods.build("scaled", {"layers": [4]}))
    methods.register_method("scaled", Scaled(5.0))
    assert methods.build("scaled") == Scaled(5.0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "kdd",
            {},
            "unknown method 'kdd'; did you mean 'kd'.* There are ce, kd, dml, teskd, fitnet",
        ),
        ("zzz", {}, "unknown method 'zzz'. There are ce"),
        ("fitnet", {"layer": 1}, "'fitnet' has no option 'layer': there are hint_layer"),
        ("scaled", {"factr": 1.0}, "'scaled' has no option 'factr': there are factor, layers"),
        ("gap", {"loss": 1.0}, "'gap' has no option 'loss': it has none"),
    ],
)
def test_names_and_options_that_are_not_there_are_refused(name, options, message):
    methods.register_method("scaled", Scaled())
    methods.register_method("gap", gap)
    with pytest.raises(ValueError, match=message):
        methods.build(name, options)


@dataclasses.dataclass(frozen=True)
class Unhashable(Method):
    """Holds what no method may."""

    numbers: list = dataclasses.field(default_factory=list)


@pytest.mark.parametrize(
    ("name", "method", "others", "message"),
    [
        ("my loss", gap, {}, "identifier such as 'my_loss', got 'my loss'"),
        (3, gap, {}, "identifier such as 'my_loss', got 3"),
        ("kd", gap, {}, "'kd' is a method of the library"),
        ("mine", Scaled, {}, "expected an instance of distill_jax.methods.Method or a function"),
        ("mine", "gap", {}, "expected an instance"),
        ("mine", lambda student, teacher: 0.0, {}, r"expected \(student, teacher, labels, hyper\)"),
        ("mine", gap, {"needs": ("features",)}, "needs are of .*feature.*, got features"),
        ("mine", Unhashable(), {}, "cannot be hashed .*list.*: expected a frozen dataclass"),
    ],
)
def test_what_cannot_be_registered(name, method, others, message):
    with pytest.raises(ValueError, match=message):
        methods.register_method(name, method, **others)
    assert methods.names() == tuple(methods.METHODS)


# ------------------------------------------------------------------------------------ the identity
def test_numbers_at_their_default_add_nothing_to_the_identity():
    assert methods.identity_of("kd", KD()) == {"name": "kd"}
    assert methods.identity_of("fitnet", FitNet(2, None)) == {"name": "fitnet"}
    assert methods.identity_of("fitnet", FitNet(1)) == {
        "name": "fitnet",
        "options": {"hint_layer": 1},
    }
    found = methods.identity_of("kd", KD(LossOptions("element_mean")))
    assert found["options"] == {"options": {"kl_reduction": "element_mean"}}


def test_a_registered_methods_identity_is_its_version_numbers_and_code():
    def identity(method, version="1"):
        methods.register_method("mine", method, version)
        return methods.identity_of("mine", methods.build("mine"))

    first = identity(gap)
    assert first["name"] == "mine" and first["version"] == "1" and first == identity(gap)
    others = [
        identity(gap, "2"),
        identity(lambda student, teacher, labels, hyper: 2 * gap(student, teacher, labels, hyper)),
        identity(Scaled()),
        identity(Scaled(3.0)),
    ]
    texts = [str(other) for other in (first, *others)]
    assert len(set(texts)) == 5
    assert not any(" at 0x" in text for text in texts)
