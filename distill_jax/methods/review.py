"""ReviewKD: each of the teacher's stages from the student's same and all deeper ones."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax

from distill_jax.methods import adapters, features, ranges
from distill_jax.methods.base import Context, Method, Shapes, Term
from distill_jax.models import Outputs
from distill_jax.models.basics import Mode, at_least_float32
from distill_jax.models.zoo.layers import Conv, conv_norm

_uniform = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")  # U(±√(3/fan_in))


class ConvNorm(nn.Module):
    """Convolution without bias, and BatchNorm."""

    features: int
    kernel_size: int

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """(B, H, W, c) -> (B, H, W, features)."""
        conv = Conv(self.features, self.kernel_size, use_bias=False, kernel_init=_uniform, name="0")
        return conv_norm(x, mode, conv, "1")


class Gates(nn.Module):
    """How much of each of two maps passes, by position."""

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """(B, H, W, c) -> (B, H, W, 2) in (0, 1)."""
        return nn.sigmoid(Conv(2, 1, name="0")(x, mode))


class Fusion(nn.Module):
    """Fuses a map with what was fused of the deeper ones, and leads to a teacher's map."""

    channels: int  # of what is fused
    shape: tuple[int, ...]  # of the teacher's map

    @nn.compact
    def __call__(self, x: Array, deeper: Array | None, mode: Mode) -> tuple[Array, Array]:
        """(B, h, w, c) -> (B, H, W, C) as the teacher's, and (B, H, W, channels) for the next."""
        x = ConvNorm(self.channels, 1, name="conv1")(x, mode)
        if deeper is not None:
            deeper = nearest(deeper, x.shape[1], x.shape[2])
            gates = Gates(name="att_conv")(jnp.concatenate([x, deeper], -1), mode)
            x = x * gates[..., :1] + deeper * gates[..., 1:]
        x = nearest(x, self.shape[0], self.shape[1])
        return ConvNorm(self.shape[2], 3, name="conv2")(x, mode), x


class Review(nn.Module):
    """A teacher's maps from a student's, fused from the deepest on, which is number 0."""

    shapes: tuple[tuple[int, ...], ...]  # of the teacher's maps, shallow to deep
    max_channels: int

    @nn.compact
    def __call__(self, maps: list[Array], mode: Mode) -> list[Array]:
        """Maps (B, h, w, c), shallow to deep -> as many like the teacher's."""
        channels = min(self.max_channels, maps[-1].shape[-1])
        fused, deeper = [], None
        pairs = reversed(list(zip(maps, self.shapes, strict=True)))
        for i, (x, shape) in enumerate(pairs):
            like, deeper = Fusion(channels, shape, name=str(i))(x, deeper, mode)
            fused.append(like)
        return fused[::-1]


