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


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(nnx.relu(self.linear(x)))


class Rematerialised(Block):
    __call__ = nnx.remat(Block.__call__)


class Around(nnx.Module):
    """A network around a block that is called with it."""

    def __init__(self, classes, rngs, block=Block):
        self.first, self.block = nnx.Linear(1, 4, rngs=rngs), block(rngs)
        self.out = nnx.Linear(4, classes, rngs=rngs)

    def __call__(self, x):
        return self.out(self.block(self.first(x.mean((1, 2)))))


class WithinItself(Around):
    def __call__(self, x):
        @nnx.remat
        def inner(self, x):
            return self.block(self.first(x.mean((1, 2))))

        return self.out(inner(self, x))


class Stack(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs):
            return Block(rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        def one(x, layer):
            return layer(x)

        return nnx.scan(one, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def around(block):
    return lambda classes, rngs: Around(classes, rngs, block)


@pytest.mark.parametrize(
    "make", [around(Rematerialised), WithinItself], ids=["of a layer", "of the network"]
)
def test_rematerialised_layers_drop_what_plain_ones_drop(make):
    plain, net = network(make=around(Block), head="out"), network(make=make, head="out")
    variables = random_variables(plain.shapes)
    for train in (False, True):
        wanted, outputs = (run(one, variables, 0, train=train)[0] for one in (plain, net))
        np.testing.assert_allclose(outputs.logits, wanted.logits, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(outputs.feature, wanted.feature, rtol=1e-5, atol=1e-6)


def test_layers_in_a_stack_drop_each_for_itself():
    net = network(make=around(Stack), head="out")
    variables = random_variables(net.shapes)
    layers = variables["params"]["block"]["layers"]["linear"]
    layers["kernel"], layers["bias"] = jnp.zeros((3, 4, 4)), jnp.ones((3, 4))  # each adds 0 or 2
    start = images().mean((1, 2)) @ variables["params"]["first"]["kernel"]
    start += variables["params"]["first"]["bias"][None]
    still = run(net, variables)[0].feature - start
    np.testing.assert_allclose(still, 3, rtol=1e-5)  # 1 each, without dropout
    added = np.round(run(net, variables, 0, train=True)[0].feature - start).ravel().tolist()
    assert {0, 2, 4, 6} >= set(added)
    assert len(set(added)) > 2  # one draw for all would give 0 and 6 alone


@pytest.mark.devices
def test_a_stack_on_two_devices_is_that_on_one():
    net = network(make=around(Stack))
    variables, key = random_variables(net.shapes), jax.random.key(5)
    one = jax.jit(lambda *arguments: train_step(net, None, *arguments))(variables, images(), key)
    assert_alike(on_devices(net, "shard_map", 2, variables, images(), key), one)


def test_a_part_inside_a_transformation_is_refused():
    with pytest.raises(ValueError, match="'first' of outside_nnx is called inside a transfor"):
        network(make=WithinItself, feature="first")


class Sowing(nnx.Module):
    def __init__(self, classes, rngs):
        self.out, self.offset = nnx.Linear(1, classes, rngs=rngs), jnp.ones((1,))

    def __call__(self, x):
        x = x.mean((1, 2)) - self.offset[None]
        self.sow(nnx.Intermediate, "centred", x)
        return self.out(x)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")  # of newer versions, outside of `capture`
def test_plain_arrays_are_state_and_what_is_sown_is_not():
    net = network(make=Sowing)
    fresh = net.init(jax.random.key(0))
    (offset,) = jax.tree.leaves({name: own for name, own in fresh.items() if name != "params"})
    np.testing.assert_array_equal(offset, [1.0])
    outputs, state = run(net, fresh, 0, train=True)
    kernel, bias = (fresh["params"]["out"][leaf] for leaf in ("kernel", "bias"))
    wanted = (images().mean((1, 2)) - 1) @ kernel + bias[None]
    np.testing.assert_allclose(outputs.logits, wanted, rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(state | {"params": fresh["params"]}) == jax.tree.structure(fresh)
