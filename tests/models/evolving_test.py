"""TESKD's evolving networks: sizes, shapes over any backbone, deployment, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow
from random_variables import random_variables

from distill_jax import models


def pictures(size):
    return np.random.default_rng(1).normal(size=(4, size, size, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "backbone", "branches"),
    [
        ("cifar_resnet18", 11_220_132, 25_830_700),
        ("cifar_vgg16", 15_299_748, 9_545_004),
        *slow(
            ("cifar_resnet34", 21_328_292, 25_830_700),
            ("cifar_resnext18", 22_209_444, 25_830_700),
            ("cifar_senet18", 11_314_012, 25_830_700),
            ("cifar_vgg19", 20_612_004, 9_545_004),
        ),
    ],
)
def test_parameter_count(name, backbone, branches):
    network = models.build(f"evolving:{name}", 100, (32, 32, 3))
    assert network.backbone == models.build(name, 100, (32, 32, 3))
    assert models.count_parameters(network.backbone) == backbone
    assert models.count_parameters(network) == backbone + branches


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("plane2", 28, 1),
        ("plane5", 30, 2),
        ("resnet20", 30, 2),
        ("vgg8", 32, 3),
        ("cifar_resnet18", 29, 3),
        *slow(
            ("plane10", 33, 3),
            ("resnet8x4", 32, 2),
            ("wrn_16_2", 32, 2),
            ("cifar_resnext50", 32, 3),
            ("cifar_vgg19", 32, 3),
            ("imagenet_resnet18", 200, 3),
        ),
    ],
)
def test_any_backbone_that_shows_its_stages(name, size, count):
    network = models.build(f"evolving:{name}", 7, (size, size, 3))
    variables = jax.eval_shape(network.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    outputs, collections = jax.eval_shape(
        lambda v, x: network.apply(v, x, train=True), variables, images
    )
    width = outputs.stages[-1].shape[-1]
    assert len(outputs.branches) == count == len(outputs.stages) - 1
    for part in (outputs, *outputs.branches):
        assert part.logits.shape == (2, 7)
        assert part.feature.shape == (2, width)
    assert collections == {"batch_stats": variables["batch_stats"]}
    backbone = jax.eval_shape(network.backbone.init, jax.random.key(0))
    assert jax.eval_shape(lambda v: models.deploy(network, v), variables) == backbone


@pytest.mark.parametrize("name", ["plane4", "wrn_10_1"])
def test_the_deployed_backbone_gives_the_logits_it_gave_inside(name):
    network = models.build(f"evolving:{name}", 10, (20, 20, 3))
    variables = random_variables(network.shapes)
    images = pictures(20)
    deployed = models.deploy(network, variables)
    inside = jax.jit(lambda v, x: network.apply(v, x)[0])(variables, images)
    alone = jax.jit(lambda v, x: network.backbone.apply(v, x)[0])(deployed, images)
    np.testing.assert_allclose(alone.logits, inside.logits, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(alone.stages, inside.stages, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    assert models.count_parameters(network.backbone) == sum(
        leaf.size for leaf in jax.tree.leaves(deployed["params"])
    )


def test_a_plain_network_is_its_own_backbone():
    network = models.build("plane2", 10, (8, 8, 3))
    variables = random_variables(network.shapes)
    assert network.backbone is network
    deployed = models.deploy(network, variables)
    assert jax.tree.structure(deployed) == jax.tree.structure(variables)
    assert all(map(np.array_equal, jax.tree.leaves(deployed), jax.tree.leaves(variables)))


def test_gradients_reach_the_backbone_through_every_branch():
    network = models.build("evolving:plane5", 10, (8, 8, 3))
    variables = random_variables(network.shapes)
    images = pictures(8)

    @jax.jit
    @jax.grad
    def gradient_of(params, weights):
        outputs, _ = network.apply({**variables, "params": params}, images, train=True)
        return jnp.dot(weights, jnp.stack([b.logits.max() for b in outputs.branches]))

    for weights in np.eye(2):
        gradient = gradient_of(variables["params"], weights)
        assert np.abs(gradient["conv_layers.0"]["kernel"]).max() > 1e-3
        assert np.abs(gradient["fc_layers.0"]["kernel"]).max() == 0


def test_fresh_branches_start_as_the_published_code_draws_them():
    def draw(name):
        network = models.build(f"evolving:{name}", 10, (32, 32, 3))
        lateral = jax.jit(lambda key: network.init(key)["params"]["laterals.0.0"]["kernel"])
        return lateral(jax.random.key(0))

    assert np.std(draw("cifar_resnet18")) == pytest.approx((3 * 64) ** -0.5, rel=0.02)
    assert np.std(draw("cifar_resnext18")) == pytest.approx((2 / 512) ** 0.5, rel=0.02)
    assert np.std(draw("cifar_vgg16")) == pytest.approx((2 / 512) ** 0.5, rel=0.02)
