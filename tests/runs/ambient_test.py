"""Settings of JAX that others made: the same numbers under the same id, whatever they are."""

import contextlib

import jax
import numpy as np
import pytest

import distill_jax

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
    row, _ = trained(dtype="float64")
    assert not jax.config.jax_enable_x64
    assert row["stage"] != plain[0]["stage"] and row["state_digest"] != plain[0]["state_digest"]
    assert np.isfinite(row["test_accuracy"])
