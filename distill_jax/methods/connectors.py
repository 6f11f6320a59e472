"""Through a convolution from the student to the teacher: SRRL and AB."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from distill_jax.methods import adapters, features, ranges
from distill_jax.methods.base import Context, Method, Shapes, Term
from distill_jax.models import Outputs
from distill_jax.models.basics import Mode, at_least_float32
from distill_jax.models.kernels.batch_norm import BatchNorm
from distill_jax.models.zoo.layers import Conv


class Connector(nn.Module):
    """1×1 convolution and BatchNorm, with or without a bias before and a ReLU after them."""

    features: int
    use_bias: bool = False
    relu: bool = True

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """(B, H, W, c) -> (B, H, W, features)."""
        y = Conv(self.features, 1, use_bias=self.use_bias, name="conv")(x, mode)
        y = BatchNorm(self.features, name="bn")(y, mode)
        return nn.relu(y) if self.relu else y


@dataclasses.dataclass(frozen=True)
class SRRL(Method):
    """Σ_k keep_k (mean (c - v_k)² + w mean (W_k c - t_k)²), W_k the teacher's own classifier.

    c = ReLU(BN(conv1×1(f))) leads from the student to the teacher's vector v_k, and is trained with
    the student; t_k are the teacher's logits. The usual weight is 1.

    Args:
      form: "vector": f is the student's vector before the classifier. "map": f is its last stage;
        c and the teacher's last stage are averaged over their positions first, as in the authors'
        code for ImageNet.
      logit_weight: w.

    References:
      Yang et al., Knowledge Distillation via Softmax Regression Representation Learning, ICLR 2021.
    """

    form: str = "vector"
    logit_weight: float = 1.0

    needs: ClassVar[tuple[str, ...]] = ("logits", "feature", "stages", "head")

    def __post_init__(self) -> None:
        ranges.one_of("srrl", ("vector", "map"), form=self.form)
        ranges.not_negative("srrl", logit_weight=self.logit_weight)

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where nothing can be connected, or the classifier takes no such."""
        features.check_vectors("srrl", shapes)
        if self.form == "vector":
            features.check_normalised("srrl", shapes)
            return
        features.check_stages("srrl", shapes)
        for teacher in shapes.teachers:
            last = shapes.student.stages[-1:], teacher.stages[-1:]
            features.check_maps("srrl", *last)
            if teacher.stages[-1].shape[-1] != teacher.feature.shape[-1]:
                raise ValueError(
                    f"srrl: the teacher's last map {teacher.stages[-1].shape[1:]} is not what its "
                    f"classifier takes, a vector of {teacher.feature.shape[-1]}; expected form "
                    "'vector'"
                )

    def init(self, key: Array, shapes: Shapes) -> dict[str, Any]:
        """{"params", "batch_stats"}, each {"0": of the largest teacher, "1": ...}."""
        shape = jax.eval_shape(self._connected, shapes.student).shape[1:]
        return adapters.by_kind(
            {
                str(k): adapters.drawn(
                    jax.random.fold_in(key, k), Connector(t.feature.shape[1]), shape
                )
                for k, t in enumerate(shapes.teachers)
            }
        )

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"srrl"}."""
        x, stats = self._connected(context.student), {}

        def gap(k: int, teacher: Outputs) -> Array:
            target = jnp.mean(at_least_float32(self._connected(teacher)), (1, 2))
            module = Connector(target.shape[1])
            y, stats[str(k)] = adapters.applied(
                module, adapters.of_module(variables, str(k)), x, context
            )
            vector = jnp.mean(y, (1, 2))
            logits = context.teacher_heads[k](vector)
            by_logits = jnp.mean(jnp.square(logits - at_least_float32(teacher.logits)), -1)
            return jnp.mean(jnp.square(vector - target), -1) + self.logit_weight * by_logits

        value = context.over_teachers(gap)
        return {"srrl": Term(value)}, {**variables, "batch_stats": stats}

    def _connected(self, outputs: Outputs) -> Array:
        """(B, H, W, C) what is connected; vectors are maps of one position."""
        return outputs.stages[-1] if self.form == "map" else outputs.feature[:, None, None]


@dataclasses.dataclass(frozen=True)
class AB(Method):
    """Σ_k keep_k 0.003 Σ_stages w_l Σ ((x + m)² [x > -m, f_k ≤ 0] + (x - m)² [x ≤ m, f_k > 0]).

    The student is to be active where the teacher is: x and f_k are maps before the last ReLU of a
    stage, x through a 1×1 convolution and BatchNorm where the teacher has other channels. The sum
    is over all elements of an example. It is made for a phase of its own, before the student is
    trained on the labels alone; the usual weight there is 1.

    Args:
      margin: m.
      stage_weights: w_l, one a stage; empty for 1 at the last and half as much at each before it.

    References:
      Heo et al., Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden
      Neurons, AAAI 2019, 1811.03233.
    """

    margin: float = 1.0
    stage_weights: tuple[float, ...] = ()

    needs: ClassVar[tuple[str, ...]] = ("preacts",)

    def __post_init__(self) -> None:
        ranges.above_zero("ab", margin=self.margin)
        for weight in self.stage_weights:
            ranges.not_negative("ab", stage_weights=weight)

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where maps cannot be compared one by one."""
        own = shapes.student.preacts
        for teacher in shapes.teachers:
            features.check_maps("ab", own, teacher.preacts)
            for s, t in zip(own, teacher.preacts, strict=True):
                if s.shape[1:3] != t.shape[1:3]:
                    raise ValueError(
                        f"ab: the student's map is {s.shape[1:]}, the teacher's {t.shape[1:]}, "
                        "expected the same height and width"
                    )
        if len(self.stage_weights) not in (0, len(own)):
            raise ValueError(
                f"ab: the networks have {len(own)} stages, stage_weights are {self.stage_weights}"
            )

    def init(self, key: Array, shapes: Shapes) -> dict[str, Any]:
        """{"params", "batch_stats"}, each {"0 of 1": of stage 0 and the second teacher, ...}."""
        drawn = {}
        for k, teacher in enumerate(shapes.teachers):
            for i, (s, t) in enumerate(zip(shapes.student.preacts, teacher.preacts, strict=True)):
                if s.shape[-1] != t.shape[-1]:
                    own = jax.random.fold_in(jax.random.fold_in(key, k), i)
                    drawn[f"{i} of {k}"] = adapters.drawn(own, _connector(t), s.shape[1:])
        return adapters.by_kind(drawn) if drawn else {}

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"ab"}."""
        own, stats = context.student.preacts, {}
        weights = self.stage_weights or tuple(2.0 ** (i + 1 - len(own)) for i in range(len(own)))

        def stage(place: str, x: Array, other: Array) -> Array:
            if x.shape[-1] == other.shape[-1]:
                x = at_least_float32(x)
            else:
                given = adapters.of_module(variables, place)
                x, stats[place] = adapters.applied(_connector(other), given, x, context)
            below = jnp.where((x > -self.margin) & (other <= 0), jnp.square(x + self.margin), 0.0)
            above = jnp.where((x <= self.margin) & (other > 0), jnp.square(x - self.margin), 0.0)
            return jnp.sum(below + above, (1, 2, 3))

        def gap(k: int, teacher: Outputs) -> Array:
            pairs = enumerate(zip(own, teacher.preacts, strict=True))
            values = [weights[i] * stage(f"{i} of {k}", *pair) for i, pair in pairs]
            return 3 / 1000 * sum(values[1:], values[0])

        value = context.over_teachers(gap)
        after = {**variables, "batch_stats": stats} if variables else variables
        return {"ab": Term(value)}, after


def _connector(target: Array) -> Connector:
    return Connector(target.shape[-1], use_bias=True, relu=False)
