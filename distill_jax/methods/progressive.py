"""A network taught by what it said of an example when it saw it last: PS-KD."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from distill_jax.methods.base import Context, Method, Shapes, Term
from distill_jax.methods.losses import widen
from distill_jax.methods.ranges import share

LARGE = 2**30  # bytes of a memory that is warned of


@dataclasses.dataclass(frozen=True, kw_only=True)
class PSKD(Method):
    """-Σ_c q_c log softmax(s)_c with q = (1-α_e) onehot(y) + α_e P, α_e = α (e+1)/E at epoch e.

    P is the student's softmax at the step that trained on the example last, kept in a memory of
    one row an example; in the first epoch it is the label. E is the number of epochs of the
    training, e is counted from 0. It stands in the place of the cross-entropy; no teacher is
    needed.

    The memory takes N C numbers, 20 MB for N = 50 000 and C = 100. It is replicated on every
    device and saved with each checkpoint.

    Args:
      alpha: α in [0, 1], the weight of the past predictions at the end.

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Kim et al., Self-Knowledge Distillation with Progressive Refinement of Targets, ICCV 2021,
      2006.12000, and its authors' code.
    """

    alpha: float = 0.8

    needs: ClassVar[tuple[str, ...]] = ()
    taught: ClassVar[bool] = False
    replaces_ce: ClassVar[bool] = True

    def __post_init__(self) -> None:
        share("ps_kd", alpha=self.alpha)

    def warnings(self, shapes: Shapes) -> list[str]:
        """A line where the memory is large."""
        size = shapes.examples * shapes.classes * 4
        if size <= LARGE:
            return []
        return [
            f"ps_kd remembers {shapes.examples} x {shapes.classes} probabilities: "
            f"{size / 2**30:.1f} GiB on every device and in every checkpoint"
        ]

    def init(self, key: Array, shapes: Shapes) -> dict[str, Any]:
        """{"memory": (N, C) probabilities}, of every example those of its label."""
        labels = jnp.asarray(shapes.labels, jnp.int32)
        return {"memory": {"probabilities": jax.nn.one_hot(labels, shapes.classes)}}

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"ps_kd"}, and the memory with the batch's probabilities in it."""
        memory, index = variables["memory"]["probabilities"], context.index
        assert index is not None
        log_probs = jax.nn.log_softmax(widen(context.student.logits))
        label = jax.nn.one_hot(context.labels, log_probs.shape[-1], dtype=log_probs.dtype)
        past = jnp.where(context.epoch < 1, label, memory[index].astype(log_probs.dtype))
        alpha = self.weight(context.epoch, context.epochs)
        targets = (1 - alpha) * label + alpha * past
        probabilities = lax.stop_gradient(jnp.exp(log_probs)).astype(memory.dtype)
        places, rows = map(context.whole_batch, (index, probabilities))
        after = {"probabilities": memory.at[places].set(rows)}
        return {"ps_kd": Term(-jnp.sum(targets * log_probs, -1))}, {**variables, "memory": after}

    def weight(self, epoch: Array | float, epochs: float) -> Array:
        """α_e of a step, by the epochs since the first one and those of the whole training."""
        return self.alpha * (jnp.floor(epoch) + 1) / epochs
