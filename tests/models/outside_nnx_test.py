"""nnx modules from outside: collections, modes, random streams, named parts, two devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from outside_test import CLASSES, SHAPE, assert_alike, images, on_devices, run, train_step
from random_variables import random_variables

from distill_jax import models


class Count(nnx.Variable):
    pass


class CNN(nnx.Module):
    def __init__(self, classes, rngs, rate=0.5):
        self.conv = nnx.Conv(1, 4, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.blocks = nnx.List([nnx.Conv(4, 4, (1, 1), rngs=rngs) for _ in range(2)])
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.out = nnx.Linear(4, classes, rngs=rngs)
        self.steps = Count(jnp.zeros(()))

    def __call__(self, x):
        self.steps[...] += 1
        x = nnx.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = self.dropout(nnx.relu(block(x)))
        return self.out(x.mean((1, 2)))


def network(name="outside_nnx", make=CNN, **options):
    models.register_network(name, lambda classes, inputs: make(classes, nnx.Rngs(0)), **options)
    return models.build(name, CLASSES, SHAPE)


def test_collections_are_those_of_the_variables():
    net = network()
    fresh = net.init(jax.random.key(0))
    assert fresh.keys() == {"params", "batch_stats", "Count"}
    assert fresh["batch_stats"] == {"norm": fresh["batch_stats"]["norm"]}
    assert fresh["params"]["blocks"].keys() == {"0", "1"}
    assert jax.tree.structure(fresh) == jax.tree.structure(net.shapes)
    assert not any("rng" in path for path in map(str, jax.tree_util.tree_flatten_with_path(fresh)))


def test_every_seed_draws_other_weights():
    kernels = [network().init(jax.random.key(s))["params"]["conv"]["kernel"] for s in (0, 0, 1)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.abs(kernels[0] - kernels[2]).max() > 1e-2
    assert 0.5 < np.std(kernels[2]) / np.std(CNN(3, nnx.Rngs(0)).conv.kernel[...]) < 2


def test_a_call_is_that_of_the_module():
    net, module = network(), CNN(CLASSES, nnx.Rngs(0))
    variables = random_variables(net.shapes)
    for name in ("conv", "out", "norm"):
        layer = getattr(module, name)
        for leaf, value in variables["params"][name].items():
            setattr(layer, leaf, nnx.Param(value))
    for leaf, value in variables["batch_stats"]["norm"].items():
        setattr(module.norm, leaf, nnx.BatchStat(value))
    for index, block in enumerate(module.blocks):
        block.kernel, block.bias = (
            nnx.Param(variables["params"]["blocks"][str(index)][leaf])
            for leaf in ("kernel", "bias")
        )
    module.eval()
    outputs, state = run(net, variables)
    np.testing.assert_allclose(outputs.logits, module(images()), rtol=1e-5, atol=1e-6)
    assert_alike(state, {name: variables[name] for name in ("batch_stats", "Count")})


def test_training_changes_state_and_follows_its_key():
    net = network()
    variables = random_variables(net.shapes)
    (one, state), (same, _), (other, _) = (
        run(net, variables, seed, train=True) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one.logits, same.logits)
    assert np.abs(one.logits - other.logits).max() > 1e-3
    assert state["Count"]["steps"] == variables["Count"]["steps"] + 1
    before = variables["batch_stats"]["norm"]["mean"]
    assert np.abs(state["batch_stats"]["norm"]["mean"] - before).max() > 1e-4
    with pytest.raises(ValueError, match="needs rngs"):
        net.apply(variables, images(), train=True)


@pytest.mark.devices
@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_nnx_on_two_devices_is_nnx_on_one(mode):
    net = network()
    variables, key = random_variables(net.shapes), jax.random.key(5)
    one = jax.jit(lambda *arguments: train_step(net, None, *arguments))(variables, images(), key)
    two = on_devices(net, mode, 2, variables, images(), key)
    assert_alike(two, one)


def test_named_parts():
    net = network(stages=("conv", "blocks/1"), head="out")
    variables = random_variables(net.shapes)
    outputs, _ = run(net, variables)
    assert [stage.shape for stage in outputs.stages] == [(8, 4, 4, 4)] * 2
    feature = nnx.relu(outputs.stages[1]).mean((1, 2))
    np.testing.assert_allclose(outputs.feature, feature, rtol=1e-5)
    np.testing.assert_allclose(net.head(variables, feature), outputs.logits, rtol=1e-4, atol=1e-5)
    trained, _ = run(net, variables, 0, train=True)
    assert trained.stages[1].shape == (8, 4, 4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": ("block",)}, "'block' of outside_nnx is not called: there are.*'blocks/0'"),
        ({"feature": "dropout"}, "'dropout' of outside_nnx is called 2 times"),
    ],
)
def test_parts_that_are_not_there_are_refused_with_those_that_are(options, message):
    with pytest.raises(ValueError, match=message):
        network(**options)
