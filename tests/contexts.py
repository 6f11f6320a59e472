"""What methods are given in tests, without any network."""

from typing import Any

import jax.numpy as jnp

from distill_jax.methods import Context, Hyper
from distill_jax.models import Outputs


def outputs_of(logits: Any, feature: Any = None, **others: Any) -> Outputs:
    """Outputs that show logits, and of the rest what is given."""
    return Outputs(logits, feature, others.pop("stages", ()), **others)


def context_of(
    student: Outputs,
    teachers: Any = (),
    teacher_mask: Any = None,
    labels: Any = None,
    hyper: Hyper = Hyper(),
    **others: Any,
) -> Context:
    """The context of a step; teachers are outputs or logits, and all are kept where none is said.

    Args:
      student: its outputs.
      teachers: K outputs, or their logits (K, B, C).
      teacher_mask: (K,) booleans.
      labels: (B,); zeros where they do not matter.
      hyper: the numbers of the step.
      **others: fields of `Context`.
    """
    size = len(student.logits)
    shown = tuple(t if isinstance(t, Outputs) else outputs_of(t) for t in teachers)
    keep = jnp.ones(len(shown), bool) if teacher_mask is None else teacher_mask
    labels = jnp.zeros(size, jnp.int32) if labels is None else labels
    return Context(student, shown, keep, labels, hyper, batch_size=size, **others)
