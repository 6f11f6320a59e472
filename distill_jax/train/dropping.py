"""Stochastic teaching: which teachers teach this mini-batch (DGKD, section 3.3)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

KINDS = ("none", "fixed", "bernoulli")


@dataclasses.dataclass(frozen=True)
class Dropping:
    """How teachers are dropped, anew for every mini-batch.

    Args:
      kind: "none"; "fixed": exactly `number` teachers, uniformly without replacement (the authors'
        code); "bernoulli": each survives with the probability given to `keep_mask`.
      number: teachers dropped by "fixed".
      teacher_droppable: whether the first and largest network may be dropped too, or only the
        assistants.

    Raises:
      ValueError: unknown kind or a negative number.
    """

    kind: str = "none"
    number: int = 1
    teacher_droppable: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"dropping kind is one of {KINDS}, got {self.kind!r}")
        if self.number < 0:
            raise ValueError(f"dropping number is 0 or more, got {self.number}")

    def check(self, teachers: int) -> None:
        """Raises ValueError where "fixed" is to drop more than there are to drop."""
        droppable = teachers - (not self.teacher_droppable)
        if self.kind == "fixed" and self.number > droppable:
            raise ValueError(
                f"cannot drop {self.number} of {teachers} teachers, of which {droppable} may go"
            )


def keep_mask(dropping: Dropping, key: Array, teachers: int, survival: Array | float) -> Array:
    """The (K,) booleans of the teachers that stay, a pure function of `key`.

    Args:
      dropping: the rule.
      key: the mini-batch's key, the same on every device.
      teachers: K, teachers of this student, largest first.
      survival: probability to stay, for "bernoulli".
    """
    spared = 0 if dropping.teacher_droppable else 1
    droppable = teachers - spared
    if dropping.kind == "none" or droppable <= 0:
        return jnp.ones((teachers,), bool)
    if dropping.kind == "fixed":
        stay = jax.random.permutation(key, droppable) >= dropping.number
    else:
        stay = jax.random.bernoulli(key, survival, (droppable,))
    return jnp.concatenate([jnp.ones((spared,), bool), stay])
