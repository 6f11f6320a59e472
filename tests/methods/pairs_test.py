"""Of any pair of networks a method says in words why it cannot teach it, or it teaches it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of, outputs_of

from distill_jax import methods
from distill_jax.methods import METHODS, Shapes

B, C = 6, 4


def shown(*maps, feature=(5,), size=B, stem=(8, 8, 3)):
    """Outputs of which maps have these shapes, the stem among them, and the vector this one."""

    def some(*shape):
        return jax.ShapeDtypeStruct((size, *shape), jnp.float32)

    stages = tuple(some(*shape) for shape in maps)
    vector = None if feature is None else some(*feature)
    stem = None if stem is None else some(*stem)
    return outputs_of(some(C), vector, stages=stages, preacts=stages, stem=stem)


THIN, WIDE = shown((8, 8, 3), (4, 4, 5)), shown((8, 8, 7), (4, 4, 11), feature=(11,))
PAIRS = {
    "equal": (THIN, THIN),
    "other channels": (THIN, WIDE),
    "a half": (THIN, shown((4, 4, 3), (2, 2, 5))),
    "the double": (shown((4, 4, 3), (2, 2, 5)), THIN),
    "odd sizes": (THIN, shown((7, 7, 3), (5, 5, 5), feature=(9,))),
    "higher and less wide": (shown((8, 2, 3), (8, 2, 5)), shown((4, 6, 7), (4, 6, 11))),
    "one stage more": (THIN, shown((8, 8, 7), (4, 4, 11), (2, 2, 13), feature=(13,))),
    "one stage": (shown((8, 8, 3)), shown((8, 8, 7))),
    "growing maps": (shown((4, 9, 3), (6, 8, 5)), shown((4, 9, 3), (6, 8, 5))),
    "no stages": (shown(stem=None), WIDE),
    "no stages of the teacher": (THIN, shown(stem=None, feature=(11,))),
    "no vector": (shown((8, 8, 3), (4, 4, 5), feature=None), WIDE),
    "no vector of the teacher": (THIN, shown((8, 8, 7), (4, 4, 11), feature=None)),
    "a map for a vector": (THIN, shown((8, 8, 7), (4, 4, 11), feature=(2, 11))),
    "rows of words": (shown((9, 3), (9, 5), stem=None), shown((9, 7), (9, 11), stem=None)),
    "a batch of one": (shown((8, 8, 3), (4, 4, 5), size=1), shown((8, 8, 7), size=1)),
}
EXITS = THIN._replace(branches=(THIN, THIN))
BRANCHED = (EXITS, EXITS)


def taught(method, shapes):
    """Traces what a step does with a method."""

    def head(outputs):
        return lambda feature: feature @ jnp.zeros((outputs.feature.shape[-1], C))

    def step(key, student, teachers):
        variables = method.init(key, shapes)
        context = dataclasses.replace(
            context_of(student, teachers),
            inputs=jnp.zeros((len(student.logits), 8, 8, 3)),
            index=jnp.arange(len(student.logits)),
            position=jnp.arange(len(student.logits)),
            key=key,
            head=head(student),
            teacher_heads=tuple(map(head, teachers)),
            teacher_apply=lambda k, inputs: teachers[k],
            student_apply=lambda inputs: student,
            view=student,
            partner=student,
        )
        terms, _ = method.terms(variables, context)
        return sum(term.weight * jnp.mean(term.value) for term in terms.values())

    key = jax.random.key(0)
    return jax.eval_shape(jax.value_and_grad(step, 1), key, shapes.student, shapes.teachers)


def refused(name, pair):
    """Why a method cannot teach a pair; None where it was seen to."""
    inputs = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    shapes = Shapes(pair[0], (pair[1],), C, 20, inputs, labels=np.arange(20) % C)
    method = methods.build(name).for_shapes(shapes)
    try:
        method.check(shapes)
    except ValueError as error:
        return str(error)
    taught(method, shapes)
    return None


@pytest.mark.parametrize("name", METHODS)
def test_a_method_teaches_a_pair_or_says_why_not(name):
    if METHODS[name].trains_branches:
        for outputs in PAIRS.values():
            reason = refused(name, outputs)
            assert re.fullmatch(rf"{name} needs a network with branches, such as \w+:\w+", reason)
        assert refused(name, BRANCHED) is None
        return
    for pair, outputs in PAIRS.items():
        reason = refused(name, outputs)
        if reason is not None:
            assert reason.startswith(name) and "\n" not in reason, (pair, reason)
            assert re.search(r"expected|has none|feature maps 0 to", reason), (pair, reason)
            assert re.search("student|teacher|batch|a map of", reason), (pair, reason)


LINKS = {"n3", "l2"}  # of networks that show embeddings, and no maps
SIZES = {"at", "nst", "vid", "kdsvd", "fsp", "ab", "fitnet"}


@pytest.mark.parametrize("name", METHODS)
def test_maps_of_sizes_that_do_not_fit_are_named_of_both_with_what_would(name):
    reason = refused(name, PAIRS["higher and less wide"])
    assert name not in SIZES or reason is not None
    others = METHODS[name].trains_branches or name in LINKS or name == "ca_mkd"
    if reason is not None and not others:
        assert re.search(r"8.{1,2}2\D.*4.{1,2}6\D.*expected", reason), reason


NO_VECTOR, LONG = THIN._replace(feature=None), shown((8, 8, 3), feature=(11,))


@pytest.mark.parametrize(
    ("name", "options", "branches", "said"),
    [
        ("okddip", {}, (THIN, LONG), r"expected one length of all, got \(5,\), \(11,\)"),
        ("okddip", {}, (THIN, NO_VECTOR), r"expected one length of all, got \(5,\), none"),
        ("byot", {"form": "conference"}, (LONG,), r"expected one length of all, got \(5,\), \(11"),
        ("byot", {}, (THIN, NO_VECTOR), "teacher 2 has none"),
        ("byot", {}, (THIN, LONG), None),
        ("okddip", {}, (LONG, LONG), None),
    ],
)
def test_branches_that_cannot_be_compared_are_refused(name, options, branches, said):
    shapes = Shapes(THIN._replace(branches=branches), (), C, 20)
    method = methods.build(name, options)
    if said is None:
        method.check(shapes)
        taught(method, shapes)
        return
    with pytest.raises(ValueError, match=said):
        method.check(shapes)


def test_exits_of_one_stage_have_no_gate_and_of_plain_peers_no_exits():
    alone = shown((8, 8, 3))._replace(branches=(THIN,))
    with pytest.raises(ValueError, match="expected two stages or more of the student, got 1"):
        methods.build("one").check(Shapes(alone, (), C, 20))
    single = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), EXITS)
    with pytest.raises(ValueError, match="one normalises vectors over the batch: expected at"):
        methods.build("one").check(Shapes(single, (), C, 20))
    with pytest.raises(ValueError, match="expected branches of teacher 2 too.*dks:resnet20, got"):
        methods.build("dcm").check(Shapes(EXITS, (EXITS, THIN), C, 20))


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (jax.ShapeDtypeStruct((1, 9), jnp.int32), r"int32 of \(9,\)"),
        ({"a": PAIRS["equal"][0].feature, "b": PAIRS["equal"][0].feature}, "float32 of .*, float"),
    ],
)
def test_what_cannot_be_moved_is_refused_by_what_moves_it(inputs, said):
    shapes = Shapes(THIN, (WIDE,), C, 20, inputs)
    with pytest.raises(ValueError, match=f"bss moves images: the networks take {said}.*expected"):
        methods.build("bss").check(shapes)
