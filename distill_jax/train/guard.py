"""Steps whose numbers are not finite: what spoilt them, and that they change nothing."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from distill_jax.train.metrics import StepMetrics
from distill_jax.train.state import TrainState
from distill_jax.train.teachers import TeacherOutputs

SMALL = 2**14  # numbers of an array that is copied to be looked at with others


def is_halted(skipped: Any, max_nonfinite_steps: int) -> Any:
    """Whether `skipped` steps are more than may be; the state's step is then the last of them."""
    return skipped > max_nonfinite_steps


def nonfinite_counts(taught: TeacherOutputs, teachers: int) -> Array:
    """(K,) numbers that are not finite in what each teacher gave."""
    counts = [jnp.sum(~jnp.isfinite(taught.logits[k])) for k in range(teachers)]
    for k, features in enumerate(taught.features):
        counts[k] += sum(jnp.sum(~jnp.isfinite(x)) for x in jax.tree.leaves(features))
    return jnp.stack(counts) if counts else jnp.zeros((0,), jnp.int32)


def guarded(
    state: TrainState,
    updated: TrainState,
    counted: dict[str, StepMetrics],
    causes: dict[str, dict[str, Array]],
    max_nonfinite_steps: int,
) -> tuple[TrainState, dict[str, StepMetrics]]:
    """The state after a step, and what to count of it; nothing more where training has halted.

    A number that is not finite in one network stops the step for all.
    """
    bad = functools.reduce(jnp.logical_or, jax.tree.leaves(causes))
    halted = is_halted(state.skipped, max_nonfinite_steps)
    halts = bad & (state.skipped >= max_nonfinite_steps)
    chosen = jax.tree.map(lambda old, new: jnp.where(halted | bad, old, new), state, updated)
    after = chosen.replace(
        step=jnp.where(halted | halts, state.step, updated.step),
        skipped=state.skipped + (bad & ~halted),
    )
    counted = jax.tree.map(lambda x: jnp.where(halted | bad, jnp.zeros_like(x), x), counted)
    steps = (~halted).astype(jnp.int32)
    nonfinite = jax.tree.map(lambda flag: ((flag & ~halted).astype(jnp.int32), steps), causes)
    return after, {name: own._replace(nonfinite=nonfinite[name]) for name, own in counted.items()}


def all_finite(tree: Any) -> Array:
    """Whether every number of a tree is finite."""
    # Small ones as one vector: a test for each would be joined anew in every parameter's update.
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    small = [jnp.ravel(x) for x in leaves if x.size <= SMALL]
    tests = [jnp.all(jnp.isfinite(x)) for x in leaves if x.size > SMALL]
    if small:
        tests.append(jnp.all(jnp.isfinite(jnp.concatenate(small))))
    return jnp.all(jnp.stack(tests)) if tests else jnp.asarray(True)
