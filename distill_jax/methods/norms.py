"""Norms of the embeddings that an example looks up, as terms of the loss."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from distill_jax.methods.base import Context, Method, Shapes, Term
from distill_jax.methods.losses import widen


@dataclasses.dataclass(frozen=True, kw_only=True)
class N3(Method):
    """Σ |x|³ over the embeddings of an example; with teachers or without.

    Of a link scorer these are head, relation and tail of a triple.

    References:
      Lacroix et al., Canonical Tensor Decomposition for Knowledge Base Completion, ICML 2018,
      1806.07297.
    """

    power: ClassVar[int] = 3
    name: ClassVar[str] = "n3"
    needs: ClassVar[tuple[str, ...]] = ()
    taught: ClassVar[bool] = False
    mixes_labels: ClassVar[bool] = True

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where the network shows no embeddings."""
        if not shapes.student.embeddings:
            raise ValueError(
                f"{self.name} weighs embeddings, and the student shows none: expected one with "
                "Outputs.embeddings, such as complex_32"
            )

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"n3"}, or {"l2"}."""
        norms = [
            jnp.sum(jnp.abs(widen(x)) ** self.power, tuple(range(1, x.ndim)))
            for x in context.student.embeddings
        ]
        return {self.name: Term(sum(norms[1:], norms[0]))}, variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class L2(N3):
    """Σ |x|² over the embeddings of an example; with teachers or without."""

    power: ClassVar[int] = 2
    name: ClassVar[str] = "l2"
