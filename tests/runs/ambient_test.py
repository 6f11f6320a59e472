"""Settings of JAX that others made: the same numbers under the same id, whatever they are."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import distill_jax
from distill_jax import models
from distill_jax.train.reporter import Reporter

CONFIG = {
    "dataset": {"name": "synthetic:8x8x1:4:48:32", "valid_fraction": 0.25},
    "networks": ("plane2",),
    "guidance": ("none",),
    "recipe": {"epochs": 1, "batch_size": 12, "augment": "crop_flip"},
}


def trained(*contexts, **changes):
    """The row of a run under some settings, and the types of its weights."""
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        results = distill_jax.run({**CONFIG, **changes})
    _, variables = results.networks["none", "plane2", 0]
    return results.rows[0], {str(leaf.dtype) for leaf in jax.tree.leaves(variables)}


@pytest.fixture(scope="module")
def plain():
    return trained()


@pytest.mark.parametrize(
    "setting",
    [
        lambda: jax.enable_x64(True),
        lambda: jax.default_prng_impl("rbg"),
        lambda: jax.threefry_partitionable(False),
        lambda: jax.numpy_dtype_promotion("strict"),
    ],
    ids=["x64", "rbg", "threefry", "strict"],
)
def test_what_others_set_changes_neither_the_id_nor_a_bit(plain, setting):
    row, types = trained(setting())
    for name in ("stage", "state_digest"):
        assert row[name] == plain[0][name]
    assert types == {"float32"}


def test_a_precision_that_was_chosen_is_another_stage(plain):
    row, _ = trained(jax.default_matmul_precision("highest"))
    assert row["stage"] != plain[0]["stage"]


def test_float64_computes_in_it_and_leaves_the_setting_as_it_was(plain):
    row, types = trained(dtype="float64")
    assert not jax.config.jax_enable_x64
    assert row["stage"] != plain[0]["stage"] and row["state_digest"] != plain[0]["state_digest"]
    assert np.isfinite(row["test_accuracy"])
    assert types == {"float64"}


def test_numbers_of_a_recipe_are_no_narrower_than_the_network():
    def digest(rate, dtype):
        recipe = {**CONFIG["recipe"], "learning_rate": rate}
        return trained(dtype=dtype, recipe=recipe)[0]["state_digest"]

    near = float(np.float32(0.1))
    assert digest(0.1, "float64") != digest(near, "float64")
    assert digest(0.1, "float32") == digest(near, "float32")


def test_a_network_draws_its_own_type_whatever_is_set():
    network = models.build("resnet8", 4, (8, 8, 1))
    with jax.enable_x64(True):
        drawn = network.init(jax.random.key(0))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(drawn)} == {"float32"}


def test_float64_where_jax_has_it_not_is_refused():
    network = models.build("plane2", 4, (8, 8, 1), "float64")
    with jax.enable_x64(True):
        variables = network.init(jax.random.key(0))
        assert network.apply(variables, jnp.ones((2, 8, 8, 1)))[0].logits.dtype == jnp.float64
    for call in (
        lambda: network.init(jax.random.key(0)),
        lambda: network.apply(variables, jnp.ones((2, 8, 8, 1))),
    ):
        with pytest.raises(ValueError, match="plane2 is to compute in float64 and JAX's .* off"):
            call()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_registered_network_that_computes_in_its_own_types_is_named(dtype):
    class Small(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(x.mean((1, 2)))

    class Lines(Reporter):
        def __init__(self):
            self.lines = []

        def notice(self, lines):
            self.lines += lines

    models.register_network("ambient_small", lambda classes, inputs: Small())
    told = Lines()
    config = {**CONFIG, "dtype": dtype, "networks": ("plane2", "ambient_small")}
    distill_jax.run({**config, "students": ("plane2", "ambient_small")}, reporter=told)
    named = [line for line in told.lines if "dtype" in line]
    expected = "  warning: ambient_small is registered and chooses its own types: "
    assert named == ([] if dtype == "float32" else [f"{expected}dtype bfloat16 is not its"])
