"""What a method's case gives, and what our method makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.methods import Context, Hyper, Method, Term, total
from experiments.parity.losses import outputs

Arrays = dict[str, jax.Array]


class Computed(NamedTuple):
    """What a method gives for the inputs of a case.

    Args:
      losses: scalars by their name in the case.
      after: the state dict of its buffers after the call.
      undefined: by the name of an input, (B,) which of its examples have no gradient by the
        equations; what the reference has there is not compared.
      outs: intermediate results by their name in the case.
    """

    losses: dict[str, jax.Array]
    after: dict[str, Any] = {}
    undefined: dict[str, jax.Array] = {}
    outs: dict[str, jax.Array] = {}


# (numbers of the case and, as "case", its name; inputs; state dict of its adapters) -> what our
# method gives.
Compute = Callable[[dict[str, Any], Arrays, Arrays], Computed]


def on_logits(inputs: Arrays, hyper: Hyper = Hyper(), **others: Any) -> Context:
    """The context of a case that gives a student's logits and perhaps a teacher's, or several's."""
    student = inputs["student_logits"]
    given = inputs.get("teacher_logits", jnp.zeros((0, *student.shape)))
    teachers = [outputs(x) for x in (given if given.ndim == 3 else [given])]
    return Context(
        student=outputs(student),
        teachers=tuple(teachers),
        teacher_mask=jnp.ones(len(teachers), bool),
        labels=inputs.get("labels", jnp.zeros(len(student), jnp.int32)),
        hyper=hyper,
        batch_size=len(student),
        **others,
    )


def weighted(terms: dict[str, Term]) -> Arrays:
    """Each term, its weight times its mean."""
    return {name: total({name: term}) for name, term in terms.items()}


def sums(methods: Sequence[Method], context: Context) -> Arrays:
    """Of methods without variables, each term; a method's own weight counts."""
    found: Arrays = {}
    for method in methods:
        found |= weighted(method.terms({}, context)[0])
    return found