@dataclasses.dataclass(frozen=True)
class ReviewKD(Method):
    """min(e/E, 1) Σ_k keep_k Σ_levels HCL(r_l, f_kl), e the epoch counted from 1.

    Levels are the ends of the stages and the vector before the classifier, a map of one position;
    f_kl are the teacher's maps before the last ReLU. From the deepest on, each of the student's
    maps becomes x = BN(conv1×1) and is fused with y, the level below enlarged by nearest
    neighbours, as z₁ x + z₂ y with z = sigmoid(conv1×1([x, y])); r_l = BN(conv3×3) of that at the
    teacher's size.

    HCL is the mean square of r_l - f_kl and of its averages over 4×4, 2×2 and one window, those
    that are smaller than the map, with the weights 1, ½, ¼, ⅛ in this order and the sum 1.

    Everything that fuses is trained with the student, for each teacher its own. Teachers are in
    evaluation mode; the authors' script for CIFAR leaves them in training mode, and counts e from
    0. The usual weight is 5 for ResNet 32x4 -> 8x4 and WRN, 8 for ShuffleNet, 1 for 110 -> 32, 0.6
    for 56 -> 20.

    Args:
      warmup_epochs: E; 0 for none.
      max_channels: of what is fused, which has as many as the student's vector up to this.
      student_preact: takes the student's maps before the last ReLU too, as the field does for WRN.

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Chen et al., Distilling Knowledge via Knowledge Review, CVPR 2021, 2104.09044, beside the
      whole cross-entropy.
    """

    warmup_epochs: float = 20.0
    max_channels: int = 512
    student_preact: bool = False

    needs: ClassVar[tuple[str, ...]] = ("preacts", "feature")

    def __post_init__(self) -> None:
        ranges.not_negative("reviewkd", warmup_epochs=self.warmup_epochs)
        ranges.counts("reviewkd", max_channels=self.max_channels)
        if not isinstance(self.student_preact, bool):
            raise ValueError(
                f"reviewkd's student_preact is True or False, got {self.student_preact!r}"
            )

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where levels cannot be compared one by one, or a batch is too small."""
        features.check_vectors("reviewkd", shapes)
        for teacher in shapes.teachers:
            features.check_maps("reviewkd", self._stages(shapes.student), teacher.preacts)
        features.check_normalised("reviewkd", shapes)

    def init(self, key: Array, shapes: Shapes) -> dict[str, Any]:
        """{"params", "batch_stats"}, each {"0": of the largest teacher, "1": ...}."""
        own = _sizes(jax.eval_shape(self._levels, shapes.student))
        drawn = {}
        for k, teacher in enumerate(shapes.teachers):
            module = self.module(jax.eval_shape(_targets, teacher))
            drawn[str(k)] = adapters.drawn(jax.random.fold_in(key, k), module, own)
        return adapters.by_kind(drawn)

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"reviewkd"}."""
        own, stats = self._levels(context.student), {}

        def gap(k: int, teacher: Outputs) -> Array:
            targets = _targets(teacher)
            given = adapters.of_module(variables, str(k))
            fused, stats[str(k)] = adapters.applied(self.module(targets), given, own, context)
            pairs = zip(fused, targets, strict=True)
            values = [pyramid_gap(y, at_least_float32(target)) for y, target in pairs]
            return sum(values[1:], values[0])

        value = context.over_teachers(gap)
        # The weight rises by epochs: it is constant within one.
        warm = jnp.minimum((jnp.floor(context.epoch) + 1) / max(self.warmup_epochs, 1.0), 1.0)
        return {"reviewkd": Term(value, warm)}, {**variables, "batch_stats": stats}

    def module(self, targets: list[Array]) -> Review:
        """What leads to a teacher's maps, shallow to deep."""
        return Review(tuple(_sizes(targets)), self.max_channels)

    def _stages(self, outputs: Outputs) -> tuple[Array, ...]:
        return outputs.preacts if self.student_preact else outputs.stages

    def _levels(self, outputs: Outputs) -> list[Array]:
        return [*self._stages(outputs), outputs.feature[:, None, None]]


def _targets(outputs: Outputs) -> list[Array]:
    return [*outputs.preacts, outputs.feature[:, None, None]]


def _sizes(maps: list[Array]) -> list[tuple[int, ...]]:
    return [x.shape[1:] for x in maps]


def pyramid_gap(one: Array, other: Array) -> Array:
    """(B,) the mean square of a difference of maps and of its averages over fewer windows."""
    gap = one - other
    values, weights = [jnp.mean(jnp.square(gap), (1, 2, 3))], [1.0]
    for size in (4, 2, 1):
        if size < min(gap.shape[1:3]):
            values.append(jnp.mean(jnp.square(features.pool(gap, size, size)), (1, 2, 3)))
            weights.append(weights[-1] / 2)
    weighted = [w * value for w, value in zip(weights, values, strict=True)]
    return sum(weighted[1:], weighted[0]) / sum(weights)


def nearest(x: Array, height: int, width: int) -> Array:
    """(B, H, W, C) -> (B, height, width, C), at row i that at ⌊i H/height⌋."""
    if x.shape[1:3] == (height, width):
        return x
    # A product of ones has the same gradient on every run, which a scattered sum has not.
    down, along = (
        jnp.asarray(np.eye(size)[np.arange(n) * size // n], x.dtype)
        for size, n in zip(x.shape[1:3], (height, width), strict=True)
    )
    return jnp.einsum("ih,bhwc,jw->bijc", down, x, along, precision=lax.Precision.HIGHEST)
