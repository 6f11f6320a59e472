"""Networks from outside: linen modules and pairs, on one device and on two, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import PartitionSpec as P
from random_variables import random_variables

from distill_jax import models

SHAPE, CLASSES, BATCH = (8, 8, 1), 3, 8


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(self.width, (3, 3), strides=2)(x)
        return nn.relu(nn.BatchNorm(use_running_average=not train)(x))


class CNN(nn.Module):
    """BatchNorm and dropout; a block that is called twice, and one that is never called."""

    classes: int
    rate: float = 0.5

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = Block(4)(x, train)
        x = Block(6)(x, train)
        x = nn.Dropout(self.rate, deterministic=not train)(x)
        twice = nn.Dense(6, name="twice")
        x = twice(twice(x.mean((1, 2))))
        return nn.Dense(self.classes, name="logits")(x)


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, *, deterministic):
        x = nn.Dropout(0.5)(x.reshape(len(x), -1), deterministic=deterministic)
        return nn.Dense(CLASSES)(x)


class Plain(nn.Module):
    """No flag, no BatchNorm; logits in half precision."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES, dtype=jnp.bfloat16)(nn.LayerNorm()(x.reshape(len(x), -1)))


class Backwards(nn.Module):
    """A call that no signature tells."""

    @nn.compact
    def __call__(self, mode, x):
        x = x.reshape(len(x), -1)
        return {"probabilities": nn.Dense(CLASSES)(x) * (2.0 if mode == "fit" else 1.0)}


class Shows(nn.Module):
    """Gives Outputs itself."""

    @nn.compact
    def __call__(self, x, training):
        feature = x.reshape(len(x), -1)
        return models.Outputs(nn.Dense(CLASSES)(feature), feature, (x,), stem=x)


def network(name, module, **options):
    models.register_network(name, lambda classes, inputs: module, **options)
    return models.build(name, CLASSES, SHAPE)


def images(n=BATCH):
    return np.random.default_rng(1).normal(size=(n, *SHAPE)).astype(np.float32)


def run(net, variables, seed=None, train=False):
    key = None if seed is None else jax.random.key(seed)
    return jax.jit(lambda v, x, k: net.apply(v, x, train=train, rngs=k))(variables, images(), key)


def train_step(net, axis, variables, x, key):
    """Gradients, statistics and logits of a step; gradients averaged over devices."""

    def loss_of(params):
        outputs, state = net.apply(
            {**variables, "params": params}, x, train=True, rngs=key, axis_name=axis
        )
        return jnp.mean(jnp.square(outputs.logits)), (outputs.logits, state)

    gradients, (logits, state) = jax.grad(loss_of, has_aux=True)(variables["params"])
    return (gradients if axis is None else lax.pmean(gradients, axis)), state, logits


