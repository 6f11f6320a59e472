"""CRD: its equations by hand, what it draws, what its memory keeps, and what it refuses."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of, outputs_of

from distill_jax import methods
from distill_jax.methods import CRD, Shapes

B, N, C, D, K = 4, 14, 3, 6, 5
DRAW = np.random.default_rng(0)
LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 2, 1, 0, 0], np.int32)  # 6, 4 and 4
INDEX = np.array([3, 9, 1, 12], np.int32)
STUDENT = outputs_of(jnp.zeros((B, C)), jnp.asarray(DRAW.standard_normal((B, 5)), jnp.float32))
TEACHERS = tuple(
    outputs_of(jnp.zeros((B, C)), jnp.asarray(DRAW.standard_normal((B, n)), jnp.float32))
    for n in (7, 3)
)
METHOD = CRD(embedding_size=D, negatives=K)


def shapes_of(student=STUDENT, teachers=TEACHERS, labels=LABELS):
    return Shapes(*jax.eval_shape(lambda: (student, teachers)), C, N, labels=labels)


@functools.cache
def variables(method=METHOD):
    return method.init(jax.random.key(1), shapes_of())


def given(student=STUDENT, teachers=TEACHERS, mask=(True, True), step=0, **others):
    index = jnp.asarray(INDEX)
    return context_of(
        student,
        teachers,
        jnp.asarray(mask),
        jnp.asarray(LABELS)[index],
        index=index,
        position=jnp.arange(B),
        key=jax.random.fold_in(jax.random.key(2), step),
        **others,
    )


@functools.partial(jax.jit, static_argnums=0)
def evaluated(method, variables, student, teachers, mask, step=0):
    """(values, variables after, gradients by parameters and the student's vector)."""

    def loss(params, feature):
        context = given(student._replace(feature=feature), teachers, mask, step)
        terms, after = method.terms({**variables, "params": params}, context)
        (term,) = terms.values()
        return term.weight * jnp.mean(term.value), (term.value, after)

    both = jax.grad(loss, (0, 1), has_aux=True)
    gradients, (value, after) = both(variables["params"], student.feature)
    return value, after, gradients


def step_of(variables, mask=(True, True), step=0, method=METHOD):
    return evaluated(method, variables, STUDENT, TEACHERS, jnp.asarray(mask), step)


# --------------------------------------------------------------------------------------- by hand
def by_hand(memory, params, teacher, drawn, temperature=0.07, momentum=0.5):
    """(values, banks after, Z) of one edge in float64; `drawn` has the places of each example."""
    double = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
    memory, params = double(memory), double(params)
    embedded, banks, values, z = {}, {}, np.zeros(B), []
    for who, outputs in (("student", STUDENT), ("teacher", teacher)):
        own = params[who]["linear"]
        x = np.asarray(outputs.feature, np.float64) @ own["kernel"] + own["bias"]
        embedded[who] = x / np.linalg.norm(x, axis=1, keepdims=True)
    for i, (who, other) in enumerate((("student", "teacher"), ("teacher", "student"))):
        rows = memory[other][np.column_stack([INDEX, drawn])]  # (B, 1 + K, D)
        scores = np.exp(np.einsum("bd,bkd->bk", embedded[who], rows) / temperature)
        z.append(np.exp(memory["log_z"][i]) if memory["fixed"] else N * scores.mean())
        o, c = scores / z[i], K / N
        values -= np.log(o[:, 0] / (o[:, 0] + c + 1e-7))
        values -= np.log(c / (o[:, 1:] + c + 1e-7)).sum(1)
        banks[who] = memory[who].copy()
        mixed = momentum * memory[who][INDEX] + (1 - momentum) * embedded[who]
        banks[who][INDEX] = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
    return values, banks, np.array(z)


def places_drawn(step):
    drawn = np.asarray(METHOD.draw(variables()["split"], given(step=step)))
    return np.stack([np.flatnonzero(row) for row in drawn])


def test_two_steps_equal_float64():
    """The first fixes Z and the second keeps it; the teachers' losses add up."""
    before = variables()
    for step in range(2):
        value, after, _ = step_of(before, step=step)
        expected = np.zeros(B)
        for k, teacher in enumerate(TEACHERS):
            memory, params = before["memory"][str(k)], before["params"][str(k)]
            one, banks, z = by_hand(memory, params, teacher, places_drawn(step))
            expected += one
            own = after["memory"][str(k)]
            for who in banks:
                np.testing.assert_allclose(own[who], banks[who], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(np.exp(own["log_z"]), z, rtol=1e-4)
            assert own["fixed"]
        np.testing.assert_allclose(value, expected, rtol=1e-4)
        before = after
    first, second = variables()["memory"], before["memory"]
    moved = np.any(np.asarray(first["0"]["student"]) != second["0"]["student"], 1)
    assert set(np.flatnonzero(moved)) == set(INDEX)


def test_both_embeddings_learn_and_what_is_kept_does_not():
    _, after, (by_params, by_student) = step_of(variables())
    assert all(np.any(x) for x in jax.tree.leaves((by_params, by_student)))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, variables())
    chex.assert_trees_all_equal(after["split"], variables()["split"])


# ------------------------------------------------------------------------------- what is drawn
def test_negatives_are_of_other_classes_and_others_at_each_step_and_for_each_example():
    draw = jax.jit(jax.vmap(lambda i: METHOD.draw(variables()["split"], given(step=i))))
    drawn = np.asarray(draw(jnp.arange(300)))
    np.testing.assert_array_equal(drawn.sum(-1), K)
    others = LABELS[INDEX][:, None] != LABELS
    assert not drawn[:, ~others].any()
    for share, row in zip(drawn.mean(0), others, strict=True):  # 4 standard deviations
        expected = K / row.sum()
        gap = 4 * np.sqrt(expected * (1 - expected) / 300)
        assert np.abs(share[row] - expected).max() < gap
    assert not np.array_equal(drawn[0, 0], drawn[0, 3])  # of one class
    assert not np.array_equal(drawn[0], drawn[1])


@pytest.mark.parametrize(("asked", "drawn"), [(7, 7), (8, 8), (9, 8), (16384, 8)])
def test_no_more_are_drawn_than_every_class_has(asked, drawn):
    method = dataclasses.replace(METHOD, negatives=asked)
    found = np.asarray(method.draw(variables(method)["split"], given()))
    np.testing.assert_array_equal(found.sum(-1), drawn)  # of 8 for the largest class, and 10
    lines = method.warnings(shapes_of())
    assert (
        lines == [] if asked <= 8 else f"crd draws 8 negatives an example, not {asked}" in lines[0]
    )


def test_a_part_of_the_batch_draws_what_the_whole_does():
    whole = np.asarray(METHOD.draw(variables()["split"], given()))
    part = dataclasses.replace(
        given(), labels=jnp.asarray(LABELS)[INDEX[2:]], position=jnp.arange(2, B)
    )
    np.testing.assert_array_equal(METHOD.draw(variables()["split"], part), whole[2:])


# ----------------------------------------------------------------------------- dropped teachers
def test_a_dropped_teacher_adds_nothing_and_its_memory_stays_to_the_bit():
    zeros = TEACHERS[0], jax.tree.map(jnp.zeros_like, TEACHERS[1])  # what a dropped one shows
    mask = jnp.array([True, False])
    value, after, gradients = evaluated(METHOD, variables(), STUDENT, zeros, mask)
    chex.assert_tree_all_finite((value, gradients))
    chex.assert_trees_all_equal(after["memory"]["1"], variables()["memory"]["1"])
    assert not any(np.any(x) for x in jax.tree.leaves(gradients[0]["1"]))
    both, whole, _ = step_of(variables())
    chex.assert_trees_all_close(after["memory"]["0"], whole["memory"]["0"], rtol=1e-6)
    other, _, _ = step_of(variables(), (False, True))
    np.testing.assert_allclose(value + other, both, rtol=1e-5)


def test_z_is_that_of_the_first_batch_that_a_teacher_teaches():
    _, after, _ = step_of(variables(), (True, False))
    assert [bool(after["memory"][k]["fixed"]) for k in "01"] == [True, False]
    _, later, _ = step_of(after, step=1)
    _, alone, _ = step_of(variables(), step=1)
    chex.assert_trees_all_equal(later["memory"]["0"]["log_z"], after["memory"]["0"]["log_z"])
    chex.assert_trees_all_close(later["memory"]["1"], alone["memory"]["1"], rtol=1e-6)


# ------------------------------------------------------------------------------- what is degenerate
@pytest.mark.parametrize("temperature", [0.07, 1e-3])
def test_zeros_and_small_temperatures_give_finite_losses_gradients_and_memory(temperature):
    method = dataclasses.replace(METHOD, temperature=temperature)
    before = variables(method)
    silent = jax.tree.map(jnp.zeros_like, before["params"])  # embeddings of zeros
    opposite = step_of(before)[1]["memory"]["0"]["student"] * -1  # halfway there is nothing
    memory = {**before["memory"], "0": {**before["memory"]["0"], "student": opposite}}
    for changed in ({"params": silent}, {"memory": memory}, {}):
        found = step_of({**before, **changed}, method=method)
        chex.assert_tree_all_finite(found)
        assert max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(found[2])) < 1e6


