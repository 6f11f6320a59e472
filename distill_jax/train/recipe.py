"""What a stage is told: how its network is trained, and what must hold before it is."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from distill_jax import data
from distill_jax.methods.losses import EvolveOptions, LossOptions
from distill_jax.models import Network
from distill_jax.train import sharding
from distill_jax.train.dropping import Dropping
from distill_jax.train.optim import OptimOptions
from distill_jax.train.step import Hyper

SELECTIONS = ("validation", "test", "last")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one network is trained.

    Args:
      epochs: passes over the training split.
      batch_size: examples of a step, over all devices.
      last_batch: "drop" the partial batch of an epoch, or "keep" it as a smaller one.
      augment: a name in `data.AUGMENT`.
      train_limit: training images per class, chosen by the stage's seed; 0 takes all.
      selection: weights are those of the best epoch on "validation" (the later of equals), of the
        best on "test" (as the papers' codes do; biased upwards), or of the "last" epoch.
      sync_bn: BatchNorm sees the whole batch over all devices.
      temperature: T > 0.
      kd_weight: λ in [0, 1].
      survival: probability that a source survives "bernoulli" dropping.
      loss: how the terms are counted.
      evolve: how an evolving network and its branches teach each other.
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
    loss: LossOptions = LossOptions()
    evolve: EvolveOptions = EvolveOptions()
    dropping: Dropping = Dropping()
    optim: OptimOptions = OptimOptions()

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
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature is a number above 0, got {self.temperature}")
        for name in ("kd_weight", "survival"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is between 0 and 1, got {getattr(self, name)}")

    @property
    def hyper(self) -> Hyper:
        """The numbers that the step takes as arguments."""
        optimizer = self.optim
        numbers = (
            optimizer.learning_rate,
            optimizer.weight_decay,
            self.temperature,
            self.kd_weight,
            self.survival,
        )
        return Hyper(*(jnp.asarray(number, jnp.float32) for number in numbers))

    @property
    def structure(self) -> Recipe:
        """The rest, which decides what is compiled: the recipe with every number of `hyper` set."""
        unit = dataclasses.replace(self.optim, learning_rate=1.0, weight_decay=0.0)
        return dataclasses.replace(
            self, optim=unit, temperature=1.0, kd_weight=0.0, survival=1.0, train_limit=0
        )


@dataclasses.dataclass(frozen=True)
class Job:
    """A stage ready to be trained: the network, its teachers' networks, its recipe and its seed."""

    network: Network
    teachers: tuple[Network, ...]
    recipe: Recipe
    seed: int
    address: str = ""
    weights: str = ""  # the file that they are read from, where it is not trained


def steps_per_epoch(examples: int, recipe: Recipe) -> int:
    """Steps of one epoch over `examples`.

    Raises:
      ValueError: a batch larger than the training split.
    """
    if recipe.batch_size > examples:
        raise ValueError(f"batch_size {recipe.batch_size} is larger than the {examples} examples")
    partial = recipe.last_batch == "keep" and examples % recipe.batch_size > 0
    return examples // recipe.batch_size + partial


def check(job: Job, dataset: data.Dataset, topology: sharding.Topology) -> None:
    """Raises ValueError where the stage cannot be trained; nothing is compiled yet."""
    recipe = job.recipe
    if job.weights and job.network.branches:
        raise ValueError(
            f"weights are read for {job.network.backbone.name}, not {job.network.name}"
        )
    if job.network.branches and len(recipe.evolve.branch_weights) not in (0, job.network.branches):
        raise ValueError(
            f"{job.network.name} has {job.network.branches} branches, branch_weights gives "
            f"{recipe.evolve.branch_weights}"
        )
    examples = len(dataset.limited(recipe.train_limit, job.seed).train.labels)
    steps_per_epoch(examples, recipe)
    topology.check_batch(recipe.batch_size)
    if recipe.last_batch == "keep":
        topology.check_batch(examples % recipe.batch_size)
    if recipe.selection == "validation" and not len(dataset.valid.labels):
        raise ValueError(
            "selection 'validation' needs a validation split, and valid_fraction is 0; choose "
            "selection 'last', or 'test' as the papers do"
        )
    if not len(dataset.test.labels):
        raise ValueError("the test split is empty")
    if job.teachers:
        recipe.dropping.check(len(job.teachers))
    for network in (job.network, *job.teachers):
        if (network.classes, network.image_shape) != (dataset.classes, dataset.image_shape):
            raise ValueError(
                f"{network.name} takes {network.image_shape} images of {network.classes} classes, "
                f"{dataset.name} has {dataset.image_shape} and {dataset.classes}"
            )
