"""What is not finite is found wherever it is."""

import jax
import jax.numpy as jnp
import pytest

from distill_jax.train.guard import SMALL, all_finite


def tree(**spoilt):
    arrays = {"small": jnp.ones(3), "other": jnp.ones((2, 2)), "large": jnp.ones(SMALL + 1)}
    return {**arrays, "counts": jnp.arange(3), **spoilt}


def test_finite_numbers_are_finite():
    assert all_finite(tree()) and all_finite({}) and all_finite({"counts": jnp.arange(3)})


@pytest.mark.parametrize("name", ["small", "other", "large"])
@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf])
def test_one_number_that_is_not_is_found(name, value):
    spoilt = tree()[name].ravel().at[-1].set(value)
    assert not jax.jit(all_finite)(tree(**{name: spoilt}))


def test_no_large_array_is_copied():
    lowered = jax.jit(all_finite).lower(tree()).as_text()
    copied = [line for line in lowered.splitlines() if "stablehlo.concatenate" in line]
    assert copied and not any(str(SMALL + 1) in line for line in copied)
