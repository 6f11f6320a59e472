"""What methods on features share: which they take, unit vectors, pools to a common size."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from distill_jax.methods.base import Context, Shapes
from distill_jax.models import Outputs
from distill_jax.models.basics import at_least_float32

SHORTEST = 1e-12


def unit(x: Array, axis: int = -1) -> Array:
    """x / max(‖x‖₂, 1e-12) along an axis; what is shorter than that passes no gradient."""
    squares = jnp.sum(jnp.square(x), axis, keepdims=True)
    short = squares <= SHORTEST**2
    length = jnp.sqrt(jnp.where(short, 1.0, squares))
    return jnp.where(short, lax.stop_gradient(x) / SHORTEST, x / length)


def vector(outputs: Outputs) -> Array:
    """(B, F) the vector before the classifier, in float32 at least."""
    return at_least_float32(outputs.feature)


def stages(outputs: Outputs) -> list[Array]:
    """The map at the end of each stage (B, H, W, C), in float32 at least."""
    return [at_least_float32(x) for x in outputs.stages]


def own_places(context: Context) -> Array:
    """(B,) the places of this device's examples in what `Context.whole_batch` gathers."""
    own = jnp.arange(len(context.labels))
    return own if context.axis_name is None else own + len(own) * lax.axis_index(context.axis_name)


def pool_to_smaller(one: Array, other: Array) -> tuple[Array, Array]:
    """Averages the larger of two maps over windows, so that both have the height and width."""
    height, width = (min(one.shape[i], other.shape[i]) for i in (1, 2))
    return pool(one, height, width), pool(other, height, width)


def pool(x: Array, height: int, width: int) -> Array:
    """(B, H, W, C) -> (B, height, width, C), means of windows that cover the map."""
    if x.shape[1:3] == (height, width):
        return x
    down, along = (
        jnp.asarray(_windows(size, n), x.dtype)
        for size, n in zip(x.shape[1:3], (height, width), strict=True)
    )
    return jnp.einsum("ih,bhwc,jw->bijc", down, x, along, precision=lax.Precision.HIGHEST)


@functools.cache
def _windows(size: int, n: int) -> np.ndarray:
    """(n, size) the weights of n windows, from ⌊i size/n⌋ to ⌈(i+1) size/n⌉."""
    weights = np.zeros((n, size))
    for i in range(n):
        start, end = i * size // n, -(-(i + 1) * size // n)
        weights[i, start:end] = 1 / (end - start)
    return weights


def check_vectors(name: str, shapes: Shapes) -> None:
    """Raises ValueError where a network shows no vector before its classifier."""
    for whose, outputs in _each(shapes):
        if outputs.feature is None:
            raise ValueError(f"{name} compares the vectors before the classifier: {whose} has none")
        if len(outputs.feature.shape) != 2:
            raise ValueError(
                f"{name}: the vector before the classifier of {whose} has the shape "
                f"{outputs.feature.shape[1:]} an example, expected one axis"
            )


def check_two_examples(name: str, shapes: Shapes) -> None:
    """Raises ValueError where a batch has a single example."""
    if len(shapes.student.logits) < 2:
        raise ValueError(f"{name} compares the examples of a batch: expected at least 2, got 1")


def check_normalised(name: str, shapes: Shapes) -> None:
    """Raises ValueError where a BatchNorm would see one vector, of which its bias is left."""
    if len(shapes.student.logits) < 2:
        raise ValueError(
            f"{name} normalises vectors over the batch: expected at least 2 examples, got 1"
        )


def check_stages(name: str, shapes: Shapes) -> None:
    """Raises ValueError where a network has no stages."""
    for whose, outputs in _each(shapes):
        if not outputs.stages:
            raise ValueError(f"{name} compares feature maps at the end of stages: {whose} has none")


def check_are_maps(name: str, student: Sequence[Array], teacher: Sequence[Array]) -> None:
    """Raises ValueError where one of both has not height, width and channels."""
    if any(len(x.shape) != 4 for x in (*student, *teacher)):
        raise ValueError(
            f"{_both(name, student, teacher)}: expected height, width and channels of each"
        )


def check_maps(
    name: str,
    student: Sequence[Array],
    teacher: Sequence[Array],
    *,
    size: bool = False,
    channels: bool = False,
) -> None:
    """Raises ValueError where lists of maps cannot be compared one by one.

    Args:
      name: of the method.
      student: its maps.
      teacher: those of the teacher.
      size: whether one of two has to be at least as high and as wide as the other.
      channels: whether two have to have as many channels.
    """
    check_are_maps(name, student, teacher)
    ours, theirs = [x.shape[1:] for x in student], [x.shape[1:] for x in teacher]
    said = _both(name, student, teacher)
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{said}: expected as many of both")
    for own, other in zip(ours, theirs, strict=True):
        if channels and own[2] != other[2]:
            raise ValueError(f"{said}: expected {own[2]} channels beside {own}, got {other[2]}")
        gaps = own[0] - other[0], own[1] - other[1]
        if size and min(gaps) < 0 < max(gaps):
            raise ValueError(
                f"{said}: expected a map at least or at most as high and wide as {own}"
            )


def check_pyramid(name: str, maps: Sequence[Array]) -> None:
    """Raises ValueError where a student's map is neither of the size of the one before nor half."""
    shapes = [x.shape[1:] for x in maps]
    said = f"{name}: the student's maps are {_listed(shapes)}"
    if any(len(shape) != 3 for shape in shapes):
        raise ValueError(f"{said}: expected height, width and channels of each")
    for before, after in zip(shapes, shapes[1:], strict=False):
        pairs = zip(before[:2], after[:2], strict=True)
        if any(n not in (size, size // 2, -(-size // 2)) for size, n in pairs):
            raise ValueError(
                f"{said}: expected each as high and wide as the one before it, or half"
            )


def _each(shapes: Shapes) -> Iterator[tuple[str, Outputs]]:
    yield "the student", shapes.student
    for k, teacher in enumerate(shapes.teachers):
        yield f"teacher {k + 1}", teacher


def _both(name: str, student: Sequence[Array], teacher: Sequence[Array]) -> str:
    ours, theirs = (_listed([x.shape[1:] for x in maps]) for maps in (student, teacher))
    return f"{name}: the student's maps are {ours}, the teacher's {theirs}"


def _listed(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join("×".join(map(str, shape)) for shape in shapes) or "none"