def on_devices(net, mode, devices, variables, x, key):
    def step(*arguments):
        return train_step(net, "data", *arguments)

    if mode == "pmap":
        shares = x.reshape(devices, -1, *x.shape[1:])
        step = jax.pmap(step, "data", in_axes=(None, 0, None), devices=jax.devices()[:devices])
        gradients, state, logits = step(variables, shares, key)
        first = jax.tree.map(lambda leaf: leaf[0], (gradients, state))
        return (*first, logits.reshape(-1, CLASSES))
    mesh = jax.make_mesh(
        (devices,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
    )
    specs = {"in_specs": (P(), P("data"), P()), "out_specs": (P(), P(), P("data"))}
    return jax.jit(jax.shard_map(step, mesh=mesh, check_vma=False, **specs))(variables, x, key)


def assert_alike(found, expected, rtol=1e-4, atol=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected
    )


@pytest.mark.devices
@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_linen_on_two_devices_is_linen_on_one(mode):
    net = network("outside_cnn", CNN(CLASSES))
    variables, key = random_variables(net.shapes), jax.random.key(5)
    one = jax.jit(lambda *arguments: train_step(net, None, *arguments))(variables, images(), key)
    two = on_devices(net, mode, 2, variables, images(), key)
    assert_alike(two, one)
    assert set(one[1]) == {"batch_stats"}
    assert np.abs(one[1]["batch_stats"]["Block_0"]["BatchNorm_0"]["mean"]).max() > 1e-3


@pytest.mark.devices
def test_that_test_sees_batch_norms_that_do_not_share(monkeypatch):
    from distill_jax.models.adapters import linen_module

    monkeypatch.setattr(linen_module, "_batch_norm", lambda m, axis, run, a, k: run(*a, **k))
    net = network("outside_unshared", CNN(CLASSES))
    variables, key = random_variables(net.shapes), jax.random.key(5)
    one = jax.jit(lambda *arguments: train_step(net, None, *arguments))(variables, images(), key)
    two = on_devices(net, "shard_map", 2, variables, images(), key)
    assert np.abs(two[2] - one[2]).max() > 1e-2


def test_dropout_follows_its_key_and_is_off_outside_training():
    net = network("outside_cnn", CNN(CLASSES))
    variables = random_variables(net.shapes)

    one, same, other = (run(net, variables, seed, train=True)[0].logits for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3
    outputs, state = run(net, variables)
    plain = jax.jit(CNN(CLASSES).apply)(variables, images())
    np.testing.assert_allclose(outputs.logits, plain, rtol=1e-5, atol=1e-6)
    assert_alike(state, {"batch_stats": variables["batch_stats"]})
    assert net.freeze(variables) is variables


def test_examples_drop_units_of_their_own():
    class Ones(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dropout(0.5, deterministic=not train)(jnp.ones((len(x), 64)))
            return nn.Dense(64, kernel_init=lambda *a: jnp.eye(64))(x)

    models.register_network("outside_ones", lambda classes, inputs: Ones())
    net = models.build("outside_ones", 64, SHAPE)
    rows = run(net, net.init(jax.random.key(0)), 1, train=True)[0].logits
    assert set(np.unique(rows)) == {0.0, 2.0}
    assert len({row.tobytes() for row in np.asarray(rows)}) == BATCH
    assert 0.4 < np.mean(rows > 0) < 0.6


def test_a_fresh_network_is_flax_own():
    net = network("outside_cnn", CNN(CLASSES))
    fresh = net.init(jax.random.key(3))
    own = jax.jit(CNN(CLASSES).init)(jax.random.key(3), jnp.zeros((1, *SHAPE)))
    assert_alike(fresh, own, rtol=1e-6)
    assert models.count_parameters(net) == sum(x.size for x in jax.tree.leaves(own["params"]))
    assert models.deploy(net, fresh) is fresh and net.backbone is net and net.branches == 0


@pytest.mark.parametrize(
    ("module", "eager"),
    [
        (Deterministic(), lambda m, v, x: m.apply(v, x, deterministic=True)),
        (Plain(), lambda m, v, x: m.apply(v, x).astype(jnp.float32)),
        (Shows(), lambda m, v, x: m.apply(v, x, False).logits),
    ],
)
def test_flags_of_training(module, eager):
    net = network("outside_flags", module)
    variables = random_variables(net.shapes)
    outputs, state = run(net, variables)
    assert outputs.logits.dtype == jnp.float32 and state == {}
    expected = eager(module, variables, images())
    np.testing.assert_allclose(outputs.logits, expected, rtol=1e-2, atol=1e-2)
    trained, state = run(net, variables, 0, train=True)
    changes = isinstance(module, Deterministic)
    assert (np.abs(trained.logits - outputs.logits).max() > 1e-3) == changes and state == {}


def test_networks_without_dropout_need_no_key():
    net = network("outside_nodrop", CNN(CLASSES, rate=0.0))
    assert run(net, random_variables(net.shapes), train=True)[1].keys() == {"batch_stats"}


def test_a_call_that_no_signature_tells():
    with pytest.raises(ValueError, match="call="):
        network("outside_backwards", Backwards())

    def call(module, inputs, train):
        return module("fit" if train else "see", inputs)["probabilities"]

    net = network("outside_backwards", Backwards(), call=call)
    variables = random_variables(net.shapes)
    seen, fitted = (run(net, variables, train=t)[0].logits for t in (False, True))
    np.testing.assert_allclose(fitted, 2 * seen, rtol=1e-6)


def test_named_parts():
    net = network(
        "outside_parts",
        CNN(CLASSES),
        stages=("Block_0", "Block_1", "Block_1/Conv_0"),
        head="logits",
    )
    variables = random_variables(net.shapes)
    outputs, state = run(net, variables)
    assert [stage.shape for stage in outputs.stages] == [(8, 4, 4, 4), (8, 2, 2, 6), (8, 2, 2, 6)]
    assert outputs.stages[1].min() == 0 and outputs.stages[2].min() < 0  # the ReLU is the block's
    assert outputs.feature.shape == (8, 6) and set(state) == {"batch_stats"}
    kernel, bias = (variables["params"]["logits"][name] for name in ("kernel", "bias"))
    np.testing.assert_allclose(outputs.feature @ kernel + bias[None], outputs.logits, rtol=1e-5)
    np.testing.assert_allclose(net.head(variables, outputs.feature), outputs.logits, rtol=1e-5)
    gradient = jax.grad(lambda f: net.head(variables, f).sum())(outputs.feature)
    np.testing.assert_allclose(gradient[0], kernel.sum(1), rtol=1e-5)


def test_the_feature_is_named_or_the_average_of_the_last_stage_or_none():
    variables = random_variables(network("outside_parts", CNN(CLASSES)).shapes)

    def outputs(**options):
        return run(network("outside_parts", CNN(CLASSES), **options), variables)[0]

    assert outputs().feature is None
    pooled = outputs(stages=("Block_1",))
    np.testing.assert_allclose(pooled.feature, pooled.stages[0].mean((1, 2)), rtol=1e-6)
    np.testing.assert_array_equal(outputs(feature="logits").feature, pooled.logits)
    with pytest.raises(ValueError, match="shows no head"):
        network("outside_parts", CNN(CLASSES)).head(variables, pooled.feature)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": ("Block_2",)}, "'Block_2' of outside_bad is not called: there are.*'Block_0'"),
        ({"feature": "twice"}, "'twice' of outside_bad is called 2 times"),
        ({"head": "Conv_0"}, "'Conv_0' of outside_bad is not called.*'Block_1/Conv_0'"),
        ({"feature": "Block_0"}, r"feature of shape \(2, 4, 4, 4\).*expected \(2, F\)"),
        ({"stages": ("logits",)}, r"stage 1 of outside_bad has shape \(2, 3\)"),
    ],
)
def test_parts_that_are_not_there_are_refused_with_those_that_are(options, message):
    with pytest.raises(ValueError, match=message):
        network("outside_bad", CNN(CLASSES), **options)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (CNN(CLASSES + 1), r"logits of shape \(2, 4\).*3 classes: expected \(2, 3\)"),
        (Backwards(), "needs"),
        (CNN, "the class CNN"),
        (nn.Sequential([lambda x: {"a": x}]), "gives dict: expected logits"),
        (
            (lambda key: {"params": {}}, lambda v, x: models.Outputs(x[:, 0, :3, 0], None, None)),
            "gives Outputs whose stages are NoneType: expected a tuple of arrays",
        ),
        (nn.Dense(CLASSES), r"logits of shape \(2, 8, 8, 3\)"),
        (nn.Sequential([lambda x: x.nothing]), "cannot be initialised.*AttributeError"),
        (3, "gives int: expected a Network"),
        ((lambda key: {"weights": 1}, lambda v, x: x), "'params' among them"),
        (models.build("plane2", 4, SHAPE), "4 classes"),
    ],
)
def test_what_is_no_network_is_refused(made, message):
    with pytest.raises(ValueError, match=message):
        network("outside_bad", made)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet20", {}, "'resnet20' is a built-in network"),
        ("wrn_22_4", {}, "built-in"),
        *((f"a{character}b", {}, "without spaces") for character in "<>+;,#: \n"),
        ("", {}, "without spaces"),
        ("fine", {"version": 2}, "version of fine is a text, got 2"),
        ("fine", {"stages": "Block_0"}, "several names"),
    ],
)
def test_names_and_arguments_are_checked_when_registered(name, options, message):
    with pytest.raises(ValueError, match=message):
        models.register_network(name, lambda classes, inputs: CNN(classes), **options)


