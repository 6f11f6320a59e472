"""The moving average of a network's weights: its numbers, where it goes, and that it is resumed."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ending import Killed, Steps
from flax import linen as nn
from saved import Saved

import distill_jax
from distill_jax import data, models
from distill_jax.methods import CrossEntropy
from distill_jax.models import Outputs
from distill_jax.models.kernels.batch_norm import BatchNorm
from distill_jax.models.zoo.heads import one_layer
from distill_jax.train import averaging, fit, inference, sharding, trainer
from distill_jax.train.optim import OptimOptions
from distill_jax.train.options import ReplicaInputs, StageInputs, TrainOptions
from distill_jax.train.stage import Recipe, Stage
from distill_jax.train.step import init_state

SHAPE, CLASSES, STEPS = (4, 4, 1), 3, 3  # steps of an epoch
DECAY = 0.2  # less than what the decay comes to in a few steps


class Tiny(nn.Module):
    """A layer with BatchNorm, its mean and a classifier."""

    @nn.compact
    def __call__(self, images, mode):
        x = nn.Dense(4, name="dense")(images)
        x = nn.relu(BatchNorm(4, name="norm")(x, mode))
        feature = x.mean((1, 2))
        return Outputs(self.head().run(feature, mode), feature, ())

    @nn.nowrap
    def head(self):
        return one_layer("fc", CLASSES)


def stage_of(name="student", seed=0, live=(), **recipe):
    rate = recipe.pop("learning_rate", 0.5)
    values = {"epochs": 2, "batch_size": 8, "selection": "last", "ema": DECAY, **recipe}
    recipe = Recipe(**values, optim=OptimOptions(learning_rate=rate))
    network = models.Network(name, Tiny(), CLASSES, SHAPE)
    return Stage(network, (), recipe, seed, (("ce", CrossEntropy()),), (1.0,), live=live)


@functools.cache
def dataset():
    draw = np.random.default_rng(3)
    n = 8 * STEPS
    pair = draw.integers(0, 256, (n, *SHAPE), np.uint8), draw.integers(0, CLASSES, n)
    return data.from_arrays(pair, pair, classes=CLASSES, valid_fraction=0)


def trained(*stages, saved=None, **options):
    """The results of stages that one step trains, saved after every step."""
    inputs = ReplicaInputs(tuple(map(StageInputs, stages)), saved or Saved())
    options = TrainOptions(should_save=lambda *_: True, **options)
    (results,) = fit.train([inputs], dataset(), options)
    return results


@pytest.fixture
def step_by_step(monkeypatch):
    """One step a dispatch, so that each is saved."""
    monkeypatch.setattr(trainer, "DISPATCH_SECONDS", 0.0)


# ------------------------------------------------------------------------------------ the numbers
def test_the_average_of_every_step_is_that_of_numpy_and_is_what_is_kept(step_by_step):
    saved, stage = Saved(), stage_of()
    (result,) = trained(stage, saved=saved)
    first = init_state(stage.network, OptimOptions(), jax.random.key(0)).variables("student")
    average = jax.tree.map(np.float64, first)
    decays = []
    for t, step in enumerate(range(1, 2 * STEPS + 1)):
        raw, ours = saved.state(step).variables("student"), saved.state(step).averages["student"]
        decays.append(min(DECAY, (1 + t) / (10 + t)))
        average = jax.tree.map(
            lambda a, v, d=decays[-1]: d * a + (1 - d) * np.float64(v), average, raw
        )
        chex.assert_trees_all_close(ours, average, rtol=1e-5, atol=1e-6)
        assert not np.allclose(raw["params"]["fc"]["kernel"], ours["params"]["fc"]["kernel"])
    assert decays[:3] == [0.1, 2 / 11, DECAY]
    chex.assert_trees_all_equal(result.variables, jax.device_get(saved.last.averages["student"]))


def test_accuracies_and_losses_are_those_of_the_average(step_by_step):
    saved, stage = Saved(), stage_of(selection="test")
    (result,) = trained(stage, saved=saved)
    state = saved.state(2 * STEPS)
    pairs = [(stage.network, v) for v in (state.averages["student"], state.variables("student"))]
    mine, raw = inference.evaluate(pairs, dataset().test, dataset())
    assert result.history[-1]["test_loss"] == mine["loss"] != raw["loss"]
    assert result.record["last_test_accuracy"] == mine["accuracy"]
    best = result.history[result.record["best_epoch"] - 1]
    assert result.record["test_accuracy"] == best["test_accuracy"]
    saved_best = saved.all[2 * STEPS][0]["best"]["student"]
    chex.assert_trees_all_equal_shapes(saved_best, result.variables)


def test_what_does_not_move_stays_to_the_bit_and_half_precision_is_averaged_wide():
    draw = np.random.default_rng(0).normal(size=(50,))
    variables = {
        "params": {"a": jnp.asarray(draw, jnp.float32), "b": jnp.asarray(draw, jnp.bfloat16)},
        "others": {"n": jnp.arange(3)},
    }
    average = averaging.begin(variables)
    assert average["params"]["b"].dtype == jnp.float32
    chex.assert_trees_all_equal(averaging.as_variables(average, variables), variables)
    after = averaging.moved(average, variables, jnp.float32(0.999), 7)
    chex.assert_trees_all_equal(after, average)
    later = {**variables, "others": {"n": jnp.arange(3) + 1}}
    assert averaging.moved(average, later, 0.9, 7)["others"]["n"][0] == 1


def test_a_step_that_is_skipped_moves_no_average(step_by_step):
    saved = Saved()
    with pytest.raises(trainer.NotFiniteError):  # the last epoch's numbers are not finite
        trained(stage_of(learning_rate=1e30, selection="test"), saved=saved, max_nonfinite_steps=9)
    state = saved.last
    assert state.step == 2 * STEPS and 0 < state.skipped < state.step
    before = saved.state(int(state.step - state.skipped))
    chex.assert_trees_all_equal(state.averages, before.averages)
    chex.assert_tree_all_finite(state.averages)


# --------------------------------------------------------------------------------- where it goes
def test_without_an_average_a_state_is_what_it_was():
    state = init_state(stage_of().network, OptimOptions(), jax.random.key(0))
    assert state.collections.keys() == {"networks", "methods"} and state.averages == {}
    with_it = init_state(stage_of().network, OptimOptions(), jax.random.key(0), averaged=True)
    chex.assert_trees_all_equal(with_it.averages["student"], with_it.variables("student"))
    rest = {k: x for k, x in with_it.collections.items() if k != "averages"}
    chex.assert_trees_all_equal(dataclasses.replace(with_it, collections=rest), state)


def test_each_network_of_a_cycle_has_its_own_or_none_and_goes_on_after_a_stop(step_by_step):
    pair = tuple(stage_of(name).network for name in ("one", "other"))
    stages = stage_of("one", live=pair[1:]), stage_of("other", live=pair[:1], ema=0.0)
    saved, stops = Saved(), iter([False, True])
    with pytest.raises(fit.Interrupted):
        trained(*stages, saved=saved, stop=lambda: next(stops))
    assert saved.last.averages.keys() == {"one"} and saved.last.step == 2
    resumed, whole = trained(*stages, saved=saved), trained(*stages)
    for one, other, name in zip(resumed, whole, ("one", "other"), strict=True):
        assert one.record["state_digest"] == other.record["state_digest"]
        chex.assert_trees_all_equal(one.variables, other.variables)
        raw = saved.last.variables(name)["params"]
        same = jax.tree.map(np.array_equal, raw, jax.device_get(one.variables)["params"])
        assert all(jax.tree.leaves(same)) == (name == "other")


@pytest.mark.devices
@pytest.mark.parametrize(("mode", "sync_bn"), [("jit", True), ("pmap", True), ("jit", False)])
def test_devices_keep_one_average(mode, sync_bn):
    (result,) = trained(stage_of(sync_bn=sync_bn), topology=sharding.Topology(mode, 2))
    (expected,) = trained(stage_of(sync_bn=sync_bn))
    params = (result.variables["params"], expected.variables["params"])
    if sync_bn:
        chex.assert_trees_all_close(*params, rtol=1e-4, atol=1e-5)
    chex.assert_tree_all_finite(result.variables)
    chex.assert_trees_all_equal_shapes_and_dtypes(result.variables, expected.variables)


def test_replicas_with_decays_of_their_own_are_what_they_are_alone():
    stages = [stage_of(seed=seed, ema=decay) for seed, decay in ((0, 0.2), (1, 0.9))]
    replicas = [ReplicaInputs((StageInputs(stage),)) for stage in stages]
    together = fit.train(replicas, dataset(), TrainOptions())
    for stage, (result,) in zip(stages, together, strict=True):
        (alone,) = trained(stage)
        chex.assert_trees_all_close(result.variables, alone.variables, rtol=1e-5, atol=1e-6)
        assert result.record["last_test_accuracy"] == alone.record["last_test_accuracy"]


# ------------------------------------------------------------------------------- by the public API
CONFIG = {
    "dataset": {"name": "synthetic:8x8x1:4:64:32"},
    "networks": ("plane4", "plane2"),
    "guidance": ("none",),
    "recipe": {"epochs": 2, "batch_size": 16, "ema": 0.5},
    "selection": "last",
}


def weights_of(results):
    ((_, variables),) = results.networks.values()
    return variables


def test_a_run_that_was_killed_ends_with_the_bytes_of_one_that_was_not(step_by_step, tmp_path):
    whole = distill_jax.run(CONFIG)
    raw = distill_jax.run({**CONFIG, "recipe": {**CONFIG["recipe"], "ema": 0.0}})
    for steps in (2, 3):
        with pytest.raises(Killed):
            config = {**CONFIG, "checkpoint_every": "1 steps"}
            distill_jax.run(config, reporter=Steps(steps), workdir=tmp_path)
    results = distill_jax.run(config, workdir=tmp_path)
    assert results.rows[0]["state_digest"] == whole.rows[0]["state_digest"]
    assert raw.rows[0]["stage"] != whole.rows[0]["stage"]
    loaded = distill_jax.load(tmp_path)
    for other in (weights_of(loaded), weights_of(whole)):
        chex.assert_trees_all_equal(weights_of(results), other)
    images = data.load(**CONFIG["dataset"]).test.images
    np.testing.assert_array_equal(results.logits(images), loaded.logits(images))
    assert np.abs(results.logits(images) - raw.logits(images)).max() > 1e-3
    kernels = (weights_of(r)["params"]["fc_layers.0"]["kernel"] for r in (raw, whole))
    assert not np.allclose(*kernels)


def test_what_follows_a_phase_starts_from_its_average():
    phase = distill_jax.run({**CONFIG, "recipe": {**CONFIG["recipe"], "epochs": 1}})
    recipe = {**CONFIG["recipe"], "trainable": ("fc_layers.*",)}
    phases = ({"epochs": 1, "trainable": (".*",)},)
    config = {**CONFIG, "networks": ("plane4", "plane2"), "guidance": ("direct",)}
    config |= {"recipe": recipe, "phases": phases, "methods": {"fitnet": 0.0, "ce": 1.0}}
    results = distill_jax.run(config)
    before, after = (weights_of(r)["params"] for r in (phase, results))
    convolutions = [name for name in before if not name.startswith("fc_layers")]
    assert convolutions
    for name in convolutions:  # neither trained nor moved since
        chex.assert_trees_all_equal(after[name], before[name])


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_its_range_is_refused(decay):
    with pytest.raises(ValueError, match=f"ema is 0 or more and below 1, got {decay}"):
        distill_jax.run({**CONFIG, "recipe": {**CONFIG["recipe"], "ema": decay}})
