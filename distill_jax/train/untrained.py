"""Networks before their first step, as their methods see them there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from distill_jax import rng
from distill_jax.methods import Context, Hyper
from distill_jax.models import Network, Variables
from distill_jax.train.terms import Live

KEY = 0  # of what networks and methods draw


def first_context(inputs: Any, labels: Array) -> Context:
    """The context of a batch that is the whole split; `student_terms` fills in what is shown."""
    places = jnp.arange(len(labels), dtype=jnp.int32)
    return Context(
        student=None,  # type: ignore[arg-type]
        teachers=(),
        teacher_mask=jnp.ones(0, bool),
        labels=labels,
        hyper=Hyper(),
        inputs=inputs,
        index=places,
        position=places,
        batch_size=len(labels),
    )


def live(
    network: Network, variables: Variables, inputs: Any, others: Mapping[str, Any] | None = None
) -> Live:
    """A network on a batch, by the batch's own statistics: it has no others yet.

    Args:
      network: it.
      variables: its own.
      inputs: what it sees.
      others: what it sees besides, by data need.
    """
    key = jax.random.key(KEY)

    def apply(params, inputs):
        given = {**variables, "params": params}
        return network.apply(given, inputs, train=True, rngs=rng.stream(key, "network"))[0]

    def head(params, feature):
        return network.head({"params": params}, feature)

    params = variables["params"]
    besides = {need: apply(params, seen) for need, seen in (others or {}).items()}
    return Live(apply(params, inputs), params, head, apply, besides)


def key_of(method: str) -> Array:
    """The random key of a method by its name."""
    return rng.stream(jax.random.key(KEY), f"method {method}")
