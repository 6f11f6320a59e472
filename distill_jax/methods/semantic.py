"""SemCKD: each stage of the student learns from those of the teacher that are like it."""

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
from distill_jax.models.zoo.layers import Conv, Linear, conv_norm


class Embedding(nn.Module):
    """Two linear layers with a ReLU between them, and the unit length."""

    features: int

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """(B, F) -> (B, features)."""
        x = nn.relu(Linear(2 * self.features, name="linear1")(x, mode))
        return features.unit(Linear(self.features, name="linear2")(x, mode))


class Regressor(nn.Module):
    """Convolutions 1×1, 3×3 and 1×1 without bias, the first two with BatchNorm and ReLU."""

    features: int

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """(B, H, W, c) -> (B, H, W, features)."""
        for conv, size, norm in (("0", 1, "1"), ("3", 3, "4")):
            layer = Conv(2 * self.features, size, use_bias=False, name=conv)
            x = nn.relu(conv_norm(x, mode, layer, norm))
        return Conv(self.features, 1, use_bias=False, name="6")(x, mode)


class Calibration(nn.Module):
    """How much each stage of a student learns from each of a teacher's, and its regressed maps."""

    channels: tuple[int, ...]  # of the teacher's stages
    width: int  # of queries and keys

    @nn.compact
    def __call__(self, given: list[Any], mode: Mode) -> tuple[Array, list[list[Array]]]:
        """Maps [S][T], similarities of examples of S and of T stages -> (B, S, T), maps [S][T]."""
        maps, own, theirs = given
        queries, keys = (
            [Embedding(self.width, name=f"{kind}_weight{i}")(x, mode) for i, x in enumerate(rows)]
            for kind, rows in (("query", own), ("key", theirs))
        )
        energy = jnp.einsum("sbf,tbf->bst", jnp.stack(queries), jnp.stack(keys))
        regressed = [
            [
                Regressor(self.channels[j], name=f"regressor{i}_{j}")(x, mode)
                for j, x in enumerate(row)
            ]
            for i, row in enumerate(maps)
        ]
        return nn.softmax(energy), regressed


@dataclasses.dataclass(frozen=True)
class SemCKD(Method):
    """Σ_k keep_k 1/S Σ_i Σ_j α_ij mean (r_ij(f_i) - f_kj)², of all S stages i with all stages j.

    α_i = softmax_j(q_i · k_j) of each example, where q_i and k_j are made, by two linear layers and
    at unit length, of its row in F Fᵀ: F has an example a row, of stage i or j. r_ij are three
    convolutions (1×1, 3×3, 1×1; BatchNorm and ReLU between them). The larger of two maps is
    averaged to the size of the smaller first. All of this is trained with the student, for every
    teacher its own.

    The linear layers are as wide as the batch is large, over all devices, and depend on the order
    of its examples. An embedding of zeros stays so and passes no gradient, where the authors' code
    divides by 0. The usual weight is 400, beside the whole cross-entropy and the whole `kd`.

    Args:
      factor: B over the length of q_i and k_j, which is rounded down.

    Raises:
      ValueError: a value out of its range, naming it.

    References:
      Chen et al., Cross-Layer Distillation with Semantic Calibration, AAAI 2021, 2012.03236.
    """

    factor: int = 4

    needs: ClassVar[tuple[str, ...]] = ("stages",)

    def __post_init__(self) -> None:
        ranges.counts("semckd", factor=self.factor)

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where a stage is no map, or a batch is too small for its layers."""
        features.check_stages("semckd", shapes)
        for teacher in shapes.teachers:
            features.check_are_maps("semckd", shapes.student.stages, teacher.stages)
        size = len(shapes.student.logits)
        if size < self.factor:
            raise ValueError(
                f"semckd's layers are as wide as the batch over its factor {self.factor}: expected "
                f"a batch of at least {self.factor}, got {size}"
            )

    def init(self, key: Array, shapes: Shapes) -> dict[str, Any]:
        """{"params", "batch_stats"}, each {"0": of the largest teacher, "1": ...}."""
        size = len(shapes.student.logits)
        drawn = {}
        for k, teacher in enumerate(shapes.teachers):
            pairs = jax.eval_shape(_pairs, shapes.student, teacher)
            maps = [[own.shape[1:] for own, _ in row] for row in pairs]
            rows = [[(size,)] * len(x.stages) for x in (shapes.student, teacher)]
            module = self.module(teacher, size)
            drawn[str(k)] = adapters.drawn(jax.random.fold_in(key, k), module, [maps, *rows])
        return adapters.by_kind(drawn)

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"semckd"}."""
        stats = {}

        def gap(k: int, teacher: Outputs) -> Array:
            given = adapters.of_module(variables, str(k))
            attention, gaps, stats[str(k)] = self.compared(given, teacher, context)
            return jnp.sum(attention * gaps, (1, 2)) / gaps.shape[1]

        value = context.over_teachers(gap)
        return {"semckd": Term(value)}, {**variables, "batch_stats": stats}

    def compared(
        self, variables: dict[str, Any], teacher: Outputs, context: Context
    ) -> tuple[Array, Array, Any]:
        """(B, S, T) α and mean squares for one teacher, and the statistics after it."""
        pairs = _pairs(context.student, teacher)
        maps = [[source for source, _ in row] for row in pairs]
        rows = [similarities(context, x) for x in (context.student, teacher)]
        module = self.module(teacher, context.batch_size)
        (attention, regressed), stats = adapters.applied(module, variables, [maps, *rows], context)

        def gap(y: Array, target: Array) -> Array:
            return jnp.mean(jnp.square(y - at_least_float32(target)), (1, 2, 3))

        gaps = [
            jnp.stack([gap(y, target) for y, (_, target) in zip(*both, strict=True)], -1)
            for both in zip(regressed, pairs, strict=True)
        ]
        return attention, jnp.stack(gaps, 1), stats

    def module(self, teacher: Outputs, batch_size: int) -> Calibration:
        """What is trained for a teacher."""
        channels = tuple(x.shape[-1] for x in teacher.stages)
        return Calibration(channels, batch_size // self.factor)


def similarities(context: Context, outputs: Outputs) -> list[Array]:
    """(B of this device, B of all) products of the examples' maps, of each stage."""
    flat = [x.reshape(len(x), -1) for x in features.stages(outputs)]
    return [x @ context.whole_batch(x).T for x in flat]


def _pairs(student: Outputs, teacher: Outputs) -> list[list[tuple[Array, Array]]]:
    """[S][T] maps of both at the size of the smaller."""
    return [[features.pool_to_smaller(x, y) for y in teacher.stages] for x in student.stages]
