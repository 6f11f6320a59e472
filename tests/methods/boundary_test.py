"""BSS: which examples are attacked, where they go, when it fades."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of, outputs_of

from distill_jax.methods import BSS, build

B, C, F = 6, 3, 4
RANDOM = np.random.default_rng(0)
IMAGES = jnp.asarray(RANDOM.normal(size=(B, 2, 2, 1)), jnp.float32)
OWN, TEACHER = (jnp.asarray(RANDOM.normal(size=(F, C)), jnp.float32) for _ in range(2))


def shown(weights, images):
    return outputs_of(images.reshape(len(images), -1) @ weights)


def context(labels, images=IMAGES, epoch=0.0, mask=(True,), weights=OWN):
    return context_of(
        shown(weights, images),
        (shown(TEACHER, images),) * len(mask),
        jnp.array(mask),
        labels,
        inputs=images,
        epoch=epoch,
        key=jax.random.key(1),
        teacher_apply=lambda k, x: shown(TEACHER, x),
        student_apply=functools.partial(shown, weights),
    )


def values(method, *args, **options):
    term = method.terms({}, context(*args, **options))[0]["bss"]
    return term.value, term.weight


def test_images_end_where_the_teacher_hesitates_between_two_classes():
    before = shown(TEACHER, IMAGES).logits
    first = jnp.argmax(before, -1)
    other = (first + 1) % C
    method = BSS(steps=40)
    moved = method.attack(lambda x: shown(TEACHER, x).logits, IMAGES, other)
    after, rows = shown(TEACHER, moved).logits, np.arange(B)
    nearer = jnp.abs(after[rows, first] - after[rows, other])
    assert np.all(nearer < 0.2 * (before[rows, first] - before[rows, other]))
    assert np.all(jnp.abs(moved) <= 2.5)
    # Along the straight line that leads from one class to the other, as far as one step goes.
    one = BSS(steps=1).attack(lambda x: shown(TEACHER, x).logits, IMAGES, other)
    direction = TEACHER[:, other] - TEACHER[:, first]
    lengths = jnp.linalg.norm(direction, axis=0, keepdims=True)
    direction = (direction / lengths).T.reshape(IMAGES.shape)
    length = 0.3 * (before[rows, first] - before[rows, other] + 1e-4)
    wanted = IMAGES + length[:, None, None, None] * direction
    np.testing.assert_allclose(one, jnp.clip(wanted, -2.5, 2.5), rtol=1e-5, atol=1e-6)


def test_examples_that_either_network_gets_wrong_are_left_out():
    labels = jnp.argmax(shown(TEACHER, IMAGES).logits, -1)
    right = np.asarray(jnp.argmax(shown(OWN, IMAGES).logits, -1) == labels)
    assert 0 < right.sum() < B
    found, _ = values(BSS(), labels)
    np.testing.assert_array_equal(np.asarray(found > 0), right)
    nobody, _ = values(BSS(), (labels + 1) % C)
    np.testing.assert_array_equal(nobody, np.zeros(B))


def test_of_those_the_ones_that_differ_most_are_taken_and_averaged():
    labels = jnp.argmax(shown(TEACHER, IMAGES).logits, -1)
    near = 1.5 * TEACHER + 0.01 * OWN  # a student that is right everywhere
    p, q = (jax.nn.softmax(shown(w, IMAGES).logits) for w in (near, TEACHER))
    gaps = jnp.sum(jnp.square(p - q) * (1 - jax.nn.one_hot(labels, C)), -1)
    all_of_them, _ = values(BSS(), labels, weights=near)
    found, _ = values(BSS(samples=2), labels, weights=near)
    taken = np.argsort(-gaps)[:2]
    np.testing.assert_allclose(found[taken], all_of_them[taken] * B / 2, rtol=1e-5)
    assert np.count_nonzero(found) == 2 and np.count_nonzero(all_of_them) == B


def test_it_fades_and_a_flat_teacher_moves_nothing():
    labels = jnp.argmax(shown(TEACHER, IMAGES).logits, -1)
    epochs = (0.0, 14.9, 15.0, 60.0, 200.0)
    weights = [values(BSS(), labels, epoch=epoch)[1] for epoch in epochs]
    np.testing.assert_allclose(weights, [1.0, 1 - 14 / 60, 0.75, 0.0, 0.0], rtol=1e-6)
    still = BSS().attack(lambda x: 0.0 * shown(TEACHER, x).logits, IMAGES, labels)
    np.testing.assert_array_equal(still, IMAGES)
    both, _ = values(BSS(), labels, mask=(True, True))
    one, _ = values(BSS(), labels, mask=(True, False))
    assert np.all(both >= one) and np.any(one)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="bss's steps is a whole number above 0, got 0"):
        build("bss", {"steps": 0})
    with pytest.raises(ValueError, match="bss's limit is a number above 0, got -1"):
        build("bss", {"limit": -1})
