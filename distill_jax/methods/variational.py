"""VID: how well the student's maps predict the teacher's, by a Gaussian with a trained variance."""

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
from distill_jax.models.basics import Mode, at_least_float32, per_channel
from distill_jax.models.zoo.layers import Conv


class Prediction(nn.Module):
    """A mean by three 1×1 convolutions, and a variance for each channel."""

    features: int
    variance: float  # before training
    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """(B, H, W, c) -> mean (B, H, W, C), variance (C,)."""
        mean = Pointwise(self.features, name="regressor")(x)
        above = self.variance - self.epsilon
        start = above + math.log(-math.expm1(-above))  # of log(1 + eᵃ), without eᵃ: it may overflow
        scale = self.param("log_scale", nn.initializers.constant(start), (self.features,))
        return mean, nn.softplus(scale) + self.epsilon


class Pointwise(nn.Module):
    """1×1 convolutions without bias, a ReLU between two of them."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(B, H, W, c) -> (B, H, W, C)."""
        mode = Mode(True, None, x.dtype)
        for name in ("0", "2", "4"):
            x = nn.relu(x) if name != "0" else x
            x = Conv(self.features, 1, use_bias=False, name=name)(x, mode)
        return x


@dataclasses.dataclass(frozen=True)
class VID(Method):
    """Σ_k keep_k Σ_stages mean ½ ((μ(f_s) - f_k)² / σ² + log σ²) over all elements.

    μ is three 1×1 convolutions and σ² a number for each of the teacher's channels, log(1 + eᵃ) + ε;
    both are trained with the student, for every stage and teacher their own. The larger map is
    averaged to the size of the smaller first. The usual weight is 1.

    Args:
      variance: σ² before training.
      epsilon: ε.

    References:
      Ahn et al., Variational Information Distillation for Knowledge Transfer, CVPR 2019,
      1904.05835.
    """

    variance: float = 5.0
    epsilon: float = 1e-5

    needs: ClassVar[tuple[str, ...]] = ("stages",)

    def __post_init__(self) -> None:
        ranges.above_zero("vid", variance=self.variance, epsilon=self.epsilon)
        if self.variance <= self.epsilon:
            raise ValueError(
                f"vid's variance is above its epsilon {self.epsilon}, got {self.variance}"
            )

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where stages cannot be compared one by one."""
        for teacher in shapes.teachers:
            features.check_maps("vid", shapes.student.stages, teacher.stages, size=True)

    def init(self, key: Array, shapes: Shapes) -> dict[str, Any]:
        """{"params": {"0": of the largest teacher {"0": of the first stage, ...}, "1": ...}}."""

        def draw(key: Array, own: Array, other: Array) -> Any:
            return self._module(other).init(key, jnp.zeros((1, *own.shape[1:])))["params"]

        def all_stages(key: Array, teacher: Outputs) -> dict[str, Any]:
            pairs = enumerate(zip(shapes.student.stages, teacher.stages, strict=True))
            return {str(i): draw(jax.random.fold_in(key, i), *pair) for i, pair in pairs}

        each = enumerate(shapes.teachers)
        return {"params": {str(k): all_stages(jax.random.fold_in(key, k), t) for k, t in each}}

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"vid"}."""

        def bound(params: Any, own: Array, other: Array) -> Array:
            own, other = features.pool_to_smaller(own, at_least_float32(other))
            predicted: Any = self._module(other).apply({"params": params}, own)
            mean, variance = predicted
            gap = jnp.square(at_least_float32(mean) - other) / per_channel(variance, other)
            return (jnp.mean(gap, (1, 2, 3)) + jnp.mean(jnp.log(variance))) / 2

        def added(k: int, teacher: Outputs) -> Array:
            pairs = enumerate(zip(context.student.stages, teacher.stages, strict=True))
            values = [bound(variables["params"][str(k)][str(i)], *pair) for i, pair in pairs]
            return sum(values[1:], values[0])

        return {"vid": Term(context.over_teachers(added))}, variables

    def _module(self, target: Array) -> Prediction:
        return Prediction(target.shape[-1], self.variance, self.epsilon)
