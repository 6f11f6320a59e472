"""CRD's memory in training: on devices, after a stop, and of replicas trained at once."""

import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest
from flax import linen as nn
from marks import slow
from saved import Saved

import distill_jax
from distill_jax import data, models
from distill_jax.methods import CRD, CrossEntropy
from distill_jax.models import Outputs
from distill_jax.models.zoo.heads import one_layer
from distill_jax.train import fit, sharding
from distill_jax.train.checks import check
from distill_jax.train.dropping import Dropping
from distill_jax.train.evaluation import StageResult
from distill_jax.train.options import ReplicaInputs, StageInputs, TrainOptions
from distill_jax.train.reporter import Reporter
from distill_jax.train.stage import Recipe, Stage

SHAPE, CLASSES, N = (4, 4, 1), 3, 44  # in batches of 8, of which the last has 4
METHODS = ("ce", CrossEntropy()), ("crd", CRD(embedding_size=6, negatives=9))


class Tiny(nn.Module):
    """A layer, its mean and a classifier."""

    width: int

    @nn.compact
    def __call__(self, images, mode):
        feature = nn.relu(nn.Dense(self.width, name="dense")(images)).mean((1, 2))
        return Outputs(self.head().run(feature, mode), feature, ())

    @nn.nowrap
    def head(self):
        return one_layer("fc", CLASSES)


def network(name, width=5):
    return models.Network(name, Tiny(width), CLASSES, SHAPE)


TEACHERS = network("large", 7), network("middle", 3)
STAGE = Stage(
    network("student"),
    TEACHERS,
    Recipe(
        epochs=2,
        batch_size=8,
        last_batch="keep",
        selection="last",
        dropping=Dropping("bernoulli"),
        survival=0.6,
    ),
    0,
    METHODS,
    (1.0, 0.8),
)


@functools.cache
def dataset():
    draw = np.random.default_rng(3)
    pair = draw.integers(0, 256, (N, *SHAPE), np.uint8), draw.integers(0, CLASSES, N)
    return data.from_arrays(pair, pair, classes=CLASSES, valid_fraction=0)


def inputs_of(stage, saved=None):
    keys = (jax.random.key(20 + k) for k in range(len(TEACHERS)))
    results = (StageResult(t.init(key), [], {}) for t, key in zip(TEACHERS, keys, strict=True))
    return ReplicaInputs((StageInputs(stage, tuple(results)),), saved)


@functools.cache
def trained(stage=STAGE, topology=sharding.Topology()):
    """The result, and the state after the last step."""
    saved, always = Saved(), TrainOptions(topology, should_save=lambda *_: True)
    check(stage, dataset(), topology)
    ((result,),) = fit.train([inputs_of(stage, saved)], dataset(), always)
    return result, saved.last


def crd_of(state):
    return state.method_variables("student")["crd"]


@pytest.mark.parametrize(("mode", "devices"), [("jit", 2), *slow(("jit", 4)), ("pmap", 2)])
def test_any_number_of_devices_keeps_the_memory_of_one(mode, devices):
    result, state = trained(topology=sharding.Topology(mode, devices))
    expected, wanted = trained()
    chex.assert_trees_all_close(state.params, wanted.params, rtol=1e-3, atol=1e-5)
    chex.assert_trees_all_close(crd_of(state), crd_of(wanted), rtol=1e-3, atol=1e-5)
    for mine, theirs in zip(result.history, expected.history, strict=True):
        assert mine["train_crd"] == pytest.approx(theirs["train_crd"], rel=1e-4)


def test_every_example_is_written_where_a_teacher_was_kept():
    _, state = trained()
    for memory in crd_of(state)["memory"].values():
        assert memory["fixed"] and np.all(memory["log_z"])
        for who in ("student", "teacher"):
            lengths = np.linalg.norm(memory[who], axis=1)
            written = np.abs(lengths - 1) < 1e-5
            assert N // 2 < written.sum() <= N
    student = [memory["student"] for memory in crd_of(state)["memory"].values()]
    assert not np.array_equal(*student)


