"""What methods share that train the branches of a network: its exits, and checks of them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from distill_jax.methods.base import Method, Shapes
from distill_jax.methods.losses import widen
from distill_jax.models import BRANCHED, Outputs


@dataclasses.dataclass(frozen=True)
class OwnExits(Method):
    """What a method says of itself by which the exits of one network teach each other.

    It needs no teacher, and counts the labels at each exit in the place of the cross-entropy.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    taught: ClassVar[bool] = False
    trains_branches: ClassVar[bool] = True
    replaces_ce: ClassVar[bool] = True
    mixes_labels: ClassVar[bool] = True
    takes_label_smoothing: ClassVar[bool] = True


def exits_of(outputs: Outputs) -> tuple[Outputs, ...]:
    """A network and its branches, deepest first."""
    return (outputs, *outputs.branches)


def logits_of(exits: tuple[Outputs, ...]) -> Array:
    """(M, B, C) of M exits, in float32 at least."""
    return widen(jnp.stack([one.logits for one in exits]))


def check_branches(name: str, shapes: Shapes) -> None:
    """Raises ValueError where the student has no branches."""
    if not shapes.student.branches:
        own = [prefix for prefix, kind in BRANCHED.items() if kind.method == name] or ["dks"]
        raise ValueError(f"{name} needs a network with branches, such as {own[0]}:resnet20")


def check_equal_vectors(name: str, exits: tuple[Outputs, ...]) -> None:
    """Raises ValueError where exits show no vectors before their classifiers of one length."""
    shapes = [None if one.feature is None else one.feature.shape[1:] for one in exits]
    if None in shapes or len(set(shapes)) > 1 or len(shapes[0] or ()) != 1:
        shown = ", ".join("none" if shape is None else str(shape) for shape in shapes)
        raise ValueError(
            f"{name} compares the vectors before the classifiers of the student's exits: expected "
            f"one length of all, got {shown}"
        )
