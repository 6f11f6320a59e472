"""FRSKD: a network learns from its own stages, refined by a pyramid and classified once more."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from distill_jax.methods import adapters, features, ranges
from distill_jax.methods.attention import attention_gap
from distill_jax.methods.base import Context, Method, Shapes, Term
from distill_jax.methods.losses import kl_divergence
from distill_jax.methods.review import nearest
from distill_jax.models.basics import Mode
from distill_jax.models.kernels.pools import global_average_pool
from distill_jax.models.zoo.layers import Conv, Linear, conv_norm

EPSILON = 1e-6  # beside the sum of the weights of what is fused


class Block(nn.Module):
    """1×1 convolution, BatchNorm and ReLU; or `depth` times those, each after a depthwise 3×3."""

    features: int
    depth: int = 0

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """(B, H, W, c) -> (B, H, W, features)."""
        for i in range(max(self.depth, 1)):
            if self.depth:
                channels = x.shape[-1]
                name = f"{i}_depthwise"
                x = Conv(channels, groups=channels, use_bias=False, name=name)(x, mode)
            pointwise = Conv(self.features, 1, use_bias=False, name=f"{i}_pointwise")
            x = nn.relu(conv_norm(x, mode, pointwise, f"{i}_norm"))
        return x


class WeightedSum(nn.Module):
    """Σ_i w_i x_i / (Σ_i w_i + 1e-6), w = ReLU(scale), which is trained and starts at ones."""

    @nn.compact
    def __call__(self, maps: list[Array]) -> Array:
        """Maps of one shape -> one of it."""
        weights = nn.relu(self.param("scale", nn.initializers.ones, (len(maps),)))
        weights = weights / (jnp.sum(weights) + EPSILON)
        weighted = [w.astype(x.dtype) * x for w, x in zip(weights, maps, strict=True)]
        return sum(weighted[1:], weighted[0])


class SelfTeacher(nn.Module):
    """A pyramid over a network's stages (a bidirectional FPN), and a classifier on its deepest map.

    Deep maps are enlarged and fused into the shallower ones; what comes of it is pooled and fused
    into the deeper ones, beside a second reading of the stage. Each level keeps the size of its
    stage.

    Args:
      classes: C.
      width: channels of a level over those of its stage.
      depth: of the blocks after what is fused.
    """

    classes: int
    width: int
    depth: int

    @nn.compact
    def __call__(self, stages: list[Array], mode: Mode) -> tuple[list[Array], Array]:
        """Maps (B, h, w, c), shallow to deep -> as many (B, h, w, width c), and (B, C) logits."""
        stages = [nn.relu(x) for x in stages]  # of some networks they are sums before it
        channels = [self.width * x.shape[-1] for x in stages]
        deepest = len(stages) - 1

        def block(name: str, i: int, x: Array, depth: int = 0) -> Array:
            return Block(channels[i], depth, name=f"{name}{i}")(x, mode)

        def fused(name: str, i: int, maps: list[Array]) -> Array:
            x = WeightedSum(name=f"{name}_weight{i}")(maps)
            return block(f"{name}_conv", i, x, self.depth)

        lateral = [block("lateral", i, x) for i, x in enumerate(stages)]
        up = [lateral[deepest]]
        for i in reversed(range(deepest)):
            enlarged = nearest(up[0], *stages[i].shape[1:3])
            up = [fused("up", i, [lateral[i], block("up_sample", i, enlarged)]), *up]
        levels = [up[0]]
        for i in range(1, len(stages)):
            pooled = shrunk(levels[-1], *stages[i].shape[1:3])
            maps = [block("second_lateral", i, stages[i])]
            maps += [up[i]] if i < deepest else []
            levels.append(fused("down", i, [*maps, block("down_sample", i, pooled)]))
        return levels, Linear(self.classes, name="fc")(global_average_pool(levels[-1]), mode)


@dataclasses.dataclass(frozen=True)
class FRSKD(Method):
    """CE(b) + α T² KL(softmax(sg b/T) || softmax(s/T)) + β Σ_i mean (A(f_i) - A(sg F_i))².

    F_i are the student's stages f_i, refined by a pyramid that reads them all, and b are the logits
    of a classifier on the deepest of them: a teacher that is trained with the student, on whose
    features it stands with their gradient, so that CE(b) trains the network too. Neither the KL nor
    the attention A(x), which is the mean square over the channels at unit length, trains the
    teacher. The cross-entropy CE(s) is a term of its own; the method's weight is usually 1.

    Going up the pyramid maps take the nearest position of the deeper one; going down, the largest
    of 3×3 positions with stride 2, beyond the edges 0. Stages of one size are left at it.

    Args:
      temperature: T > 0.
      kd_weight: α.
      feature_weight: β.
      width: channels of a level of the pyramid over those of its stage.
      depth: depthwise separable convolutions after each fusion.

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Ji et al., Refine Myself by Teaching Myself: Feature Refinement via Self-Knowledge
      Distillation, CVPR 2021, 2103.08273, and its authors' code for classification.
    """

    temperature: float = 4.0
    kd_weight: float = 2.0
    feature_weight: float = 100.0
    width: int = 2
    depth: int = 2

    needs: ClassVar[tuple[str, ...]] = ()
    taught: ClassVar[bool] = False
    mixes_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        ranges.above_zero("frskd", temperature=self.temperature)
        ranges.not_negative("frskd", kd_weight=self.kd_weight, feature_weight=self.feature_weight)
        ranges.counts("frskd", width=self.width, depth=self.depth)

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where the stages are no pyramid, or a batch is too small."""
        maps = shapes.student.stages
        if not maps:
            raise ValueError("frskd refines the ends of stages: the student has none")
        features.check_pyramid("frskd", maps)
        if len(maps[-1]) * maps[-1].shape[1] * maps[-1].shape[2] < 2:
            raise ValueError(
                "frskd normalises over the batch: expected at least 2 examples, got 1, with a last "
                "stage of one position"
            )

    def init(self, key: Array, shapes: Shapes) -> dict[str, Any]:
        """{"params", "batch_stats"} of the pyramid and its classifier."""
        student = shapes.student
        module = self.module(student.logits.shape[-1])
        return adapters.drawn(key, module, [x.shape[1:] for x in student.stages])

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"frskd_ce", "frskd_kl", "frskd_at"}: of the teacher, from it, and between the maps."""
        stages, logits = features.stages(context.student), context.student.logits
        module = self.module(logits.shape[-1])
        given = list(context.student.stages)
        (refined, own), stats = adapters.applied(module, variables, given, context)
        gaps = [
            attention_gap(x, lax.stop_gradient(y)) for x, y in zip(stages, refined, strict=True)
        ]
        kl = kl_divergence(lax.stop_gradient(own), logits, self.temperature)
        return {
            "frskd_ce": Term(context.cross_entropy(own)),
            "frskd_kl": Term(kl, self.kd_weight * self.temperature**2),
            "frskd_at": Term(sum(gaps[1:], gaps[0]), self.feature_weight),
        }, {**variables, "batch_stats": stats}

    def module(self, classes: int) -> SelfTeacher:
        """The pyramid and its classifier."""
        return SelfTeacher(classes, self.width, self.depth)


def shrunk(x: Array, height: int, width: int) -> Array:
    """(B, H, W, C) -> (B, height, width, C), the largest of 3 positions on axes that are halved.

    Windows have the stride 2; zeros stand beyond the edges, more of them after the last position.
    """
    pads, window, strides = [(0, 0)], [], []
    for size, wanted in zip(x.shape[1:3], (height, width), strict=True):
        halved = size != wanted
        beyond = 2 * wanted + 1 - size if halved else 0
        pads.append((beyond // 2, beyond - beyond // 2))
        window.append(3 if halved else 1)
        strides.append(2 if halved else 1)
    return nn.max_pool(jnp.pad(x, [*pads, (0, 0)]), tuple(window), tuple(strides))
