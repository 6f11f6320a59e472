"""Metrics add up however the examples are split; random streams are functions of their names."""

import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import rng
from distill_jax.train import metrics

VALUES = np.random.RandomState(0).standard_normal(12).astype(np.float32)


@pytest.mark.parametrize(
    ("values", "total", "count"),
    [
        (VALUES, VALUES.sum(dtype=np.float64), 12),
        (VALUES[:0], 0.0, 0),
        (VALUES > 0, (VALUES > 0).sum(), 12),
    ],
)
def test_sum_and_count_are_of_all_examples(values, total, count):
    got_total, got_count = metrics.mean_of(values)
    np.testing.assert_allclose(got_total, total, rtol=1e-6)
    assert got_count == count and got_count.dtype == jnp.int32


def test_counts_of_booleans_are_exact_beyond_half_precision():
    total, count = metrics.mean_of(jnp.ones(70_001, bool))
    assert (int(total), int(count)) == (70_001, 70_001)
    assert total.dtype == jnp.int32


@pytest.mark.parametrize("cuts", [(), (1,), (5,), (3, 4, 11)])
def test_merged_parts_give_the_mean_of_the_whole(cuts):
    whole = {"x": metrics.mean_of(VALUES), "y": metrics.mean_of(VALUES > 0)}
    merged = metrics.zeros_like(jax.eval_shape(lambda: whole))
    bounds = (0, *cuts, 12)
    for start, stop in itertools.pairwise(bounds):
        part = slice(start, stop)
        merged = metrics.merge(
            {
                "x": metrics.mean_of(VALUES[part]),
                "y": metrics.mean_of(VALUES[part] > 0),
            },
            merged,
        )
    means = metrics.compute(merged)
    assert means["x"] == pytest.approx(VALUES.mean(dtype=np.float64), rel=1e-5)
    assert means["y"] == (VALUES > 0).mean()
    assert jax.tree.map(lambda x: x.dtype, merged) == jax.tree.map(lambda x: x.dtype, whole)


def test_merge_refuses_metrics_of_other_names():
    with pytest.raises(ValueError, match="key"):
        metrics.merge({"x": metrics.mean_of(VALUES)}, {"y": metrics.mean_of(VALUES)})


def test_compute_gives_python_floats_and_nan_of_nothing():
    means = metrics.compute({"x": metrics.mean_of(VALUES[:4]), "none": metrics.mean_of(VALUES[:0])})
    assert {name: type(value) for name, value in means.items()} == {"x": float, "none": float}
    assert math.isnan(means["none"]) and means["x"] == pytest.approx(VALUES[:4].mean())


@pytest.mark.parametrize("exits", [1, 3])
def test_a_record_names_what_a_step_counted(exits):
    def pair(total):
        return jnp.float32(total), jnp.int32(4)

    counted = metrics.StepMetrics(
        loss=pair(8.0),
        accuracy=tuple(pair(i) for i in range(exits)),
        terms={"ce": pair(2.0)},
        weighted={"ce": pair(1.0)},
        kept=None,
        nonfinite={"gradients": pair(3.0)},
    )
    accuracies = {"accuracy": 0.0, "branch1_accuracy": 0.25, "branch2_accuracy": 0.5}
    expected = {"loss": 2.0, "ce": 0.5, "weighted_ce": 0.25}
    expected |= dict(zip(metrics.accuracy_names(exits), accuracies.values(), strict=False))
    assert metrics.accuracy_names(exits) == list(accuracies)[:exits]
    assert metrics.record(counted) == expected
    assert metrics.record(counted._replace(kept=pair(3.0))) == expected | {"kept": 0.75}
    zeros = metrics.zeros_like(jax.eval_shape(lambda: counted))
    chex.assert_trees_all_equal(metrics.merge(zeros, counted), counted)


def bits(keys):
    return np.asarray(jax.random.key_data(keys))


def test_streams_differ_by_root_name_and_step():
    keys = [
        tuple(bits(rng.stream(jax.random.key(seed), name, step)).tolist())
        for seed in (0, 1)
        for name in ("init", "augment", "teacher_drop")
        for step in range(5)
    ]
    assert len(set(keys)) == len(keys)


def test_a_stream_is_a_pure_function_and_may_be_traced():
    key = jax.random.key(3)
    expected = bits(rng.stream(key, "augment", 7))
    traced = jax.jit(lambda key, step: rng.stream(key, "augment", step))(key, jnp.int32(7))
    np.testing.assert_array_equal(bits(traced), expected)
    np.testing.assert_array_equal(bits(rng.stream(key, "augment", 7)), expected)
    np.testing.assert_array_equal(bits(rng.stream(key, "a")), bits(rng.stream(key, "a", 0)))


def test_draws_of_different_streams_are_uncorrelated():
    key = jax.random.key(0)
    draws = np.stack(
        [
            jax.random.normal(rng.stream(key, name, step), (4000,))
            for name in "ab"
            for step in (0, 1)
        ]
    )
    correlation = np.corrcoef(draws) - np.eye(4)
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)


@pytest.mark.parametrize("shard", [slice(0, 4), slice(4, 8), slice(5, 6), slice(0, 8, 3)])
def test_keys_of_a_shard_are_the_slice_of_the_whole(shard):
    key, positions = jax.random.key(1), jnp.arange(8)
    whole = bits(rng.per_example(key, positions))
    assert len(np.unique(whole, axis=0)) == 8
    np.testing.assert_array_equal(bits(rng.per_example(key, positions[shard])), whole[shard])
    assert not np.array_equal(bits(rng.per_example(jax.random.key(2), positions)), whole)
