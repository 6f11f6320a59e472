"""Networks that are not trained: what is made of their weights, and groups of them as one body."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow
from random_variables import random_variables

from distill_jax import models
from distill_jax.models.backend import traced_for
from distill_jax.models.basics import Mode
from distill_jax.train import programs
from distill_jax.train.sharding import Topology
from distill_jax.train.teachers import FrozenTeachers, frozen_forward

SIZE = 8
GROUPS = {
    "resnet20 resnet14 resnet14": [3],
    "wrn_22_1 wrn_16_1": [2],
    "resnet20 resnet8": [1, 1],  # the last has no equal blocks
    "resnet20 wrn_16_1 resnet14": [1, 1, 1],  # not side by side
    "resnet20 resnet14x2": [1, 1],  # of other widths
    "evolving:resnet14 plane4 vgg8": [1, 1, 1],
}


def build(name, **options):
    return models.build(name, 5, (SIZE, SIZE, 3), **options)


def images(n, seed=0):
    return jax.random.normal(jax.random.key(seed), (n, SIZE, SIZE, 3))


def build_all(text):
    networks = tuple(build(name) for name in text.split())
    return networks, tuple(
        random_variables(network.shapes, i) for i, network in enumerate(networks)
    )


@pytest.mark.parametrize(
    ("text", "batch"),
    [
        ("resnet20 wrn_16_1 resnet14", 3),
        ("resnet20 resnet14 resnet14", 32),
        *slow(*((text, 3) for text in GROUPS if text != "resnet20 wrn_16_1 resnet14")),
    ],
)
def test_a_group_gives_what_its_networks_give_alone(text, batch):
    networks, variables = build_all(text)
    frozen = FrozenTeachers(networks)
    assert [len(group) for group in frozen.groups] == GROUPS[text]
    x = images(batch)
    logits = jax.jit(lambda v: frozen.outputs(v, x, None).logits)(variables)
    chex.assert_shape(logits, (len(networks), batch, 5))
    made = programs.freeze_teachers(networks, variables, Topology())
    np.testing.assert_allclose(
        jax.jit(lambda v: frozen.outputs(v, x, None).logits)(made),
        logits,
        rtol=1e-4,
        atol=1e-5 * np.abs(logits).max(),
    )
    for network, own, found in zip(networks, variables, logits, strict=True):
        alone = jax.jit(lambda v, network=network: network.apply(v, x)[0].logits)(own)
        np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-5 * np.abs(alone).max())
        assert np.abs(alone).max() > 1e-2


@pytest.mark.parametrize("keep", [(True, False, True), (False, True, False), (False,) * 3])
def test_those_of_a_group_that_are_dropped_give_zeros(keep):
    networks, variables = build_all("resnet20 resnet14 plane4")
    outputs = jax.jit(FrozenTeachers(networks).outputs)
    everyone = outputs(variables, images(4), jnp.ones(3, bool)).logits
    some = outputs(variables, images(4), jnp.array(keep)).logits
    np.testing.assert_array_equal(some, everyone * np.array(keep)[:, None, None])


@pytest.mark.parametrize(
    "keep", [(True, False, True), *slow(((False, True, False),), ((False,) * 3,))]
)
def test_a_dropped_one_is_not_computed(keep, monkeypatch):
    ran, run = [], frozen_forward

    def counting(*arguments):
        jax.debug.callback(lambda: ran.append(1))
        return run(*arguments)

    monkeypatch.setattr("distill_jax.train.teachers.frozen_forward", counting)
    networks, variables = build_all("resnet20 resnet14 plane4")
    outputs = jax.jit(FrozenTeachers(networks).outputs)
    jax.block_until_ready(outputs(variables, images(4), jnp.array(keep)))
    jax.effects_barrier()
    assert len(ran) == sum(keep)


@pytest.mark.parametrize("name", ["resnet8", *slow("resnet14"), "resnet20", *slow("wrn_22_1")])
def test_every_block_of_a_fresh_network_is_drawn_for_itself(name):
    network = build(name)
    fresh = network.init(jax.random.key(0))
    plainly = jax.eval_shape(
        lambda: network.module.init(
            jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)), Mode(train=True)
        )
    )
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, dict(plainly))
    kernels = [leaf for leaf in jax.tree.leaves(fresh["params"]) if leaf.ndim == 4]
    assert len({np.asarray(kernel).tobytes() for kernel in kernels}) == len(kernels)
    for kernel in kernels:
        if kernel.size > 1000:
            expected = (2 / (kernel.shape[0] ** 2 * kernel.shape[3])) ** 0.5
            assert float(kernel.std()) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(
    "name", [*slow("resnet20", "wrn_16_1"), "plane4", *slow("evolving:resnet14")]
)
def test_frozen_weights_serve_every_batch(name):
    network = build(name)
    variables = random_variables(network.shapes, 0)
    frozen = jax.jit(network.freeze)(variables)
    assert network.freeze(frozen) is frozen
    x = images(40)
    logits = jax.jit(lambda variables, x: network.apply(variables, x)[0].logits)
    whole = logits(variables, x)
    for part in (slice(0, 1), slice(0, 16), slice(3, 20), slice(0, 40)):
        np.testing.assert_allclose(
            logits(frozen, x[part]), whole[part], rtol=1e-4, atol=1e-4 * np.abs(whole).max()
        )


def test_other_weights_are_another_network():
    """What a group is made of is its own: no network takes another's blocks."""
    networks, variables = build_all("resnet20 resnet14 resnet14")
    frozen = FrozenTeachers(networks)
    logits = jax.jit(lambda v: frozen.outputs(v, images(4), None).logits)
    before = logits(variables)
    changed = jax.tree.map(lambda x: 1.1 * x, variables[1])
    after = logits((variables[0], changed, variables[2]))
    np.testing.assert_array_equal(after[0], before[0])
    np.testing.assert_array_equal(after[2], before[2])
    assert np.abs(after[1] - before[1]).max() > 1e-3


def test_elsewhere_than_on_a_cpu_each_is_a_body_of_its_own():
    networks, variables = build_all("resnet14 resnet14 plane4")
    frozen = FrozenTeachers(networks)
    assert [len(group) for group in frozen.groups] == [2, 1]
    here = jax.jit(lambda v: frozen.outputs(v, images(4), None).logits)(variables)

    def elsewhere(v):
        assert [len(group) for group in frozen.groups] == [1, 1, 1]
        return frozen.outputs(frozen.freeze(v), images(4), None).logits

    there = jax.jit(traced_for("gpu", elsewhere))(variables)
    np.testing.assert_allclose(there, here, rtol=1e-3, atol=1e-5 * np.abs(here).max())


@pytest.mark.slow
def test_half_precision_joins_only_its_own():
    pair = (build("resnet20"), build("resnet14", dtype="bfloat16"))
    assert len(FrozenTeachers(pair).groups) == 2
    half = tuple(dataclasses.replace(network, dtype="bfloat16") for network in pair)
    assert len(FrozenTeachers(half).groups) == 1
    variables = tuple(random_variables(network.shapes, i) for i, network in enumerate(half))
    frozen = FrozenTeachers(half)
    logits = jax.jit(lambda v: frozen.outputs(v, images(16), None).logits)(variables)
    for network, own, found in zip(half, variables, logits, strict=True):
        alone = jax.jit(lambda v, network=network: network.apply(v, images(16))[0].logits)(own)
        np.testing.assert_allclose(found, alone, rtol=0.1, atol=0.1 * np.abs(alone).max())
