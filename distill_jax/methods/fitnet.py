"""FitNet: the student's middle layer, through a regressor, is to equal the teacher's."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from distill_jax.methods import adapters
from distill_jax.methods.base import Context, Method, Shapes, Term, taps
from distill_jax.models import Outputs
from distill_jax.models.basics import Mode, at_least_float32, per_channel
from distill_jax.models.kernels.batch_norm import BatchNorm
from distill_jax.models.zoo.layers import Conv, torch_uniform


class Regressor(nn.Module):
    """Convolution, BatchNorm and ReLU from a student's feature map to the shape of a teacher's.

    With H the student's height and H' the teacher's, the convolution is a transposed 4×4 of stride
    2 where 2H = H', a 3×3 of stride 2 where H = 2H', else (1 + H - H')² without padding.
    """

    shape: tuple[int, int, int]  # of the teacher's map

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """(B, H, W, c) -> (B, H', W', C)."""
        height, width, features = self.shape
        if 2 * x.shape[1] == height:
            y = TransposedConv(features, name="conv")(x, mode)
        elif x.shape[1] == 2 * height:
            y = Conv(features, 3, 2, 1, name="conv")(x, mode)
        else:
            y = Conv(features, 1 + x.shape[1] - height, padding=0, name="conv")(x, mode)
        return nn.relu(BatchNorm(features, name="bn")(y, mode))


class TransposedConv(nn.Module):
    """4×4 transposed convolution of stride 2 and padding 1: doubles height and width."""

    features: int

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        # (k, k, out, in): PyTorch's (in, out, k, k) turned around like any other kernel.
        shape = (4, 4, self.features, x.shape[-1])
        kernel = self.param("kernel", torch_uniform, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        y = lax.conv_transpose(
            x.astype(mode.dtype),
            kernel.astype(mode.dtype),
            (2, 2),
            [(2, 2), (2, 2)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            transpose_kernel=True,
        )
        return y + per_channel(bias.astype(y.dtype), y)


@dataclasses.dataclass(frozen=True)
class FitNet(Method):
    """Σ_k keep_k mean (r_k(f_s) - f_k)² over all elements, r_k a regressor of its own per teacher.

    The regressors are trained with the student. Feature maps are counted as in `base.taps`: 0 the
    stem, then the stages.

    Args:
      hint_layer: the student's feature map.
      teacher_layer: the teachers' feature map; None takes that of the same number.

    References:
      Romero et al., FitNets, ICLR 2015, 1412.6550, in one stage with the cross-entropy; the usual
      weight is 100.
    """

    hint_layer: int = 2
    teacher_layer: int | None = None

    needs: ClassVar[tuple[str, ...]] = ("stem", "stages")

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where a layer is not there or no regressor leads to its shape."""
        ours = self._shape("student", shapes.student, self.hint_layer)
        for teacher in shapes.teachers:
            theirs = self._shape("teacher", teacher, self._teacher_layer)
            ways = {_way(own, other) for own, other in zip(ours[:2], theirs[:2], strict=True)}
            if len(ways) > 1 or None in ways:
                raise ValueError(
                    f"fitnet: the student's layer {self.hint_layer} is {ours[:2]}, the teacher's "
                    f"{self._teacher_layer} {theirs[:2]}: expected the same size, a half, the "
                    "double or one as much smaller in height as in width"
                )

    @property
    def _teacher_layer(self) -> int:
        return self.hint_layer if self.teacher_layer is None else self.teacher_layer

    @staticmethod
    def _shape(whose: str, outputs: Outputs, layer: int) -> tuple[int, int, int]:
        maps = taps(outputs)[:-1]
        if not 0 <= layer < len(maps) or maps[layer] is None:
            raise ValueError(
                f"fitnet: the {whose} has feature maps 0 to {len(maps) - 1}, got layer {layer}"
            )
        shape = maps[layer].shape[1:]
        if len(shape) != 3:
            raise ValueError(
                f"fitnet: layer {layer} of the {whose} has the shape {shape} an example, expected "
                "height, width and channels"
            )
        height, width, channels = shape
        return height, width, channels

    def regressors(self, shapes: Shapes) -> list[Regressor]:
        """One module a teacher."""
        return [Regressor(self._shape("teacher", t, self._teacher_layer)) for t in shapes.teachers]

    def init(self, key: Array, shapes: Shapes) -> dict[str, Any]:
        """{"params", "batch_stats"}, each {"0": of the largest teacher, "1": ...}."""
        shape = self._shape("student", shapes.student, self.hint_layer)
        return adapters.by_kind(
            {
                str(k): adapters.drawn(jax.random.fold_in(key, k), module, shape)
                for k, module in enumerate(self.regressors(shapes))
            }
        )

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"fitnet"}."""
        hint, stats = taps(context.student)[self.hint_layer], {}

        def distance(k: int, teacher: Outputs) -> Array:
            target = at_least_float32(taps(teacher)[self._teacher_layer])
            own = adapters.of_module(variables, str(k))
            regressor = Regressor(self._shape("teacher", teacher, self._teacher_layer))
            regressed, stats[str(k)] = adapters.applied(regressor, own, hint, context)
            return jnp.mean(jnp.square(regressed - target), (1, 2, 3))

        value = context.over_teachers(distance)
        return {"fitnet": Term(value)}, {**variables, "batch_stats": stats}


def _way(own: int, other: int) -> str | int | None:
    """How a regressor leads from one height or width to another; None where it does not."""
    if 2 * own == other:
        return "double"
    if own == 2 * other:
        return "half"
    return own - other if own >= other else None
