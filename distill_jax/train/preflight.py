"""Before the first step: are the teachers any good, and does one loss term drown another?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from distill_jax.evals import classification
from distill_jax.methods import Term
from distill_jax.models import Outputs
from distill_jax.models.basics import at_least_float32

COMPARED = ("ce", "kl", "teskd_ce")  # terms of logits, whose gradients can be compared
DROWNED = 30.0  # ratio of gradient norms from which a term is said to drown another
LARGE_STEP = 3.0  # times that of the labels alone, from which a step is said to be large


class TeacherQuality(NamedTuple):
    """What is known of one teacher, on the validation split."""

    name: str
    accuracy: float
    agreement: float | None  # mean top-1 agreement with the other teachers


class TermSize(NamedTuple):
    """One weighted term of the loss on one batch, before the first step."""

    name: str
    value: float
    gradient: float  # norm of its gradient by the outputs that it sees


class Preflight(NamedTuple):
    """Teachers, terms, and what looks wrong, in words.

    Args:
      teachers: the frozen ones.
      terms: of the loss.
      warnings: a line each.
      split: where the teachers were measured.
      step: the size of a step, in steps of the cross-entropy alone.
    """

    teachers: list[TeacherQuality]
    terms: list[TermSize]
    warnings: list[str]
    split: str = "validation"
    step: float = 1.0

    def lines(self) -> list[str]:
        """One line a teacher, one for the terms, one a warning."""
        lines = [
            f"  teacher {t.name}: {100 * t.accuracy:.2f} % on {self.split}"
            + (
                ""
                if t.agreement is None
                else f", agrees with the others on {100 * t.agreement:.1f} %"
            )
            for t in self.teachers
        ]
        if self.teachers or len(self.terms) > 1:
            terms = ", ".join(
                f"{t.name} {t.value:.3g} (gradient {t.gradient:.2g})" for t in self.terms
            )
            times = f"; a step is {self.step:.2g} times that of the labels alone"
            lines.append(f"  loss on one batch: {terms}{times}")
        return lines + [f"  warning: {warning}" for warning in self.warnings]


def teacher_quality(
    names: tuple[str, ...], logits: list[np.ndarray], labels: np.ndarray
) -> list[TeacherQuality]:
    """Each teacher's accuracy and its agreement with the others; logits (N, C) of each."""
    teachers = []
    for i, name in enumerate(names):
        others = [classification.agreement(logits[i], x) for j, x in enumerate(logits) if j != i]
        mean = float(np.mean(others)) if others else None
        teachers.append(TeacherQuality(name, classification.accuracy(logits[i], labels), mean))
    return teachers


def gradient_norm(loss: Callable[..., Array], *outputs: Any) -> Array:
    """The norm of a loss's gradient by the network's logits, those of its branches too.

    Args:
      loss: from the outputs.
      *outputs: of the network, on the batch and on other inputs; or trees of such.
    """
    gradients = jax.grad(loss, tuple(range(len(outputs))))(*outputs)
    gradients = jax.tree.leaves(gradients, is_leaf=lambda x: isinstance(x, Outputs))
    exits = [exit for own in gradients for exit in (own, *own.branches)]
    return optax.tree.norm([at_least_float32(exit.logits) for exit in exits])


def term_gradients(
    terms_of: Callable[..., dict[str, Term]], *outputs: Any
) -> dict[str, tuple[Array, Array]]:
    """Value and gradient norm of each term of the loss, times its weight.

    The norm is that of the gradient of the batch's mean loss by the network's outputs: what reaches
    the network, before its own Jacobian.

    Args:
      terms_of: the terms from the outputs, all teachers kept.
      *outputs: of the network, on the batch and on other inputs; or trees of such.
    """

    def weighted(*seen: Any) -> dict[str, Array]:
        return {k: term.weight * jnp.mean(term.value) for k, term in terms_of(*seen).items()}

    values, pullback = jax.vjp(weighted, *outputs)
    sizes = {}
    for name, value in values.items():
        chosen = {k: jnp.asarray(float(k == name), v.dtype) for k, v in values.items()}
        gradients = pullback(chosen)
        sizes[name] = value, optax.tree.norm(jax.tree.map(at_least_float32, gradients))
    return sizes


def term_sizes(sizes: dict[str, tuple[Array, Array]]) -> list[TermSize]:
    """Fetches what `term_gradients` gave."""
    fetched = jax.device_get(sizes)
    return [TermSize(name, float(value), float(norm)) for name, (value, norm) in fetched.items()]


def warnings(
    teachers: list[TeacherQuality],
    terms: list[TermSize],
    plain_accuracy: float | None,
    step: float = 1.0,
    rate: float = 1.0,
) -> list[str]:
    """What looks wrong, in words: teachers below their student, terms that drown or are not finite.

    Args:
      teachers: as `teacher_quality` lines them.
      terms: as `term_sizes` lines them.
      plain_accuracy: of the same student trained alone, on validation; None where not known.
      step: see `Preflight`.
      rate: the learning rate.
    """
    lines = []
    for teacher in teachers:
        if plain_accuracy is not None and teacher.accuracy < plain_accuracy:
            lines.append(
                f"teacher {teacher.name} ({100 * teacher.accuracy:.2f} %) is worse than its "
                f"student trained alone ({100 * plain_accuracy:.2f} %)"
            )
    for term in terms:
        if not np.isfinite((term.value, term.gradient)).all():
            lines.append(f"the term {term.name} or its gradient is not finite")
    taught = [t for t in terms if t.name in COMPARED and t.gradient > 0]
    if len(taught) > 1:
        least, most = (f(taught, key=lambda t: t.gradient) for f in (min, max))
        if most.gradient > DROWNED * least.gradient:
            ratio = most.gradient / least.gradient
            lines.append(
                f"the term {most.name} drowns {least.name}: its gradient is {ratio:.0f} times as "
                "large (the KL's weight is λT², over the number of classes with element_mean)"
            )
    if step > LARGE_STEP:
        largest = max(terms, key=lambda term: term.gradient).name
        lines.append(
            f"the loss makes a step {step:.1f} times as large as the labels alone would, most of "
            f"it by {largest} (the weight of kl is λT², times the number of teachers where "
            f"loss.teachers is 'sum'): a learning rate of {rate / step:.2g} in the place of "
            f"{rate:g} makes up for it, or another weight"
        )
    return lines


def first_epoch_warning(loss: float, classes: int, rate: float) -> str | None:
    """A line where the first epoch ends with a cross-entropy above that of guessing, ln C."""
    if loss <= math.log(classes):
        return None
    return (
        f"after its first epoch the cross-entropy is {loss:.3f}, above that of guessing, "
        f"ln({classes}) = {math.log(classes):.3f}: a learning rate below {rate:g} may help"
    )


def as_json(report: Preflight) -> dict[str, Any]:
    """For the records of a stage."""
    return {
        "teachers": [teacher._asdict() for teacher in report.teachers],
        "terms": [term._asdict() for term in report.terms],
        "warnings": report.warnings,
        "step": report.step,
    }
