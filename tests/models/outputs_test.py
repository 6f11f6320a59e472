"""What every built-in network shows besides its logits: stem, stages, preactivations, head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow
from random_variables import random_variables

from distill_jax import models
from distill_jax.models.kernels.pools import max_pool
from distill_jax.models.zoo.resnet import CifarResNet

SIZES = {  # of images, the smallest that tell something
    "plane8": 16,
    "resnet14": 8,
    "resnet8x2": 8,
    "wrn_16_1": 8,
    "vgg8": 8,
    "mobilenetv2": 16,
    "shufflenetv1": 8,
    "shufflenetv2": 8,
    "cifar_resnet18": 8,
    "cifar_senet18": 8,
    "cifar_vgg16": 32,
    "imagenet_resnet50": 32,
}


def inputs(size):
    return np.random.default_rng(1).normal(size=(2, size, size, 3)).astype(np.float32)


def jitted(function):
    return jax.jit(function, compiler_options=models.run_once("cpu"))


@functools.cache
def shown(name, train=False):
    """A network, its variables, and all that it shows."""
    size = SIZES[name]
    network = models.build(name, 5, (size, size, 3))
    variables = random_variables(network.shapes)
    outputs = jitted(lambda v, x: network.apply(v, x, train=train)[0])(variables, inputs(size))
    return network, variables, jax.device_get(outputs)


LARGE = ("resnet8x2", "imagenet_resnet50")
NAMES = [*(name for name in SIZES if name not in LARGE), *slow(*LARGE)]
CASES = [
    *((name, False) for name in SIZES if name not in LARGE),
    *(("resnet14", True), ("wrn_16_1", True)),
    *slow(*((name, False) for name in LARGE)),
]


@pytest.mark.parametrize(("name", "train"), CASES)
def test_stages_are_preactivations_after_their_relu(name, train):
    _, _, outputs = shown(name, train)
    assert len(outputs.preacts) == len(outputs.stages)
    for stage, preact in zip(outputs.stages, outputs.preacts, strict=True):
        assert stage.shape == preact.shape
        assert preact.min() < 0 or "senet" in name  # where a sum of ReLUs is not negative
        if name == "mobilenetv2":  # no activation follows
            np.testing.assert_array_equal(stage, preact)
        elif name == "shufflenetv2":
            shuffled = np.stack(np.split(preact, 2, -1), -1).reshape(preact.shape)
            np.testing.assert_array_equal(stage, np.maximum(shuffled, 0))
        elif not name.startswith("wrn"):
            np.testing.assert_array_equal(stage, np.maximum(preact, 0))


def normalised(x, variables, *path):
    """`x` after the BatchNorm at `path`, by its running statistics."""
    params, stats = (
        functools.reduce(lambda tree, name: tree[name], path, jax.device_get(variables[kind]))
        for kind in ("params", "batch_stats")
    )
    scale = params["scale"] / np.sqrt(stats["var"] + 1e-5)
    return (x - stats["mean"]) * scale + params["bias"]


def test_wide_resnets_are_normalised_by_the_next_batch_norm_before_their_relu():
    _, variables, outputs = shown("wrn_16_1")
    norms = [("block2.layer.0", "bn1"), ("block3.layer.0", "bn1"), ("bn1",)]
    for stage, preact, path in zip(outputs.stages, outputs.preacts, norms, strict=True):
        np.testing.assert_allclose(
            preact, normalised(stage, variables, *path), rtol=1e-4, atol=1e-4
        )


STEMS = {name: [("conv1", "bn1")] for name in SIZES} | {
    "plane8": [("conv_layers.0", "conv_layers.1")],
    "vgg8": [("block0.0", "block0.1")],
    "mobilenetv2": [("conv1.0", "conv1.1")],
    "cifar_senet18": [("pre.0", "pre.1")],
    "cifar_vgg16": [("conv1", "bn1"), ("conv2", "bn2")],
    "wrn_16_1": [("conv1", None)],  # nothing but a convolution
}


@pytest.mark.parametrize("name", NAMES)
def test_the_stem_is_the_first_convolution_normalised_and_activated(name):
    _, variables, outputs = shown(name)
    stride = 2 if name.startswith(("imagenet", "mobilenet")) else 1
    x = inputs(SIZES[name])
    for conv, norm in STEMS[name]:
        weights = variables["params"][conv]
        pads = [(weights["kernel"].shape[0] // 2,) * 2] * 2
        dimensions = ("NHWC", "HWIO", "NHWC")
        x = np.asarray(
            jax.lax.conv_general_dilated(
                x, weights["kernel"], (stride, stride), pads, dimension_numbers=dimensions
            )
        )
        x = x + np.asarray(weights.get("bias", 0))
        x = x if norm is None else np.maximum(normalised(x, variables, norm), 0)
    np.testing.assert_allclose(outputs.stem, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_head_gives_the_logits_of_the_feature(name):
    network, variables, outputs = shown(name)
    head = jitted(network.head)
    logits = head(variables, outputs.feature)
    np.testing.assert_allclose(logits, outputs.logits, rtol=1e-4, atol=1e-4)
    frozen = jax.eval_shape(network.freeze, variables)
    assert jax.eval_shape(network.head, frozen, outputs.feature).shape == logits.shape
    assert np.abs(head(variables, 2 * outputs.feature) - logits).max() > 1e-2
    with pytest.raises(ValueError, match=rf"head of {name} takes features of shape"):
        network.head(variables, outputs.feature[:, 1:])


def test_the_head_of_an_evolving_network_takes_its_feature_where_that_is_the_backbones():
    resnet, plane = (models.build(f"evolving:{n}", 5, (8, 8, 3)) for n in ("resnet8", "plane4"))
    variables = random_variables(resnet.shapes)
    outputs = jitted(lambda v, x: resnet.apply(v, x)[0])(variables, inputs(8))
    np.testing.assert_allclose(
        resnet.head(variables, outputs.feature), outputs.logits, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="head of evolving:plane4 takes"):
        plane.head(random_variables(plane.shapes), jnp.zeros((2, 32)))


def test_the_pool_of_a_preactivation_is_that_before_the_relu():
    """What makes the preacts of TESKD's VGG its stages': a ReLU and a pool commute."""
    x = inputs(6)
    np.testing.assert_array_equal(max_pool(np.maximum(x, 0)), np.maximum(max_pool(x), 0))


def test_apply_gives_every_collection_after_it():
    network = models.build("plane2", 5, (8, 8, 3))
    variables, x = random_variables(network.shapes), inputs(8)
    _, same = jitted(network.apply)(variables, x)
    assert same.keys() == {"batch_stats"}
    jax.tree.map(np.testing.assert_array_equal, same["batch_stats"], variables["batch_stats"])
    _, after = jitted(functools.partial(network.apply, train=True))(variables, x)
    assert jax.tree.structure(after) == jax.tree.structure(same)
    for before, now in zip(jax.tree.leaves(same), jax.tree.leaves(after), strict=True):
        assert np.abs(before - now).max() > 1e-3
    frozen = jax.eval_shape(network.freeze, variables)
    assert jax.eval_shape(network.apply, frozen, x)[1].keys() == {"batch_stats"}


def test_what_nobody_uses_costs_nothing():
    """The loop over equal blocks carries no second map where only logits are asked for."""
    module = CifarResNet((4, 1, 1), (4, 4, 8, 8), 5)
    network = models.Network("short", module, 5, (8, 8, 3))

    def carried(show):
        lowered = jax.jit(lambda v, x: show(network.apply(v, x)[0])).lower(
            network.shapes, inputs(8)
        )
        lines = lowered.compile().as_text().splitlines()
        (loop,) = (line.partition(" while(")[0] for line in lines if " while(" in line)
        return loop.count("f32[2,8,8,4]")

    assert carried(lambda outputs: outputs.logits) == 1
    assert carried(lambda outputs: (outputs.logits, outputs.preacts)) == 2
