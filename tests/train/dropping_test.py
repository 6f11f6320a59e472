"""Stochastic teaching: how many teachers go, which, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import rng
from distill_jax.train.dropping import Dropping, keep_mask

DRAWS = 4000


def masks(dropping, teachers, survival=1.0, seed=0):
    """(DRAWS, K) booleans, of the steps of one run."""
    # Not under one jit: what is compiled for a number of teachers then serves every rule.
    steps = jnp.arange(DRAWS)
    keys = jax.vmap(lambda step: rng.stream(jax.random.key(seed), "teacher_drop", step))(steps)
    return np.asarray(jax.vmap(lambda key: keep_mask(dropping, key, teachers, survival))(keys))


def chi_square(counts):
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(("teachers", "droppable"), [(1, True), (2, False), (4, True), (5, False)])
def test_fixed_drops_exactly_its_number(teachers, droppable):
    for number in range(teachers + droppable):
        dropped = ~masks(Dropping("fixed", number, droppable), teachers)
        np.testing.assert_array_equal(dropped.sum(1), number)
        assert droppable or not dropped[:, 0].any()


@pytest.mark.parametrize(("teachers", "droppable"), [(4, True), (5, False)])
def test_fixed_drops_every_teacher_equally_often(teachers, droppable):
    dropped = ~masks(Dropping("fixed", 1, droppable), teachers)
    counts = dropped[:, teachers - 4 :].sum(0)
    assert counts.sum() == DRAWS
    assert chi_square(counts) < 18  # 3 degrees of freedom: exceeded once in 2000


def test_fixed_drops_every_pair_equally_often():
    dropped = ~masks(Dropping("fixed", 2), 4)
    pairs = np.unique(dropped @ (1 << np.arange(4)), return_counts=True)[1]
    assert len(pairs) == 6 and chi_square(pairs) < 22


@pytest.mark.parametrize("survival", [0.0, 0.25, 0.75, 1.0])
@pytest.mark.parametrize("droppable", [True, False])
def test_bernoulli_keeps_each_teacher_with_its_probability(survival, droppable):
    keep = masks(Dropping("bernoulli", teacher_droppable=droppable), 4, survival)
    often = keep.mean(0)
    bound = 4.5 * np.sqrt(survival * (1 - survival) / DRAWS)
    assert (np.abs(often[1:] - survival) <= bound).all()
    assert abs(often[0] - (survival if droppable else 1.0)) <= bound
    if 0 < survival < 1:
        together = np.corrcoef(keep[:, 1:].T) - np.eye(3)
        assert np.abs(together).max() < 4.5 / np.sqrt(DRAWS)


def test_bernoulli_may_drop_all():
    keep = masks(Dropping("bernoulli"), 2, 0.25)
    assert np.abs((~keep).all(1).mean() - 0.75**2) < 0.04


@pytest.mark.parametrize("dropping", [Dropping("fixed"), Dropping("bernoulli")])
def test_a_mask_is_a_function_of_seed_and_step(dropping):
    first = masks(dropping, 4, 0.5)
    np.testing.assert_array_equal(first, masks(dropping, 4, 0.5))
    assert (first != masks(dropping, 4, 0.5, seed=1)).any()
    changes = (first[1:] != first[:-1]).any(1).mean()
    assert abs(changes - (3 / 4 if dropping.kind == "fixed" else 15 / 16)) < 0.04


@pytest.mark.parametrize(
    ("dropping", "teachers", "expected"),
    [
        (Dropping(), 3, [True] * 3),
        (Dropping("fixed", 0), 3, [True] * 3),
        (Dropping("fixed", 3), 3, [False] * 3),
        (Dropping("fixed", 2, False), 3, [True, False, False]),
        (Dropping("fixed", 1), 1, [False]),
        (Dropping("fixed", 1, False), 1, [True]),
        (Dropping("bernoulli", teacher_droppable=False), 1, [True]),
        (Dropping("fixed", 0), 0, []),
        (Dropping("bernoulli"), 0, []),
        (Dropping("bernoulli", teacher_droppable=False), 0, []),
    ],
)
def test_what_leaves_no_choice_is_no_draw(dropping, teachers, expected):
    keep = keep_mask(dropping, jax.random.key(0), teachers, 0.5)
    assert keep.dtype == bool and keep.shape == (teachers,)
    assert keep.tolist() == expected


def test_survival_is_traced():
    traces = []

    @jax.jit
    def draw(key, survival):
        traces.append(survival)
        return keep_mask(Dropping("bernoulli"), key, 4, survival)

    draw(jax.random.key(0), jnp.float32(0.5))
    assert draw(jax.random.key(0), jnp.float32(1.0)).all()
    assert not draw(jax.random.key(0), jnp.float32(0.0)).any()
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("dropping", "teachers", "survival", "message"),
    [
        (Dropping("fixed", 1), 2, 1.0, ""),
        (Dropping("fixed", 1, False), 3, 1.0, ""),
        (Dropping("bernoulli", 9), 1, 0.5, ""),
        (Dropping("none", 9), 1, 0.0, ""),
        (Dropping("fixed", 2), 1, 1.0, "cannot drop 2 of 1"),
        (Dropping("fixed", 1, False), 1, 1.0, "cannot drop 1 of 1"),
        (Dropping("fixed", 4), 3, 1.0, "cannot drop 4 of 3"),
        (Dropping("fixed", 1), 1, 1.0, "dropping 1 of 1 teachers drops the same ones"),
        (Dropping("fixed", 3), 3, 1.0, "dropping 3 of 3 teachers drops the same ones"),
        (Dropping("fixed", 1, False), 2, 1.0, "dropping 1 of 2 teachers all but the first drops"),
        (Dropping("bernoulli"), 2, 0.0, "survival 0.0 drops of 2 teachers at every step"),
        (Dropping("bernoulli", 1, False), 1, 0.5, "there is nobody to drop"),
    ],
)
def test_a_teacher_that_would_never_teach_is_refused(dropping, teachers, survival, message):
    if not message:
        dropping.check(teachers, survival)
        return
    with pytest.raises(ValueError, match=message):
        dropping.check(teachers, survival)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "random"}, "dropping kind is one of .*bernoulli.*, got 'random'"),
        ({"number": -1}, "dropping number is 0 or more, got -1"),
    ],
)
def test_impossible_rules_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Dropping(**values)