def test_half_precision_is_widened():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (STUDENT, TEACHERS))
    value, after, _ = evaluated(METHOD, variables(), *half, jnp.array([True, True]))
    assert value.dtype == jnp.float32
    chex.assert_trees_all_equal_shapes_and_dtypes(after, variables())
    np.testing.assert_allclose(value, step_of(variables())[0], rtol=0.1)


def test_several_seeds_at_once_are_each_of_them_alone():
    seeds = [METHOD.init(jax.random.key(seed), shapes_of()) for seed in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *seeds)
    mask = jnp.array([True, True])
    together = jax.vmap(lambda own: evaluated(METHOD, own, STUDENT, TEACHERS, mask))(stacked)
    for i, own in enumerate(seeds):
        one = jax.tree.map(lambda x, i=i: x[i], together)
        chex.assert_trees_all_close(one, step_of(own), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negatives": 0}, "crd's negatives is a whole number above 0, got 0"),
        ({"embedding_size": 1.5}, "crd's embedding_size is a whole number above 0, got 1.5"),
        ({"temperature": 0}, "crd's temperature is a number above 0, got 0"),
        ({"momentum": 1.5}, "crd's momentum is a number between 0 and 1, got 1.5"),
    ],
)
def test_numbers_out_of_their_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        methods.build("crd", options)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (shapes_of(labels=None), "draws examples of other classes: expected the labels of all"),
        (shapes_of(labels=np.ones(N, np.int32)), "of other classes: all 14 have the same"),
        (shapes_of(TEACHERS[0]._replace(feature=None)), "the student has none"),
    ],
)
def test_what_has_no_vectors_or_no_other_class_is_refused(shapes, message):
    METHOD.check(shapes_of())
    with pytest.raises(ValueError, match=message):
        METHOD.check(shapes)