def test_a_name_is_known_and_may_be_registered_again():
    models.register_network("outside_again", lambda classes, inputs: CNN(classes))
    models.check_name("outside_again")
    first = models.build("outside_again", CLASSES, SHAPE)
    assert models.build("outside_again", CLASSES, SHAPE) is first
    models.register_network("outside_again", lambda classes, inputs: Plain(), version="2")
    second = models.build("outside_again", CLASSES, SHAPE)
    assert second != first and "batch_stats" not in second.shapes
    with pytest.raises(ValueError, match="did you mean 'outside_again'"):
        models.check_name("outside_agian")
    for prefix in models.BRANCHED:
        with pytest.raises(ValueError, match=f"{prefix}:outside_again: .* comes from outside"):
            models.build(f"{prefix}:outside_again", CLASSES, SHAPE)


def test_build_is_told_of_classes_and_inputs():
    told = []

    def build(classes, inputs):
        told.append((classes, inputs))
        return CNN(classes)

    models.register_network("outside_told", build)
    models.build("outside_told", 7, (8, 8, 3))
    assert told == [(7, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))]


def test_a_network_of_the_library_under_another_name():
    net = network("outside_plane", models.build("plane2", CLASSES, SHAPE))
    variables = random_variables(net.shapes)
    plane = models.build("plane2", CLASSES, SHAPE)
    assert (net.name, net.version, net.module) == ("outside_plane", "1", plane.module)
    logits, expected = (run(each, variables)[0].logits for each in (net, plane))
    np.testing.assert_array_equal(logits, expected)
    grown = models.build("evolving:outside_plane", CLASSES, SHAPE)
    assert grown.branches == 1 and grown.backbone == net


