"""Scores of all entities as the tail of (head, relation): ComplEx, DistMult and TransE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from distill_jax.models.basics import Outputs
from distill_jax.models.indices import Indices

SPREAD = 0.05  # the standard deviation of fresh embeddings
_TINY = 1e-12  # keeps the gradient of a root finite


class LinkScorer(nn.Module):
    """Embeddings of entities and relations, and a score of each entity as the tail.

    The logits are one score an entity. `Outputs.embeddings` are the moduli of the head's, the
    relation's and once more the head's embedding: where each triple is trained on in both
    directions, every head is also a tail, so that these stand for a whole triple's.

    Args:
      kind: "complex", "distmult" or "transe".
      width: D, the numbers of an embedding; complex ones of ComplEx.
      classes: of entities.
      dtype: of the computation.

    References:
      Trouillon et al., Complex Embeddings for Simple Link Prediction, ICML 2016, 1606.06357; Yang
      et al., Embedding Entities and Relations for Learning and Inference in Knowledge Bases, ICLR
      2015, 1412.6575; Bordes et al., Translating Embeddings for Modeling Multi-relational Data,
      NeurIPS 2013.
    """

    kind: str
    width: int
    classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, query: Mapping[str, Indices], train: bool = False) -> Outputs:
        """The outputs for {"head": Indices (B,), "relation": Indices (B,)}."""
        del train
        head, relation = query["head"], query["relation"]
        if head.size != self.classes:
            raise ValueError(
                f"heads are of {head.size} entities and tails of {self.classes}: expected as many"
            )
        numbers = 2 * self.width if self.kind == "complex" else self.width
        entities = self._table("entities", self.classes, numbers)
        h = entities[head.values]
        r = self._table("relations", relation.size, numbers)[relation.values]
        if self.kind == "complex":
            asked = jnp.concatenate(_product(_parts(h), _parts(r)), -1)
            moduli = [jnp.sqrt(sum(x * x for x in _parts(y)) + _TINY) for y in (h, r)]
        else:
            asked = h + r if self.kind == "transe" else h * r
            moduli = [jnp.abs(h), jnp.abs(r)]
        logits = jnp.einsum("bd,ed->be", asked, entities, precision=lax.Precision.HIGHEST)
        if self.kind == "transe":
            sizes = jnp.sum(asked * asked, -1)[:, None] + jnp.sum(entities * entities, -1)[None]
            logits = -jnp.sqrt(jnp.maximum(sizes - 2 * logits, _TINY))
        return Outputs(logits, asked, (), embeddings=(moduli[0], moduli[1], moduli[0]))

    def _table(self, name: str, rows: int, numbers: int) -> Array:
        wide = jnp.promote_types(self.dtype, jnp.float32)
        table = self.param(name, nn.initializers.normal(SPREAD), (rows, numbers), wide)
        return table.astype(self.dtype)


def _parts(x: Array) -> tuple[Array, Array]:
    """The real and the imaginary parts, which stand one after the other."""
    real, imaginary = jnp.split(x, 2, -1)
    return real, imaginary


def _product(x: tuple[Array, Array], y: tuple[Array, Array]) -> tuple[Array, Array]:
    """The product of complex numbers."""
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]
