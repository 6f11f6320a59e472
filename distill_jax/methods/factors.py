"""FT: the student's last map, translated, is to equal a paraphrase of the teacher's."""

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
from distill_jax.models.zoo.layers import Conv, bias_uniform

_SLOPE = 0.1  # of the leaky ReLUs
_transposed = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")


class Encoder(nn.Module):
    """Three 3×3 convolutions with leaky ReLUs to a factor, with or without BatchNorms."""

    features: int
    norm: bool = False

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """(B, H, W, c) -> (B, H, W, features)."""
        for i, width in enumerate((x.shape[-1], self.features, self.features)):
            x = Conv(width, name=f"conv{i}")(x, mode)
            x = BatchNorm(width, name=f"bn{i}")(x, mode) if self.norm else x
            x = nn.leaky_relu(x, _SLOPE)
        return x


class Paraphraser(nn.Module):
    """A teacher's map through a factor and back by three 3×3 transposed convolutions.

    At stride 1 these are convolutions with mirrored kernels; they are drawn as PyTorch draws them.
    """

    features: int

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """(B, H, W, C) -> the same shape."""
        channels = x.shape[-1]
        x = Encoder(self.features, name="encoder")(x, mode)
        for i, width in enumerate((self.features, channels, channels)):
            bias = bias_uniform(9 * width)
            conv = Conv(width, kernel_init=_transposed, bias_init=bias, name=f"deconv{i}")
            x = nn.leaky_relu(conv(x, mode), _SLOPE)
        return x


