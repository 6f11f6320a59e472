"""The seam of every method: what it is given, what it adds to a student's loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from distill_jax.methods.losses import cross_entropy
from distill_jax.models import Outputs

# What a method can ask of a teacher; a student shows all of it.
OUTPUTS = ("logits", "feature", "stem", "stages", "preacts", "embeddings")
# What a method can ask of the data. "view": the student is run on a second augmentation of the same
# examples too, see `Context.view`. "partner": on another example of the same class for each, see
# `Context.partner`. "own_view": networks that are trained together each see an augmentation of
# their own in the place of a common one.
DATA_NEEDS = ("view", "partner", "own_view")


class Hyper(NamedTuple):
    """The numbers of a step, traced: changing them compiles nothing anew.

    Args:
      lr_scale: factor on the schedule's learning rate.
      weight_decay: decay added to the gradient of every parameter.
      temperature: T > 0 of the softened distributions.
      kd_weight: λ in [0, 1].
      survival: probability that a teacher survives "bernoulli" dropping.
      methods: the weight of each method of the stage, by its name.
      label_smoothing: ε of `Context.cross_entropy`, None for none.
      average_decay: of the moving average of the network's variables, None where it keeps none.
    """

    lr_scale: Array | float = 1.0
    weight_decay: Array | float = 0.0
    temperature: Array | float = 1.0
    kd_weight: Array | float = 0.0
    survival: Array | float = 1.0
    methods: dict[str, Array | float] = {}
    label_smoothing: Array | float | None = None
    average_decay: Array | float | None = None


class Term(NamedTuple):
    """A part of the loss: `weight` times the mean of `value`.

    Args:
      value: (B,), a number per example, or () for the batch.
      weight: (), may be traced.
    """

    value: Array
    weight: Array | float = 1.0


class MixedLabels(NamedTuple):
    """The labels of images that are mixtures of two.

    Args:
      labels: (B,) of the second one, as `Context.labels` are of the first.
      share: () of the first in the mixture, in [0, 1].
    """

    labels: Array
    share: Array


class Shapes(NamedTuple):
    """What a method can know before the first step; arrays are `jax.ShapeDtypeStruct`s.

    Args:
      student: its outputs on the whole batch, over all devices.
      teachers: of those that the method hears, in the order of `Context.teachers`.
      classes: C.
      examples: N of the training split.
      inputs: what the networks take.
      labels: (N,) of the training split, by `Context.index`; integers, known now.
    """

    student: Outputs
    teachers: tuple[Outputs, ...]
    classes: int
    examples: int
    inputs: Any = None
    labels: Any = None


@dataclasses.dataclass(frozen=True)
class Context:
    """What a method is given at a step, on a device's share of the batch.

    Args:
      student: outputs of the student in training mode, with gradient.
      teachers: outputs of the K teachers that the method hears: the frozen ones, largest first,
        without gradient (what no method of the stage needs is None or ()), then the live ones, in
        training mode and without gradient where the method is `detached`. What a dropped teacher
        shows means nothing.
      teacher_mask: (K,) booleans, the teachers of this mini-batch; the same on every device. Only
        frozen ones are ever dropped.
      labels: (B,) integers in [0, C).
      hyper: the numbers of the step.
      inputs: (B, ...), as the networks see them.
      index: (B,) places in the training split.
      position: (B,) places in the whole batch.
      batch_size: examples over all devices.
      epoch: () float32, epochs since the first step: the step over the steps of an epoch.
      key: this method's random key of the step, the same on every device.
      axis_name: the devices' axis, None where there is one device.
      head: feature (B, F) -> logits by the student's classifier, with gradient.
      teacher_heads: the same of each teacher, with its gradient where its outputs have theirs.
      teacher_apply: (k, inputs) -> outputs of teacher k for other inputs.
      student_apply: inputs -> outputs of the student for other inputs, in training mode and with
        gradient; what its layers keep of them is dropped.
      view: where the method has the data need "view": outputs of the student on a second view of
        the same examples, in training mode and with gradient. What its layers keep of it, such as
        running statistics, they keep after the batch's.
      partner: likewise with the need "partner", on another example of the same class for each,
        perhaps the same one; after the view's.
      epochs: of the whole training.
      mixed: the other labels, where the images are mixtures; see `over_labels`.
    """

    student: Outputs
    teachers: tuple[Outputs, ...]
    teacher_mask: Array
    labels: Array
    hyper: Hyper
    inputs: Any = None
    index: Array | None = None
    position: Array | None = None
    batch_size: int = 0
    epoch: Array | float = 0.0
    key: Array | None = None
    axis_name: str | None = None
    head: Callable[[Array], Array] | None = None
    teacher_heads: tuple[Callable[[Array], Array], ...] = ()
    teacher_apply: Callable[[int, Any], Outputs] | None = None
    student_apply: Callable[[Any], Outputs] | None = None
    view: Outputs | None = None
    partner: Outputs | None = None
    epochs: float = 1.0
    mixed: MixedLabels | None = None

    @property
    def teacher_logits(self) -> Array:
        """(K, B, C) logits of the teachers; K may be 0."""
        if not self.teachers:
            return jnp.zeros((0, *self.student.logits.shape), self.student.logits.dtype)
        return jnp.stack([teacher.logits for teacher in self.teachers])

    def over_labels(self, values: Callable[[Array], Array]) -> Array:
        """`values(labels)`; of mixed images by both labels, by their shares."""
        if self.mixed is None:
            return values(self.labels)
        share = self.mixed.share
        return share * values(self.labels) + (1 - share) * values(self.mixed.labels)

    def cross_entropy(self, logits: Array) -> Array:
        """(..., B) of logits (..., B, C), with labels smoothed and mixed as the recipe says."""
        smoothing = self.hyper.label_smoothing
        return self.over_labels(lambda labels: cross_entropy(logits, labels, smoothing))

    def over_teachers(self, term: Callable[[int, Outputs], Array]) -> Array:
        """Adds up `term(k, teacher)` of the kept teachers; each is computed, then masked."""
        values = []
        for k, teacher in enumerate(self.teachers):
            mask = self.teacher_mask[k]
            # At zeros a term may have a gradient that is not finite, which no mask takes away.
            safe = jax.tree.map(lambda x, mask=mask: jnp.where(mask, x, _somewhere(x)), teacher)
            values.append(jnp.where(mask, term(k, safe), 0.0))
        return sum(values[1:], values[0])

    def whole_batch(self, values: Array) -> Array:
        """Gathers (B, ...) of all devices in the batch's order, for terms that compare examples."""
        if self.axis_name is None:
            return values
        return lax.all_gather(values, self.axis_name, tiled=True)