@pytest.mark.parametrize("dispatches", [2, *slow(1, 3)])
def test_a_stopped_stage_goes_on_to_the_same_bits(dispatches):
    saved, left = Saved(), iter([False] * (dispatches - 1) + [True])
    options = TrainOptions(stop=lambda: next(left))
    with pytest.raises(fit.Interrupted):
        fit.train([inputs_of(STAGE, saved)], dataset(), options)
    (step,) = saved.steps()
    assert 0 < step < 12
    always = TrainOptions(should_save=lambda *_: True)
    ((result,),) = fit.train([inputs_of(STAGE, saved)], dataset(), always)
    expected, wanted = trained()
    chex.assert_trees_all_equal(crd_of(saved.last), crd_of(wanted))
    assert result.record["state_digest"] == expected.record["state_digest"]


def test_replicas_at_once_are_what_they_are_alone():
    stages = [dataclasses.replace(STAGE, seed=seed) for seed in (0, 1)]
    options = TrainOptions(sharding.Topology("jit", 2), should_save=lambda *_: True)
    all_saved = [Saved() for _ in stages]
    inputs = [inputs_of(stage, saved) for stage, saved in zip(stages, all_saved, strict=True)]
    fit.train(inputs, dataset(), options)
    for stage, saved in zip(stages, all_saved, strict=True):
        alone = crd_of(trained(stage)[1])
        chex.assert_trees_all_close(crd_of(saved.last), alone, rtol=1e-4, atol=1e-6)
        chex.assert_trees_all_equal(crd_of(saved.last)["split"], alone["split"])


def test_the_memory_is_of_the_examples_that_are_trained_on():
    recipe = dataclasses.replace(STAGE.recipe, train_limit=8)
    _, state = trained(dataclasses.replace(STAGE, recipe=recipe))
    chex.assert_shape(crd_of(state)["memory"]["0"]["student"], (24, 6))
    np.testing.assert_array_equal(np.bincount(crd_of(state)["split"]["labels"]), [8, 8, 8])


def test_examples_of_one_class_are_refused_before_anything_starts():
    pair = dataset().train.images, np.ones(N, np.int32)
    alike = data.from_arrays(pair, pair, classes=CLASSES, valid_fraction=0)
    message = "'crd' for student taught by large.middle: .* of other classes: all 44 have the same"
    with pytest.raises(ValueError, match=message):
        check(STAGE, alike, sharding.Topology())


# ---------------------------------------------------------------------------- through experiments
class Lines(Reporter):
    """What is noticed, and when to stop."""

    def __init__(self, dispatches=10**9):
        self.left, self.lines = dispatches, []

    def progress(self, step, images_per_second):
        self.left -= 1

    def notice(self, lines):
        self.lines += lines


def run(workdir=None, dispatches=10**9):
    reporter = Lines(dispatches)
    config = {
        "dataset": {"name": "synthetic:8x8x1:4:48:16", "valid_fraction": 0.25},
        "networks": ("plane4", "plane2"),
        "guidance": ("direct",),
        "methods": {"kd": 1.0, "crd": 0.8},
        "method_options": {"crd": {"embedding_size": 8}},
        "recipe": {"epochs": 2, "batch_size": 12, "augment": "flip"},
        "dtype": "bfloat16",
    }
    stop = lambda: reporter.left <= 0  # noqa: E731
    return distill_jax.run(config, workdir=workdir, reporter=reporter, stop=stop), reporter


def test_a_run_in_half_precision_says_what_it_draws_and_resumes_with_its_memory(tmp_path):
    whole, reporter = run(tmp_path / "whole")
    said = "warning: crd draws 27 negatives an example, not 16384: of 36 training examples"
    assert [line for line in reporter.lines if said in line]
    with pytest.raises(fit.Interrupted):
        run(tmp_path / "stopped", 4)
    rest, _ = run(tmp_path / "stopped")
    for mine, theirs in zip(rest.rows, whole.rows, strict=True):
        assert mine["state_digest"] == theirs["state_digest"]
    (key,) = (key for key in whole.histories if "plane2" in key and "direct" in key)
    assert all(epoch["train_crd"] > 0 for epoch in whole.histories[key])
