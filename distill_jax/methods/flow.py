"""What lies between consecutive feature maps: FSP and KD-SVD."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from distill_jax.methods import features, ranges
from distill_jax.methods.base import Context, Method, Shapes, Term, taps
from distill_jax.models import Outputs
from distill_jax.models.backend import backend
from distill_jax.models.basics import at_least_float32


@dataclasses.dataclass(frozen=True)
class FSP(Method):
    """Σ_k keep_k Σ_pairs mean (G_s - G_k)², over pairs of consecutive maps, from the stem on.

    G[c, d] = mean over positions of a[c] b[d], of a map a and the next one b; the larger of the two
    is averaged to the size of the smaller first. It is made for a phase of its own, before the
    student is trained on the labels alone; the usual weight there is 1.

    References:
      Yim et al., A Gift from Knowledge Distillation, CVPR 2017.
    """

    needs: ClassVar[tuple[str, ...]] = ("stem", "stages")

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where maps do not have the same numbers of channels."""
        own = _maps(shapes.student)
        for teacher in shapes.teachers:
            features.check_maps("fsp", own, _maps(teacher), channels=True)
        _check_pairs("fsp", own)
        for outputs in (shapes.student, *shapes.teachers):
            maps = _maps(outputs)
            for one, following in zip(maps, maps[1:], strict=False):
                _check_flow(one.shape[1:], following.shape[1:])

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"fsp"}."""

        def flow(one: Array, following: Array) -> Array:
            pair = features.pool_to_smaller(at_least_float32(one), at_least_float32(following))
            positions = pair[0].shape[1] * pair[0].shape[2]
            return jnp.einsum("bhwc,bhwd->bcd", *pair) / positions

        def flows(outputs: Outputs) -> list[Array]:
            maps = _maps(outputs)
            return [flow(*pair) for pair in zip(maps, maps[1:], strict=False)]

        own = flows(context.student)

        def gap(k: int, teacher: Outputs) -> Array:
            pairs = zip(own, flows(teacher), strict=True)
            gaps = [jnp.mean(jnp.square(s - t), (1, 2)) for s, t in pairs]
            return sum(gaps[1:], gaps[0])

        return {"fsp": Term(context.over_teachers(gap))}, variables


def _maps(outputs: Outputs) -> list[Array]:
    """The stem, where there is one, and the stages."""
    return [x for x in taps(outputs)[:-1] if x is not None]


def _check_flow(one: tuple[int, ...], following: tuple[int, ...]) -> None:
    gaps = one[0] - following[0], one[1] - following[1]
    if min(gaps) < 0 < max(gaps):
        raise ValueError(
            f"fsp: a map of {one} is followed by one of {following}: expected one at least or at "
            "most as high and as wide"
        )


def _check_pairs(name: str, maps: Any) -> None:
    if len(maps) < 2:
        raise ValueError(f"{name} compares pairs of maps that follow: the networks have one map")


@dataclasses.dataclass(frozen=True)
class KDSVD(Method):
    """Σ_k keep_k Σ_pairs of stages Σ (exp(-(s_i[c] - s_{i-1}[d])²/8) - exp(-(t...)²/8))².

    t_i are a teacher's first right singular vectors of stage i times the singular values at unit
    length; s_i are those of the student's first rank + 3 that are nearest to them, turned to the
    same side, times the teacher's values. The usual weight is 1.

    Singular values that are equal up to rounding, such as those of a map of zeros, pass no gradient
    between their vectors, where that of the field's code is not finite. The loss depends on which
    sides a teacher's vectors are turned to, which solvers choose differently: on a GPU it is not
    that of a CPU.

    Args:
      rank: how many of a teacher's vectors.
      along: "channels": an example is a matrix of positions by channels; "width": one of channels
        and rows by columns, so that networks of other widths can be compared.

    References:
      Lee et al., Self-supervised Knowledge Distillation Using Singular Value Decomposition, ECCV
      2018, 1807.06819.
    """

    rank: int = 1
    along: str = "channels"

    needs: ClassVar[tuple[str, ...]] = ("stages",)

    def __post_init__(self) -> None:
        ranges.counts("kdsvd", rank=self.rank)
        ranges.one_of("kdsvd", ("channels", "width"), along=self.along)

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where vectors have other lengths, or there are less than `rank`."""
        own = shapes.student.stages
        axis = 2 if self.along == "channels" else 1
        for teacher in shapes.teachers:
            features.check_maps("kdsvd", own, teacher.stages)
            for s, t in zip(own, teacher.stages, strict=True):
                if s.shape[1 + axis] != t.shape[1 + axis]:
                    raise ValueError(
                        f"kdsvd along {self.along}: the student's map is {s.shape[1:]}, the "
                        f"teacher's {t.shape[1:]}, expected as many {self.along} of both"
                    )
                self._check_rank(s.shape[1:])
                self._check_rank(t.shape[1:])
        _check_pairs("kdsvd", own)

    def _check_rank(self, shape: tuple[int, ...]) -> None:
        height, width, channels = shape
        others = height * width if self.along == "channels" else height * channels
        vectors = min(others, channels if self.along == "channels" else width)
        if self.rank > vectors:
            raise ValueError(f"kdsvd's rank is at most {vectors} for maps {shape}, got {self.rank}")

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"kdsvd"}."""
        own = [_right_vectors(self._matrix(x), self.rank + 3)[0] for x in context.student.stages]

        def gap(k: int, teacher: Outputs) -> Array:
            pairs = []
            for vectors, x in zip(own, teacher.stages, strict=True):
                targets, values = _right_vectors(self._matrix(x), self.rank)
                scale = features.unit(values)[:, None]
                pairs.append((_aligned(vectors, targets) * scale, targets * scale))
            ways = zip(pairs, pairs[1:], strict=False)
            losses = [
                jnp.sum(jnp.square(_near(s, s_before) - _near(t, t_before)), (1, 2, 3))
                for (s_before, t_before), (s, t) in ways
            ]
            return sum(losses[1:], losses[0])

        return {"kdsvd": Term(context.over_teachers(gap))}, variables

    def _matrix(self, x: Array) -> Array:
        """(B, H, W, C) -> (B, others, channels or width)."""
        x = at_least_float32(x)
        if self.along == "width":
            x = x.swapaxes(2, 3)
        return x.reshape(len(x), -1, x.shape[-1])


def _aligned(vectors: Array, targets: Array) -> Array:
    """(B, N, m), (B, N, k) -> (B, N, k): of the vectors the nearest of each target, on its side."""
    cosines = lax.stop_gradient(jnp.einsum("bnm,bnk->bmk", vectors, targets))
    nearest = jnp.abs(cosines) == jnp.max(jnp.abs(cosines), 1, keepdims=True)
    return jnp.einsum("bnm,bmk->bnk", vectors, jnp.where(nearest, jnp.sign(cosines), 0.0))


def _near(after: Array, before: Array) -> Array:
    """(B, N, k), (B, M, k) -> (B, N, M, k)."""
    return jnp.exp(-jnp.square(after[:, :, None] - before[:, None]) / 8)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _right_vectors(matrix: Array, n: int) -> tuple[Array, Array]:
    """(B, N, m) the first n right singular vectors of (B, M, N), and their values (B, m), m ≤ n.

    The values pass no gradient. JAX's own one of the vectors is not finite where values are equal
    or zero.
    """
    return _right_vectors_forward(matrix, n)[0]


def _right_vectors_forward(matrix, n):
    values, rows = _values_and_rows(matrix)
    vectors = rows.swapaxes(1, 2)
    return (vectors[..., :n], values[:, :n]), (matrix, vectors, values)


def _values_and_rows(matrices: Array) -> tuple[Array, Array]:
    """Singular values and right vectors of (B, M, N)."""
    if backend() == "cpu":
        # One by one: JAX 0.10 splits a batch over the threads on which it computes, and where
        # several batches are at it at once, all of them wait for a thread.
        return jax.vmap(_values_and_rows_of_one)(matrices)
    _, values, rows = jnp.linalg.svd(matrices, full_matrices=False)
    return values, rows


@jax.custom_batching.sequential_vmap
def _values_and_rows_of_one(matrix: Array) -> tuple[Array, Array]:
    _, values, rows = jnp.linalg.svd(matrix, full_matrices=False)
    return values, rows


def _right_vectors_backward(n, residuals, cotangents):
    # With λ = σ² and G = AᵀA: dv_i = Σ_{j ≠ i} v_j (v_jᵀ dG v_i) / (λ_i - λ_j), where the j that
    # A does not reach have λ_j = 0.
    matrix, vectors, values = residuals
    by_vectors = cotangents[0]
    first = vectors[..., : by_vectors.shape[-1]]
    squares = jnp.square(values)
    least = 10 * jnp.finfo(squares.dtype).eps * squares[:, :1]
    inside = jnp.einsum("bnj,bni->bji", vectors, by_vectors)
    apart = squares[:, None, : first.shape[-1]] - squares[:, :, None]  # of j and i
    by_inverse = jnp.einsum("bnj,bji->bni", vectors, inside * _inverse(apart, least[..., None]))
    outside = by_vectors - jnp.einsum("bnj,bji->bni", vectors, inside)
    by_inverse += outside * _inverse(squares[:, None, : first.shape[-1]], least[..., None])
    by_gram = jnp.einsum("bni,bmi->bnm", by_inverse, first)
    return (jnp.einsum("bxn,bnm->bxm", matrix, by_gram + by_gram.swapaxes(1, 2)),)


def _inverse(values: Array, least: Array) -> Array:
    """1 / x, or 0 where |x| is at most `least`."""
    small = jnp.abs(values) <= least
    return jnp.where(small, 0.0, 1 / jnp.where(small, 1.0, values))


_right_vectors.defvjp(_right_vectors_forward, _right_vectors_backward)