@dataclasses.dataclass(frozen=True)
class Method:
    """What travels to a student: terms of its loss, with the variables that they need.

    A method is a frozen dataclass of its numbers, hashable and without arrays. Its variables are
    {"params": trained by the student's optimizer, other collections: kept by the method itself};
    they are checkpointed with the student's and never deployed.
    """

    # What it reads of a teacher's outputs, of `OUTPUTS`.
    needs: ClassVar[tuple[str, ...]] = ("logits",)
    # Whether it teaches only where there are teachers; others act on plain training too.
    taught: ClassVar[bool] = True
    # Whether it counts the labels itself, in the place of the cross-entropy term.
    replaces_ce: ClassVar[bool] = False
    # Whether it trains a network's branches, and so needs some.
    trains_branches: ClassVar[bool] = False
    # Whether a recipe may smooth the labels where it replaces that term: it counts them by
    # `Context.cross_entropy`, or not at all.
    takes_label_smoothing: ClassVar[bool] = False
    # The edges that it travels along: "frozen", "live", or "all". Where a method of the network is
    # made for live edges they are left to it.
    edges: ClassVar[str] = "all"
    # Whether it means anything along the edge of a network to itself.
    teaches_itself: ClassVar[bool] = True
    # Whether live teachers are shown without gradient, so that they learn nothing from it.
    detached: ClassVar[bool] = True
    # What it needs of the data, of `DATA_NEEDS`.
    data_needs: ClassVar[tuple[str, ...]] = ()
    # Whether it counts labels by `Context.over_labels` or `Context.cross_entropy` alone; one that
    # reads none need not say so.
    mixes_labels: ClassVar[bool] = False
    # With fewer classes it teaches nothing: what it compares is then the same of all logits. Two of
    # them, scaled by their own deviation, say no more than which one is larger.
    least_classes: ClassVar[int] = 1

    def for_shapes(self, shapes: Shapes) -> Method:
        """The method for networks of these outputs; itself, but for what depends on them."""
        return self

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where the method cannot teach networks of these outputs."""

    def warnings(self, shapes: Shapes) -> list[str]:
        """What of its numbers does not apply as it is asked for, a line each."""
        return []

    def init(self, key: Array, shapes: Shapes) -> dict[str, Any]:
        """Draws the method's variables; most have none."""
        return {}

    def preparation(self) -> Method | None:
        """What stands in its place in the first phase that names it; None of most.

        A method that has one teaches only after such a phase, whose variables `begin` is given.
        """
        return None

    def begin(self, drawn: dict[str, Any], left: dict[str, Any]) -> dict[str, Any]:
        """The variables before the first step, by those that the phase before left of the method.

        Args:
          drawn: what `init` drew.
          left: what the phase left, taken where names, shapes and types are those of `drawn`.
        """
        shapes, others = (
            jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (drawn, left)
        )
        return left if shapes == others else drawn

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """Computes the terms of the loss by name, and the variables after this step.

        Terms are computed for every teacher and masked: a collective must not stand inside a
        conditional. Of the variables returned all but "params" are taken over. These have to be the
        same on every device, whatever `sync_bn` says of the networks: what is kept of examples is
        gathered by `Context.whole_batch` first.
        """
        raise NotImplementedError(f"{type(self).__name__}.terms")


def heard(
    method: Method, methods: Sequence[Method], own: str, frozen: int, live: Sequence[str]
) -> tuple[int, ...]:
    """The places of the teachers that a method hears among the frozen and then the live ones.

    Args:
      method: one of `methods`, all those of a network.
      methods: of these one that is made for live edges keeps them from the others.
      own: the network's name.
      frozen: how many frozen teachers it has.
      live: the names of those that are trained with it, itself perhaps among them.
    """
    along = method.edges
    if along == "all" and any(other.edges == "live" for other in methods):
        along = "frozen"
    hears_itself = method.teaches_itself
    return (
        *(i for i in range(frozen) if along != "live"),
        *(
            frozen + i
            for i, name in enumerate(live)
            if along != "frozen" and (hears_itself or name != own)
        ),
    )


def _somewhere(x: Array) -> Array:
    """Positive numbers of the shape and type of `x`, no two neighbours equal."""
    return (1.5 + jnp.cos(jnp.arange(x.size, dtype=jnp.float32))).reshape(x.shape).astype(x.dtype)


def total(terms: dict[str, Term]) -> Array:
    """Adds up weight times mean of all terms."""
    return sum((term.weight * jnp.mean(term.value) for term in terms.values()), jnp.float32(0.0))


def taps(outputs: Outputs) -> list[Any]:
    """The points at which the literature taps features: stem, stages, feature.

    Number 0 is the stem, 1 to S the stages' ends, S + 1 the vector before the classifier.
    """
    return [outputs.stem, *outputs.stages, outputs.feature]
