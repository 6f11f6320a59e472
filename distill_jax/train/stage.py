"""A stage: a network to train, its teachers, its methods and its recipe."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

from distill_jax import data
from distill_jax.methods import Hyper
from distill_jax.models import Network
from distill_jax.train.dropping import Dropping
from distill_jax.train.optim import OptimOptions
from distill_jax.train.terms import Methods, data_needs, teacher_needs

SELECTIONS = ("validation", "test", "last")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one network is trained.

    Args:
      epochs: passes over the training split.
      batch_size: examples of a step, over all devices.
      last_batch: "drop" the partial batch of an epoch, or "keep" it as a smaller one.
      augment: a name in `data.AUGMENT`.
      mixup: α of mixup, 0 for none: images of a batch are mixed by twos, and their labels.
      cutmix: α of CutMix, 0 for none; beside mixup each mini-batch has one of both.
      train_limit: training images per class, chosen by the stage's seed; 0 takes all.
      selection: weights are those of the best epoch on "validation" (the later of equals), of the
        best on "test" (as the papers' codes do; biased upwards), or of the "last" epoch.
      sync_bn: BatchNorm sees the whole batch over all devices.
      temperature: T > 0.
      kd_weight: λ in [0, 1].
      survival: probability that a source survives "bernoulli" dropping.
      label_smoothing: ε in [0, 1) that the cross-entropy takes from the label and spreads over all
        classes, wherever a loss counts the labels by one.
      ema: decay in (0, 1), a step, of an exponential moving average of the network's variables,
        which is what is evaluated, kept and deployed; 0 keeps none, see `averaging`.
      dropping: which teachers are dropped.
      optim: the optimizer and its schedule.

    Raises:
      ValueError: a value out of its range, naming it.
    """

    epochs: int = 1
    batch_size: int = 128
    last_batch: str = "drop"
    augment: str = "none"
    train_limit: int = 0
    selection: str = "validation"
    sync_bn: bool = True
    temperature: float = 1.0
    kd_weight: float = 0.0
    survival: float = 1.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    dropping: Dropping = Dropping()
    optim: OptimOptions = OptimOptions()
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("train_limit", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {least} or more, got {getattr(self, name)}")
        for name, allowed in (
            ("last_batch", ("drop", "keep")),
            ("augment", tuple(data.AUGMENT)),
            ("selection", SELECTIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {allowed}, got {getattr(self, name)!r}")
        if self.optim.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs {self.optim.warmup_epochs:g} is longer than the {self.epochs} "
                "epochs of training: expected at most as many"
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature is a number above 0, got {self.temperature}")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is a number of 0 or more, got {getattr(self, name)}")
        for name in ("kd_weight", "survival"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is between 0 and 1, got {getattr(self, name)}")
        for name in ("label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is 0 or more and below 1, got {getattr(self, name)}")

    @property
    def structure(self) -> Recipe:
        """What decides what is compiled: the recipe with what does not set to one value."""
        unit = dataclasses.replace(self.optim, learning_rate=1.0, weight_decay=0.0)
        return dataclasses.replace(
            self,
            optim=unit,
            temperature=1.0,
            kd_weight=0.0,
            survival=1.0,
            label_smoothing=0.5 if self.label_smoothing else 0.0,  # none is another program
            ema=0.5 if self.ema else 0.0,
            train_limit=0,
            selection="last",
        )


@dataclasses.dataclass(frozen=True)
class Initial:
    """Weights from elsewhere that a network begins with.

    Args:
      file: where they are read from.
      digest: of what is there.
      anew: whether the classifier is drawn in spite of them.
    """

    file: str
    digest: str
    anew: bool = False


@dataclasses.dataclass(frozen=True)
class Stage:
    """A network to train.

    Those of a cycle are stages that are trained together, by one step, and teach each other live.

    Args:
      network: the student.
      teachers: the networks of its frozen teachers, largest first.
      live: those of its live teachers, itself perhaps among them.
      recipe: how it is trained.
      seed: of its weights, order, augmentation and dropping.
      methods: the terms of its loss by name.
      weights: the weight of each of them.
      id: digest of all that determines the stage.
      file: the file that its weights are read from, where it is not trained.
      start: the id of the stage whose weights it begins with, where not with fresh ones.
      phase: whether it only prepares another stage, which starts from it.
      initial: weights that its training begins with, where not with fresh ones; where phases go
        before, the first of them does so.
    """

    network: Network
    teachers: tuple[Network, ...]
    recipe: Recipe
    seed: int
    methods: Methods = ()
    weights: tuple[float, ...] = ()
    id: str = ""
    file: str = ""
    start: str = ""
    phase: bool = False
    live: tuple[Network, ...] = ()
    initial: Initial | None = None

    @property
    def structure(self) -> Stage:
        """What decides what is compiled: the stage without its numbers and names."""
        return dataclasses.replace(
            self,
            recipe=self.recipe.structure,
            seed=0,
            weights=(),
            id="",
            file="",
            start="",
            phase=False,
            initial=None,
        )

    @property
    def hyper(self) -> Hyper:
        """The numbers that the step takes as arguments."""
        recipe = self.recipe
        names = (name for name, _ in self.methods)
        numbers = Hyper(
            lr_scale=recipe.optim.learning_rate,
            weight_decay=recipe.optim.weight_decay,
            temperature=recipe.temperature,
            kd_weight=recipe.kd_weight,
            survival=recipe.survival,
            methods=dict(zip(names, self.weights, strict=True)),
            label_smoothing=recipe.label_smoothing or None,
            average_decay=recipe.ema or None,
        )
        wide = np.float64 if self.network.dtype == "float64" else np.float32
        return jax.tree.map(lambda number: np.asarray(number, wide), numbers)

    @property
    def taught_by(self) -> tuple[str, ...]:
        """The names of all its teachers, the frozen ones first."""
        return tuple(network.name for network in (*self.teachers, *self.live))


def frozen_teachers(stages: Sequence[Stage]) -> tuple[Network, ...]:
    """The frozen teachers of stages that are trained together, each once."""
    return tuple({teacher: None for stage in stages for teacher in stage.teachers})


def needs_of(stages: Sequence[Stage]) -> tuple[str, ...]:
    """The outputs besides the logits that methods of stages need of their frozen teachers."""
    methods = tuple(pair for stage in stages for pair in stage.methods)
    return teacher_needs(methods) if frozen_teachers(stages) else ()


def data_needs_of(stages: Sequence[Stage]) -> tuple[str, ...]:
    """What methods of stages need of the data besides the batch."""
    return data_needs(tuple(pair for stage in stages for pair in stage.methods))


def steps_per_epoch(examples: int, recipe: Recipe) -> int:
    """Steps of one epoch over `examples`.

    Raises:
      ValueError: a batch larger than the training split.
    """
    if recipe.batch_size > examples:
        raise ValueError(f"batch_size {recipe.batch_size} is larger than the {examples} examples")
    partial = recipe.last_batch == "keep" and examples % recipe.batch_size > 0
    return examples // recipe.batch_size + partial
