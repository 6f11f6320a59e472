"""BSS: the teacher's outputs on adversarial samples, which lie near its decision boundary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from distill_jax import rng
from distill_jax.methods import features, ranges
from distill_jax.methods.base import Context, Method, Shapes, Term
from distill_jax.methods.losses import soften, widen
from distill_jax.models import Outputs


@dataclasses.dataclass(frozen=True)
class BSS(Method):
    """Σ_k keep_k mean CE(softmax(t_k(x')/T), softmax(s(x')/T)) max(1 - e/E, 0) after e epochs.

    x' begins with an image x that student and teacher classify right. A step adds
    η (z_g - z_a + 1e-4) ∇(z_a - z_g)/‖∇‖, for the teacher's class g and another class a, and ends
    where the teacher sees another class than g. Of a batch those images are taken whose
    probabilities of the other classes differ most, Σ_{c ≠ y} (p_t - p_s)²; class a is drawn from
    the teacher's probabilities. The mean is over the images taken, without T².

    It costs `steps` passes forward and back of each teacher and another of the student. The usual
    weight is 2, beside `kd`. An image of which the difference has no gradient stays as it is.

    Args:
      temperature: T.
      steps: of the attack.
      step_size: η.
      limit: inputs stay within ± this.
      samples: how many of a batch are taken at most.
      epochs: E.

    References:
      Heo et al., Knowledge Distillation with Adversarial Samples Supporting Decision Boundary, AAAI
      2019, 1805.05532, and its authors' code.
    """

    temperature: float = 3.0
    steps: int = 10
    step_size: float = 0.3
    limit: float = 2.5
    samples: int = 64
    epochs: float = 60.0

    needs: ClassVar[tuple[str, ...]] = ("logits", "apply")

    def __post_init__(self) -> None:
        ranges.above_zero(
            "bss",
            temperature=self.temperature,
            step_size=self.step_size,
            limit=self.limit,
            epochs=self.epochs,
        )
        ranges.counts("bss", steps=self.steps, samples=self.samples)

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where inputs are nothing that can be moved."""
        taken = jax.tree.leaves(shapes.inputs)
        if len(taken) != 1 or not jnp.issubdtype(taken[0].dtype, jnp.floating):
            said = ", ".join(f"{x.dtype} of {x.shape[1:]}" for x in taken)
            raise ValueError(
                f"bss moves images: the networks take {said}, expected one array of floating "
                "numbers"
            )

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"bss"}."""
        inputs, root = context.inputs, context.key
        apply, student_apply = context.teacher_apply, context.student_apply
        assert apply is not None and student_apply is not None and root is not None

        def divergence(k: int, teacher: Outputs) -> Array:
            taken, share = self._taken(context, teacher.logits)
            classes = _other_classes(jax.random.fold_in(root, k), context, teacher.logits)
            moved = self.attack(lambda x: apply(k, x).logits, inputs, classes)
            values = self.divergence(apply(k, moved).logits, student_apply(moved).logits)
            return jnp.where(taken, values, 0.0) * share

        fading = jnp.maximum(1 - jnp.floor(context.epoch) / self.epochs, 0.0)
        return {"bss": Term(context.over_teachers(divergence), fading)}, variables

    def attack(self, logits_of: Callable[[Array], Array], inputs: Array, classes: Array) -> Array:
        """Moves inputs from the class that `logits_of` gives towards another.

        Args:
          logits_of: inputs -> (B, C).
          inputs: (B, ...).
          classes: (B,) the others.

        Returns:
          (B, ...), without gradient.
        """
        inputs = lax.stop_gradient(inputs)
        rows = jnp.arange(len(inputs))
        first = jnp.argmax(logits_of(inputs), -1)

        def gap(x: Array) -> tuple[Array, tuple[Array, Array]]:
            logits = widen(logits_of(x))
            apart = logits[rows, classes] - logits[rows, first]
            return jnp.sum(apart), (apart, jnp.argmax(logits, -1) == first)

        def step(_: int, x: Array) -> Array:
            gradient, (apart, inside) = jax.grad(gap, has_aux=True)(x)
            direction = features.unit(gradient.reshape(len(x), -1)).reshape(x.shape)
            size = jnp.where(inside, self.step_size * (1e-4 - apart), 0.0).astype(x.dtype)
            size = size.reshape(-1, *(1,) * (x.ndim - 1))
            return jnp.clip(x + size * direction, -self.limit, self.limit)

        return lax.stop_gradient(lax.fori_loop(0, self.steps, step, inputs))

    def divergence(self, teacher: Array, student: Array) -> Array:
        """(B,) the cross-entropy of softened outputs."""
        targets = jax.nn.softmax(soften(teacher, self.temperature))
        return -jnp.sum(targets * jax.nn.log_softmax(soften(student, self.temperature)), -1)

    def _taken(self, context: Context, logits: Array) -> tuple[Array, Array]:
        """(B,) which examples are taken, and the size of the batch over how many they are."""
        own, labels = lax.stop_gradient(context.student.logits), context.labels
        right = (jnp.argmax(own, -1) == labels) & (jnp.argmax(logits, -1) == labels)
        gaps = jnp.square(jax.nn.softmax(widen(own)) - jax.nn.softmax(widen(logits)))
        score = jnp.sum(jnp.where(_is_label(labels, own), 0.0, gaps), -1)
        whole = context.whole_batch(jnp.where(right, score, -1.0))
        rank = jnp.argsort(jnp.argsort(-whole))[features.own_places(context)]
        number = jnp.minimum(jnp.sum(whole >= 0), self.samples)
        return right & (rank < self.samples), len(whole) / jnp.maximum(number, 1)


def _other_classes(key: Array, context: Context, logits: Array) -> Array:
    """(B,) classes other than the label, drawn by the teacher's probabilities."""
    others = jnp.where(_is_label(context.labels, logits), -jnp.inf, widen(logits))
    keys = rng.per_example(key, features.own_places(context))
    return jax.vmap(jax.random.categorical)(keys, others)


def _is_label(labels: Array, logits: Array) -> Array:
    return jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
