"""CC: correlations of the examples of a batch, of embeddings or by kernels."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from distill_jax.methods import features, ranges
from distill_jax.methods.base import Context, Method, Shapes, Term
from distill_jax.models import Outputs
from distill_jax.models.basics import Mode
from distill_jax.models.zoo.layers import Linear


class Embedding(nn.Module):
    """A linear layer, whose outputs may be brought to unit length."""

    features: int
    normalised: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(B, F) -> (B, features)."""
        y = Linear(self.features, name="linear")(x, Mode(train=True))
        return features.unit(y) if self.normalised else y


@dataclasses.dataclass(frozen=True)
class CC(Method):
    """Correlations of examples, in the field's form or in that of Gaussian kernels.

    "linear": Σ_k keep_k mean_i Σ_c d_i[c] d_{i+1}[c] over neighbours in the batch, d = |u - w| of
    the embeddings u of the student's vector and w of the teacher's, which are trained with the
    student. Its usual weight is 0.02.
    "gaussian": Σ_k keep_k mean_{ij} (K_s[ij] - K_k[ij])², without embeddings, with the kernel's
    Taylor series K[ij] = Σ_{p ≤ order} e^{-2γ} (2γ)^p / p! cos(x_i, x_j)^p, as in the paper.

    Vectors of zeros pass no gradient to the second.

    Args:
      kernel: "linear" or "gaussian".
      embedding_size: length of u and w.
      normalised: u and w are brought to unit length.
      gamma: γ of the Gaussian kernel.
      order: of its series.

    References:
      Peng et al., Correlation Congruence for Knowledge Distillation, ICCV 2019, 1904.01802.
    """

    kernel: str = "linear"
    embedding_size: int = 128
    normalised: bool = False
    gamma: float = 0.4
    order: int = 2

    needs: ClassVar[tuple[str, ...]] = ("feature",)

    def __post_init__(self) -> None:
        ranges.one_of("cc", ("linear", "gaussian"), kernel=self.kernel)
        ranges.above_zero("cc", gamma=self.gamma)
        ranges.counts("cc", embedding_size=self.embedding_size, order=self.order)

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where a network shows no vector, or a batch has one example."""
        features.check_vectors("cc", shapes)
        features.check_two_examples("cc", shapes)

    def init(self, key: Array, shapes: Shapes) -> dict[str, Any]:
        """{"params": {"0": of the largest teacher, "1": ...}} of the linear form."""
        if self.kernel == "gaussian":
            return {}
        module = Embedding(self.embedding_size, self.normalised)

        def draw(key: Array, outputs: Outputs) -> Any:
            return module.init(key, jnp.zeros((1, outputs.feature.shape[1])))["params"]

        def pair(key: Array, teacher: Outputs) -> dict[str, Any]:
            own, other = jax.random.split(key)
            return {"student": draw(own, shapes.student), "teacher": draw(other, teacher)}

        keys = [jax.random.fold_in(key, k) for k in range(len(shapes.teachers))]
        pairs = zip(keys, shapes.teachers, strict=True)
        return {"params": {str(k): pair(*one) for k, one in enumerate(pairs)}}

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"cc"}."""
        own = features.vector(context.student)

        def neighbours(k: int, teacher: Outputs) -> Array:
            params = variables["params"][str(k)]
            embed: Any = Embedding(self.embedding_size, self.normalised).apply
            theirs = embed({"params": params["teacher"]}, features.vector(teacher))
            gaps = jnp.abs(embed({"params": params["student"]}, own) - theirs)
            whole, places = context.whole_batch(gaps), features.own_places(context)
            products = jnp.sum(gaps * jnp.roll(whole, -1, 0)[places], -1)
            last = len(whole) - 1
            return jnp.where(places == last, 0.0, products) * (len(whole) / max(last, 1))

        def kernels(k: int, teacher: Outputs) -> Array:
            gaps = self._kernel(context, own) - self._kernel(context, features.vector(teacher))
            return jnp.mean(jnp.square(gaps), -1)

        term = neighbours if self.kernel == "linear" else kernels
        return {"cc": Term(context.over_teachers(term))}, variables

    def _kernel(self, context: Context, x: Array) -> Array:
        """(B of this device, B of all)."""
        x = features.unit(x)
        cosines = x @ context.whole_batch(x).T
        powers = range(self.order + 1)
        scale = math.exp(-2 * self.gamma)
        parts = [(2 * self.gamma) ** p / math.factorial(p) * cosines**p for p in powers]
        return scale * sum(parts[1:], parts[0])