class Stages(nn.Module):
    """A module called as the library's are, with so many stages and no method `upper`."""

    stages: int

    @nn.compact
    def __call__(self, images, mode):
        maps = [nn.Dense(3, name=f"layer{i}")(images) for i in range(self.stages)]
        feature = images.mean((1, 2))
        return models.Outputs(nn.Dense(CLASSES, name="fc")(feature), feature, tuple(maps))


@pytest.mark.parametrize(
    ("prefix", "stages", "message"),
    [
        ("one", 2, "the module of outside_stages has no method `upper`"),
        ("okddip", 2, "the module of outside_stages has no method `upper`"),
        ("dks", 1, "expected outside_stages to show two or more, got 1"),
        ("evolving", 1, "expected outside_stages to show two or more, got 1"),
    ],
)
def test_branches_that_do_not_grow_on_a_module_are_refused(prefix, stages, message):
    module = Stages(stages)
    registered = models.Network("any", module, CLASSES, SHAPE)
    models.register_network("outside_stages", lambda classes, inputs: registered)
    with pytest.raises(ValueError, match=message) as caught:
        models.build(f"{prefix}:outside_stages", CLASSES, SHAPE)
    assert "\n" not in str(caught.value)


def linear_pair():
    def init(key):
        return {
            "params": {"w": jax.random.normal(key, (64, CLASSES))},
            "count": {"n": jnp.zeros(())},
        }

    def apply(variables, inputs, *, train, rngs, axis_name):
        x = inputs.reshape(len(inputs), -1)
        if rngs is not None:
            x += jax.random.normal(rngs, x.shape)
        state = {"count": {"n": variables["count"]["n"] + 1}}
        return models.Outputs(x @ variables["params"]["w"], x, ()), state

    return init, apply


def test_a_pair_of_functions():
    net = network("outside_pair", linear_pair())
    variables = net.init(jax.random.key(0))
    outputs, state = run(net, variables, 1)
    np.testing.assert_allclose(
        outputs.logits, images().reshape(8, -1) @ variables["params"]["w"], rtol=1e-5
    )
    assert state == {"count": variables["count"]}  # outside training nothing changes
    noisy, state = run(net, variables, 1, train=True)
    assert state["count"]["n"] == 1 and np.abs(noisy.logits - outputs.logits).max() > 1e-2


def test_the_simplest_pair():
    init, _ = linear_pair()
    pair = (init, lambda v, x: (x.reshape(len(x), -1) @ v["params"]["w"]).astype(jnp.bfloat16))
    net = network("outside_pair", pair)
    outputs, state = run(net, net.init(jax.random.key(0)), train=True)
    assert outputs.logits.dtype == jnp.float32 and set(state) == {"count"}
    with pytest.raises(ValueError, match="stages, head name parts"):
        network("outside_pair", pair, stages=("a",), head="b")


def test_a_pair_that_changes_the_shape_of_its_state():
    init, _ = linear_pair()
    pair = (init, lambda v, x, train: (x.reshape(len(x), -1) @ v["params"]["w"], {"count": {}}))
    with pytest.raises(ValueError, match="changes the shapes of its collections.*absent"):
        network("outside_pair", pair)
