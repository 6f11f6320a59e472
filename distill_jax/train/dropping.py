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

    def check(self, teachers: int, survival: float = 1.0) -> None:
        """Raises ValueError where a teacher would be kept at no step, or none could be dropped.

        Args:
          teachers: how many there are, the first of them the largest.
          survival: see `keep_mask`.
        """
        if self.kind == "none":
            return
        droppable = teachers - (not self.teacher_droppable)
        who = f"of {teachers} teachers{'' if self.teacher_droppable else ' all but the first'}"
        if self.kind == "fixed" and self.number > droppable:
            raise ValueError(
                f"cannot drop {self.number} of {teachers} teachers, of which {droppable} may go"
            )
        if self.kind == "bernoulli" and droppable < 1:
            raise ValueError(f"there is nobody to drop {who}: expected another teacher")
        if self.kind == "fixed" and 0 < self.number == droppable:
            raise ValueError(
                f"dropping {self.number} {who} drops the same ones at every step, which then never "
                f"teach: expected dropping.number below {droppable}, kind 'bernoulli', or a "
                "guidance without +drop"
            )
        if self.kind == "bernoulli" and survival <= 0:
            raise ValueError(
                f"survival {survival} drops {who} at every step, which then never teach: expected "
                "a probability above 0"
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
