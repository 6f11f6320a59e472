"""A stage: a network to train, its teachers, its methods and its recipe."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from distill_jax import data, rng
from distill_jax.methods import Hyper, Method, Shapes, heard
from distill_jax.models import Network, Outputs, Variables
from distill_jax.models.adapters import inputs_text
from distill_jax.train import optim, sharding
from distill_jax.train.dropping import Dropping
from distill_jax.train.optim import OptimOptions
from distill_jax.train.terms import Methods, teacher_needs

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
    def structure(self) -> Recipe:
        """What decides what is compiled: the recipe with every number of `Hyper` set."""
        unit = dataclasses.replace(self.optim, learning_rate=1.0, weight_decay=0.0)
        return dataclasses.replace(
            self, optim=unit, temperature=1.0, kd_weight=0.0, survival=1.0, train_limit=0
        )


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
        )
        return jax.tree.map(lambda number: jnp.asarray(number, jnp.float32), numbers)

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


def steps_per_epoch(examples: int, recipe: Recipe) -> int:
    """Steps of one epoch over `examples`.

    Raises:
      ValueError: a batch larger than the training split.
    """
    if recipe.batch_size > examples:
        raise ValueError(f"batch_size {recipe.batch_size} is larger than the {examples} examples")
    partial = recipe.last_batch == "keep" and examples % recipe.batch_size > 0
    return examples // recipe.batch_size + partial


def shapes_of(stage: Stage, examples: int) -> Shapes:
    """What the stage's methods can know before the first step, of the whole batch.

    Its teachers are the frozen ones, then the live ones; `_heard` chooses those of one method.
    """
    size = stage.recipe.batch_size
    return Shapes(
        _of_batch(stage.network.output_shapes, size),
        tuple(_of_batch(x.output_shapes, size) for x in (*stage.teachers, *stage.live)),
        stage.network.classes,
        examples,
    )


def _heard(stage: Stage, method: Method, shapes: Shapes) -> Shapes:
    """The shapes that a method is given: of those of its teachers that it hears."""
    methods, live = [other for _, other in stage.methods], [peer.name for peer in stage.live]
    places = heard(method, methods, stage.network.name, len(stage.teachers), live)
    return shapes._replace(teachers=tuple(shapes.teachers[place] for place in places))


def _of_batch(shapes: Outputs, size: int) -> Outputs:
    """The shapes of one image's outputs, of a batch of `size`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), shapes)


def _looks_at_shapes(method: Method) -> bool:
    """Whether a method checks or draws anything by shapes, which takes tracing its networks."""
    kind = type(method)
    own = (kind.init, kind.check, kind.for_shapes)
    return own != (Method.init, Method.check, Method.for_shapes)


def with_needs(stage: Stage, examples: int) -> Stage:
    """The stage with methods that know what they need of its networks.

    Raises:
      ValueError: a method cannot teach these networks.
    """
    if not any(_looks_at_shapes(method) for _, method in stage.methods):
        return stage
    shapes, methods = shapes_of(stage, examples), []
    for name, method in stage.methods:
        try:
            methods.append((name, method.for_shapes(_heard(stage, method, shapes))))
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise ValueError(_cannot_teach(stage, name, error)) from error
    return dataclasses.replace(stage, methods=tuple(methods))


def init_methods(stage: Stage, examples: int, key: Array) -> dict[str, Variables]:
    """Draws the variables of the stage's methods, of those that have any."""
    own = [(name, m) for name, m in stage.methods if type(m).init is not Method.init]
    if not own:  # most have none: nothing is traced or compiled for them
        return {}
    shapes = shapes_of(stage, examples)

    def draw(key):
        return {
            name: m.init(rng.stream(key, f"init {name}"), _heard(stage, m, shapes))
            for name, m in own
        }

    return {name: variables for name, variables in jax.jit(draw)(key).items() if variables}


def method_shapes(stage: Stage, examples: int) -> dict[str, Variables]:
    """The shapes of what `init_methods` gives."""
    return jax.eval_shape(lambda key: init_methods(stage, examples, key), jax.random.key(0))


def check(stage: Stage, dataset: data.Dataset, topology: sharding.Topology) -> None:
    """Raises ValueError where the stage cannot be trained; nothing is compiled yet."""
    recipe, network = stage.recipe, stage.network
    if stage.file and network.branches:
        raise ValueError(f"weights are read for {network.backbone.name}, not {network.name}")
    examples = len(dataset.limited(recipe.train_limit, stage.seed).train.labels)
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
    if stage.teachers:
        recipe.dropping.check(len(stage.teachers))
    if dataset.task is not None and recipe.augment != "none":
        raise ValueError(
            f"augment is {recipe.augment!r}: expected 'none' for {dataset.name}, whose task says "
            "how its examples are preprocessed"
        )
    for one in (network, *stage.teachers, *stage.live):
        if (one.classes, one.inputs) != (dataset.classes, dataset.inputs):
            raise ValueError(
                f"{one.name} takes {inputs_text(one.inputs)} of {one.classes} classes, "
                f"{dataset.name} has {inputs_text(dataset.inputs)} of {dataset.classes}"
            )
    _check_moving(stage)
    _check_methods(stage, examples)


# What networks that are trained together have in common: they see one batch.
SHARED = (
    "epochs",
    "batch_size",
    "last_batch",
    "augment",
    "train_limit",
    "selection",
    "sync_bn",
)


def check_together(stages: Sequence[Stage]) -> None:
    """Raises ValueError where networks of a cycle cannot share a step, naming both values."""
    first, *others = stages
    for other in others:
        pair = f"{first.network.name} and {other.network.name} teach each other and are trained"
        for name in SHARED:
            ours, theirs = getattr(first.recipe, name), getattr(other.recipe, name)
            if ours != theirs:
                raise ValueError(
                    f"{pair} together, but {name} is {ours!r} and {theirs!r}: expected one value"
                )
        if first.seed != other.seed:
            raise ValueError(
                f"{pair} together, but seed is {first.seed} and {other.seed}: expected one value"
            )
        if first.network.classes != other.network.classes:
            raise ValueError(
                f"{pair} together, but have {first.network.classes} and {other.network.classes} "
                "classes: expected as many"
            )


def _check_moving(stage: Stage) -> None:
    """Raises ValueError where `trainable` and `frozen` leave no parameter to train."""
    options = stage.recipe.optim
    if not (options.trainable or options.frozen):
        return
    paths = optim.parameter_paths(stage.network.shapes["params"])
    for pattern in (*options.trainable, *options.frozen):
        if not any(optim.matches(pattern, path) for path in paths):
            raise ValueError(
                f"{stage.network.name} has no parameter that matches {pattern!r}; there are "
                f"{', '.join(paths[:6])} ..."
            )
    if not any(optim.moves(options, path) for path in paths):
        raise ValueError(
            f"trainable {options.trainable} and frozen {options.frozen} leave nothing to train in "
            f"{stage.network.name}"
        )


def _check_methods(stage: Stage, examples: int) -> None:
    looking = [(name, method) for name, method in stage.methods if _looks_at_shapes(method)]
    shapes = shapes_of(stage, examples) if looking else None
    for name, method in looking:
        try:
            method.check(_heard(stage, method, shapes))  # type: ignore[arg-type]
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise ValueError(_cannot_teach(stage, name, error)) from error


def _cannot_teach(stage: Stage, name: str, error: Exception) -> str:
    teachers = "+".join(stage.taught_by) or "nobody"
    return f"method {name!r} for {stage.network.name} taught by {teachers}: {error}"
