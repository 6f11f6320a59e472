"""Networks with branches: what grows on which backbone, and what is left when it goes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow
from random_variables import random_variables

from distill_jax import models

BACKBONES = [
    ("plane2", 8),
    ("plane5", 9),
    ("resnet8", 8),
    ("wrn_10_1", 9),
    ("vgg8", 64),
    *slow(
        ("plane10", 16),
        ("resnet8x4", 8),
        ("vgg8", 32),
        ("cifar_vgg16", 32),
        ("cifar_resnet18", 8),
        ("resnet50_cifar", 8),
        ("cifar_resnext18", 8),
        ("cifar_senet18", 8),
        ("mobilenetv2", 16),
        ("shufflenetv1", 8),
        ("shufflenetv2", 8),
        ("imagenet_resnet18", 64),
    ),
]


@pytest.mark.parametrize(("name", "size"), BACKBONES)
@pytest.mark.parametrize("prefix", ["one", "okddip", "okddip5", "dks"])
def test_branches_grow_on_any_backbone_and_leave_it_as_it_was(prefix, name, size):
    network = models.build(f"{prefix}:{name}", 7, (size, size, 3))
    outputs, shapes = network.output_shapes, network.shapes
    peers = {"one": 2, "okddip": 3, "okddip5": 5}.get(prefix)
    assert len(outputs.branches) == network.branches == (peers or len(outputs.stages) - 1)
    alone = models.build(name, 7, (size, size, 3))
    as_wide = outputs.stages[-1] if prefix == "dks" else alone.output_shapes.feature
    for exit in (outputs, *outputs.branches):
        assert exit.logits.shape == (1, 7)
        assert exit.feature.shape == (1, as_wide.shape[-1])
    assert network.backbone == alone and alone.method is None
    assert network.method == prefix.rstrip("5")
    left = jax.eval_shape(lambda v: models.deploy(network, v), shapes)
    assert jax.tree.map(jnp.shape, left) == jax.tree.map(jnp.shape, alone.shapes)


@pytest.mark.parametrize("name", ["plane4", *slow("wrn_10_1", "resnet14", "vgg8", "mobilenetv2")])
@pytest.mark.parametrize("prefix", ["one", "byot"])
def test_the_deployed_backbone_gives_the_logits_it_gave_inside(prefix, name):
    size = 16
    network = models.build(f"{prefix}:{name}", 10, (size, size, 3))
    variables = random_variables(network.shapes)
    images = np.random.default_rng(1).normal(size=(4, size, size, 3)).astype(np.float32)
    deployed = models.deploy(network, variables)
    inside = jax.jit(lambda v, x: network.apply(v, x)[0])(variables, images)
    alone = jax.jit(lambda v, x: network.backbone.apply(v, x)[0])(deployed, images)
    np.testing.assert_allclose(alone.logits, inside.logits, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(alone.stages, inside.stages, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["plane4", "resnet14", *slow("wrn_16_1", "vgg8", "cifar_vgg16")])
def test_a_peer_with_the_networks_weights_says_what_the_network_says(name):
    size = 32 if "vgg" in name else 8
    network = models.build(f"one:{name}", 5, (size, size, 3))
    variables = random_variables(network.shapes)
    for tree in variables.values():  # the last stage and the classifier again
        tree["peer1"] = {layer: tree[layer] for layer in tree["peer1"]}
    images = np.random.default_rng(2).normal(size=(3, size, size, 3)).astype(np.float32)
    for train in (False, True):
        run = jax.jit(lambda v, x, train=train: network.apply(v, x, train=train)[0])
        outputs = run(variables, images)
        same, other = outputs.branches
        np.testing.assert_allclose(same.logits, outputs.logits, rtol=1e-4, atol=1e-4)
        assert np.abs(other.logits - outputs.logits).max() > 1e-2


@pytest.mark.parametrize(
    ("name", "branches"),
    [("one:plane4", ["peer1", "peer2"]), ("byot:plane5", ["exit2", "exit1"])],
)
def test_gradients_of_a_branch_reach_the_first_stage_and_no_other_branch(name, branches):
    network = models.build(name, 5, (8, 8, 3))
    variables = random_variables(network.shapes)
    images = np.random.default_rng(3).normal(size=(4, 8, 8, 3)).astype(np.float32)

    @jax.jit
    @jax.grad
    def gradient_of(params, chosen):
        outputs, _ = network.apply({**variables, "params": params}, images, train=True)
        return jnp.dot(chosen, jnp.stack([exit.logits.max() for exit in outputs.branches]))

    for place, chosen in enumerate(np.eye(len(branches))):
        gradient = gradient_of(variables["params"], chosen)
        assert np.abs(gradient["conv_layers.0"]["kernel"]).max() > 1e-4
        assert np.abs(gradient["fc_layers.0"]["kernel"]).max() == 0
        moved = [any(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient[b])) for b in branches]
        assert moved == [i == place for i in range(len(branches))]


def test_names_of_branched_networks_are_taken_apart():
    for name, backbone in (
        ("one:plane2", "plane2"),
        ("okddip7:wrn_10_1#2", "wrn_10_1#2"),
        ("plane2", "plane2"),
        ("none:plane2", "none:plane2"),
        ("byot3:plane2", "byot3:plane2"),
    ):
        assert models.backbone_name(name) == backbone
