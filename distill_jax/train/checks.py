"""What cannot be trained is refused before anything is compiled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from flax import linen as nn

from distill_jax import data
from distill_jax.methods import Method
from distill_jax.methods.base import DATA_NEEDS
from distill_jax.models import LogitsTable, Network
from distill_jax.models.adapters import inputs_text, nnx_batch_norms_seen
from distill_jax.train import optim, sharding
from distill_jax.train.reach import check_terms
from distill_jax.train.stage import Stage, steps_per_epoch
from distill_jax.train.stage_methods import check_methods, method_shapes
from distill_jax.train.state import split_variables

# What networks that are trained together have in common: they see one batch.
SHARED = (
    "epochs",
    "batch_size",
    "last_batch",
    "augment",
    "train_limit",
    "selection",
    "sync_bn",
    "mixup",
    "cutmix",
)


def check(stage: Stage, dataset: data.Dataset, topology: sharding.Topology) -> None:
    """Raises ValueError where the stage cannot be trained; nothing is compiled yet."""
    recipe, network = stage.recipe, stage.network
    labels = dataset.limited(recipe.train_limit, stage.seed).train.labels
    examples = len(labels)
    steps = recipe.epochs * steps_per_epoch(examples, recipe)
    if recipe.optim.accumulate_steps > steps:
        raise ValueError(
            f"accumulate_steps is {recipe.optim.accumulate_steps}, and {network.name} is trained "
            f"for {steps} steps, which make no update: expected at most as many"
        )
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
        recipe.dropping.check(len(stage.teachers), recipe.survival)
    if dataset.task is not None and recipe.augment != "none":
        raise ValueError(
            f"augment is {recipe.augment!r}: expected 'none' for {dataset.name}, whose task says "
            "how its examples are preprocessed"
        )
    _check_mixing(stage, dataset)
    for name, method in stage.methods:
        _check_needs(stage, dataset, name, method)
    for one in (network, *stage.teachers, *stage.live):
        if (one.classes, one.inputs) != (dataset.classes, dataset.inputs):
            raise ValueError(
                f"{one.name} takes {inputs_text(one.inputs)} of {one.classes} classes, "
                f"{dataset.name} has {inputs_text(dataset.inputs)} of {dataset.classes}"
            )
    _check_tables(stage)
    _check_moving(stage)
    _check_smoothing(stage)
    _check_classes(stage)
    _check_statistics(stage, examples, topology)
    check_methods(stage, labels)
    _check_optimizer(stage, labels)
    _check_smaller_batch(stage, labels)
    check_terms(stage, labels)


def _check_tables(stage: Stage) -> None:
    """Raises ValueError where more is asked of a file of logits than these."""
    tables = [network.name for network in stage.teachers if isinstance(network, LogitsTable)]
    for name, method in stage.methods if tables else ():
        others = sorted(set(method.needs) - {"logits"})
        if method.taught and others:
            raise ValueError(
                f"method {name!r} needs {', '.join(others)} of its teachers, and {tables[0]} is a "
                "file of logits: expected methods of logits alone, such as kd"
            )


def _check_smoothing(stage: Stage) -> None:
    """Raises ValueError where labels are to be smoothed that a method counts in its own way."""
    smoothing = stage.recipe.label_smoothing
    for name, method in stage.methods if smoothing else ():
        if method.replaces_ce and not method.takes_label_smoothing:
            raise ValueError(
                f"label_smoothing is {smoothing:g}, and method {name!r} counts the labels of "
                f"{stage.network.name} itself in the place of the cross-entropy that it smooths: "
                "expected 0 beside it"
            )


def _check_classes(stage: Stage) -> None:
    """Raises ValueError where a method teaches nothing as there are too few classes."""
    classes = stage.network.classes
    for name, method in stage.methods:
        if classes < method.least_classes:
            raise ValueError(
                f"method {name!r} as it is set would teach {stage.network.name} nothing: there are "
                f"{classes} classes, and what it compares of so few is the same whatever the logits"
                f" are; expected at least {method.least_classes}"
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


def _check_mixing(stage: Stage, dataset: data.Dataset) -> None:
    """Raises ValueError where examples cannot be mixed."""
    for name in ("mixup", "cutmix"):
        alpha = getattr(stage.recipe, name)
        if alpha and dataset.task is not None:
            raise ValueError(
                f"{name} is {alpha:g}: expected 0 for {dataset.name}, as images alone are mixed"
            )


def _check_needs(stage: Stage, dataset: data.Dataset, name: str, method: Method) -> None:
    """Raises ValueError where the data cannot serve what a method needs of it."""
    needs, recipe = method.data_needs, stage.recipe
    if unknown := sorted(set(needs) - set(DATA_NEEDS)):
        raise ValueError(
            f"method {name!r} needs {', '.join(unknown)} of the data: expected some of {DATA_NEEDS}"
        )
    if "partner" in needs and isinstance(dataset.train.images, data.Streamed):
        raise ValueError(
            f"method {name!r} needs another example of the same class beside each, and images that "
            "are streamed have only those of some steps at hand: expected images of one size"
        )
    if "partner" in needs and (recipe.mixup or recipe.cutmix):
        raise ValueError(
            f"method {name!r} needs another example of the same class, and mixup and cutmix make "
            "images of two classes: expected recipe.mixup and recipe.cutmix 0"
        )
    if "view" in needs and (why := equal_views(stage, dataset)):
        raise ValueError(f"method {name!r} compares two views of each example, but {why}")
    if "own_view" in needs and stage.teachers:
        raise ValueError(
            f"method {name!r} gives each network an augmentation of its own, which frozen teachers "
            f"such as {stage.teachers[0].name} do not see: expected live teachers alone"
        )


def equal_views(stage: Stage, dataset: data.Dataset) -> str:
    """Why two views of an example are one and the same; empty where they are not."""
    if dataset.task is None:
        fixed, what = stage.recipe.augment == "none", "augment is 'none'"
    else:
        fixed, what = not dataset.task.is_random, "the task's preprocessing does not use its key"
    return f"{what}, which makes them equal: expected random augmentation" if fixed else ""


def view_warnings(stage: Stage, dataset: data.Dataset) -> list[str]:
    """A line for each method that asks for views of its own where all are equal."""
    why = equal_views(stage, dataset)
    return [
        f"{name} gives each network a view of its own, but {why}"
        for name, method in stage.methods
        if why and "own_view" in method.data_needs
    ]


def _check_smaller_batch(stage: Stage, labels: np.ndarray) -> None:
    """Raises ValueError where a method cannot take the smaller last batch of an epoch."""
    recipe = stage.recipe
    left = len(labels) % recipe.batch_size
    if recipe.last_batch != "keep" or not left:
        return
    smaller = dataclasses.replace(stage, recipe=dataclasses.replace(recipe, batch_size=left))
    check_methods(smaller, labels)
    whole, own = (method_shapes(each, labels) for each in (stage, smaller))
    for name in whole:
        if whole[name] != own[name]:
            raise ValueError(
                f"last_batch is 'keep', and what method {name!r} trains is of the size of a batch, "
                f"{recipe.batch_size}, while the last has {left}: expected 'drop'"
            )


def _check_statistics(stage: Stage, examples: int, topology: sharding.Topology) -> None:
    """Raises ValueError where a BatchNorm would see one value a channel, and give its bias."""
    recipe = stage.recipe
    batches = {"batch_size": recipe.batch_size}
    if recipe.last_batch == "keep":
        batches["the last batch"] = examples % recipe.batch_size
    devices = 1 if recipe.sync_bn else topology.count
    for name, size in batches.items():
        # Of two images there are two values.
        if size == devices and (module := _of_one_value(stage.network)):
            where = "" if devices == 1 else " on each device (sync_bn is False)"
            raise ValueError(
                f"{name} {size} leaves {module} of {stage.network.name} one value a channel"
                f"{where}, whose mean and variance say nothing: expected more images"
            )


def _of_one_value(network: Network) -> str:
    """The first BatchNorm that sees one value a channel of one image; empty where none does."""
    found: list[str] = []

    def note(path, x, axis):
        axes = axis if isinstance(axis, tuple) else (axis,)
        if x.size == math.prod(x.shape[i] for i in axes):
            found.append(path.replace("/", "."))

    def look(run, args, kwargs, context):
        module = context.module
        if type(module).__name__ == "BatchNorm" and context.method_name == "__call__":
            x = _normalised(module, *args, **kwargs)
            if x is not None:
                note(".".join(module.path), x, getattr(module, "axis", -1))
        return run(*args, **kwargs)

    def apply(variables, inputs):
        return network.apply(variables, inputs, train=True, rngs=jax.random.key(0))

    with nn.intercept_methods(look), nnx_batch_norms_seen(note):
        jax.eval_shape(apply, network.shapes, network.inputs)
    return found[0] if found else ""


def _normalised(module, x=None, use_running_average=None, *_, **__):
    """What a BatchNorm of linen is called with; None where it normalises by running statistics."""
    if isinstance(module, nn.BatchNorm):
        fixed = (use_running_average, module.use_running_average)
        return None if any(fixed) else x
    return x


def _check_optimizer(stage: Stage, labels: np.ndarray) -> None:
    """Raises ValueError where an optimizer of the user's cannot be run."""
    options = stage.recipe.optim
    if optim.is_registered(options.optimizer):
        own = split_variables(method_shapes(stage, labels))[0]
        held = {"network": stage.network.shapes["params"], "methods": own}
        optim.check(options, stage.hyper, held)


def _check_moving(stage: Stage) -> None:
    """Raises ValueError where `trainable` and `frozen` leave no parameter to train.

    A phase may train what its methods bring alone.
    """
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
    adapters = [
        name
        for (name, method), weight in zip(stage.methods, stage.weights, strict=True)
        if weight and type(method).init is not Method.init
    ]
    if not (stage.phase and adapters) and not any(optim.moves(options, path) for path in paths):
        raise ValueError(
            f"trainable {options.trainable} and frozen {options.frozen} leave nothing to train in "
            f"{stage.network.name}"
        )