@dataclasses.dataclass(frozen=True)
class FT(Method):
    """Σ_k keep_k mean |q(T_k(f_s)) - q(P_k(f_k))|^r, of the last maps of student and teacher.

    P_k is the encoder of a paraphraser, which a phase of its own trains to reconstruct the
    teacher's map and which does not move afterwards; the translator T_k is trained with the
    student. Both are three convolutions to a factor of `rate` of the teacher's channels; the larger
    factor is averaged to the size of the smaller. n(x) = x / ‖x‖.

    Args:
      form: "attention": q(x) = n(mean_c x^p) over the positions; T_k has BatchNorms, and the
        paraphraser learns by squared error. It is what the field compares; the usual weight is 200.
        "factor": q(x) = n(x) of the whole factor, without BatchNorms, by absolute error, as in the
        paper and its authors' code; the usual weight is 500.
      rate: of the teacher's channels, in (0, 1].
      power: p of "attention".
      order: r.

    References:
      Kim et al., Paraphrasing Complex Network: Network Compression via Factor Transfer, NeurIPS
      2018, 1802.04977.
    """

    form: str = "attention"
    rate: float = 0.5
    power: int = 2
    order: int = 1

    needs: ClassVar[tuple[str, ...]] = ("stages",)
    edges: ClassVar[str] = "frozen"

    def __post_init__(self) -> None:
        ranges.one_of("ft", ("attention", "factor"), form=self.form)
        ranges.above_zero("ft", rate=self.rate)
        ranges.share("ft", rate=self.rate)
        ranges.counts("ft", power=self.power, order=self.order)

    def preparation(self) -> Method:
        """The training of the paraphrasers."""
        return Paraphrasing(self.form, self.rate, self.power, self.order)

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where last maps do not fit, or a factor has no channel."""
        features.check_stages("ft", shapes)
        for teacher in shapes.teachers:
            last = shapes.student.stages[-1:], teacher.stages[-1:]
            features.check_maps("ft", *last, size=True)
            if self._channels(teacher) < 1:
                raise ValueError(
                    f"ft: rate {self.rate} of the channels of the teacher's map "
                    f"{teacher.stages[-1].shape[1:]} leaves none"
                )

    def init(self, key: Array, shapes: Shapes) -> dict[str, Any]:
        """{"params" and perhaps "batch_stats": of translators, "paraphraser": of encoders}.

        Each is {"0": of the largest teacher, "1": ...}.
        """
        own, translators, encoders = shapes.student.stages[-1].shape[1:], {}, {}
        for k, teacher in enumerate(shapes.teachers):
            drawn = jax.random.fold_in(key, k)
            translators[str(k)] = adapters.drawn(drawn, self._translator(teacher), own)
            encoder, shape = Encoder(self._channels(teacher)), teacher.stages[-1].shape[1:]
            encoders[str(k)] = adapters.drawn(drawn, encoder, shape)["params"]
        return {**adapters.by_kind(translators), "paraphraser": encoders}

    def begin(self, drawn: dict[str, Any], left: dict[str, Any]) -> dict[str, Any]:
        """Takes the encoders of the paraphrasers that a phase trained.

        Raises:
          ValueError: they are of other shapes.
        """
        if "paraphraser" in left:
            return super().begin(drawn, left)
        encoders = {k: own["encoder"] for k, own in left["params"].items()}
        ours, theirs = (
            jax.tree.map(lambda leaf: leaf.shape, x) for x in (drawn["paraphraser"], encoders)
        )
        if ours != theirs:
            factors = [
                [own["conv2"]["bias"][0] for own in shapes.values()] for shapes in (theirs, ours)
            ]
            raise ValueError(
                f"ft: the phase before trains paraphrasers to factors of {factors[0]} channels, "
                f"expected {factors[1]}: the options of a phase are to be those of the training"
            )
        return {**drawn, "paraphraser": encoders}

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"ft"}."""
        trained = {kind: own for kind, own in variables.items() if kind != "paraphraser"}
        x, stats = context.student.stages[-1], {}

        def gap(k: int, teacher: Outputs) -> Array:
            own, other = adapters.of_module(trained, str(k)), teacher.stages[-1]
            factor, stats[str(k)] = adapters.applied(self._translator(teacher), own, x, context)
            frozen = {"params": variables["paraphraser"][str(k)]}
            mode = Mode(True, context.axis_name, other.dtype)
            target: Any = Encoder(self._channels(teacher)).apply(frozen, other, mode)
            factor, target = features.pool_to_smaller(factor, at_least_float32(target))
            gaps = jnp.abs(self._compared(factor) - self._compared(target))
            return jnp.mean(gaps**self.order, -1)

        value = context.over_teachers(gap)
        after = {"batch_stats": stats} if "batch_stats" in variables else {}
        return {"ft": Term(value)}, {**variables, **after}

    def _compared(self, factor: Array) -> Array:
        """(B, H, W, C) -> (B, N), q."""
        if self.form == "attention":
            factor = jnp.mean(factor**self.power, -1)
        return features.unit(factor.reshape(len(factor), -1))

    def _channels(self, teacher: Outputs) -> int:
        return int(self.rate * teacher.stages[-1].shape[-1])

    def _translator(self, teacher: Outputs) -> Encoder:
        return Encoder(self._channels(teacher), norm=self.form == "attention")


@dataclasses.dataclass(frozen=True)
class Paraphrasing(FT):
    """Σ_k keep_k of the error of paraphraser k on its teacher's last map; the student has no part.

    Args: those of the method that it prepares.
    """

    replaces_ce: ClassVar[bool] = True
    takes_label_smoothing: ClassVar[bool] = True

    def init(self, key: Array, shapes: Shapes) -> dict[str, Any]:
        """{"params": {"0": of the largest teacher, "1": ...}}."""
        drawn = {
            str(k): adapters.drawn(
                jax.random.fold_in(key, k), self._module(teacher), teacher.stages[-1].shape[1:]
            )
            for k, teacher in enumerate(shapes.teachers)
        }
        return adapters.by_kind(drawn)

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"ft_paraphraser"}."""

        def error(k: int, teacher: Outputs) -> Array:
            x, own = teacher.stages[-1], adapters.of_module(variables, str(k))
            again, _ = adapters.applied(self._module(teacher), own, x, context)
            gap = again - at_least_float32(x)
            squared = self.form == "attention"
            return jnp.mean(jnp.square(gap) if squared else jnp.abs(gap), (1, 2, 3))

        return {"ft_paraphraser": Term(context.over_teachers(error))}, variables

    def _module(self, teacher: Outputs) -> Paraphraser:
        return Paraphraser(self._channels(teacher))
