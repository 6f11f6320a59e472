"""What terms depend on: parameters, which a phase else leaves as they are, and labels."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import methods as methods_by_name
from distill_jax.changed import until_changed
from distill_jax.methods import Hyper
from distill_jax.methods.base import MixedLabels
from distill_jax.models import LogitsTable
from distill_jax.refusals import kind_and_line
from distill_jax.train import optim, untrained
from distill_jax.train.seen import ASKED_AGAIN
from distill_jax.train.stage import Stage
from distill_jax.train.stage_methods import method_shapes
from distill_jax.train.teachers import FrozenTeachers
from distill_jax.train.terms import (
    Student,
    data_needs,
    frozen_shown,
    student_terms,
    teacher_needs,
)

ALL = ".*"  # in `OptimOptions.frozen`: nothing moves


def as_phase(stage: Stage, labels: np.ndarray) -> Stage:
    """The stage as a phase, which does not move what no term of its loss depends on.

    Weight decay would move it, as it would the classifier where only feature maps are compared.
    Terms of methods of weight 0 are none.

    Args:
      stage: what the phase trains.
      labels: (N,) of the training split.
    """
    weighted = tuple(
        pair for pair, weight in zip(stage.methods, stage.weights, strict=True) if weight
    )
    bare = dataclasses.replace(stage.structure, methods=weighted)
    leaves, tree = jax.tree.flatten(method_shapes(bare, labels))
    options = stage.recipe.optim
    frozen = (*options.frozen, *_unreached(bare, tree, *leaves))
    options = dataclasses.replace(options, frozen=frozen)
    recipe = dataclasses.replace(stage.recipe, optim=options)
    return dataclasses.replace(stage, recipe=recipe, phase=True)


@until_changed(maxsize=128)
def _unreached(stage: Stage, tree: Any, *leaves: Any) -> tuple[str, ...]:
    """Patterns of the network's parameters that would move and that its terms do not depend on.

    The shapes of its methods' variables come flat, to be part of the cache's key.
    """
    paths = optim.parameter_paths(stage.network.shapes["params"])
    given = _shapes_given(stage, jax.tree.unflatten(tree, leaves))
    traced = jax.make_jaxpr(functools.partial(_values, stage))(*given).jaxpr
    needed = set(map(id, traced.outvars))
    for equation in reversed(traced.eqns):
        if needed.intersection(map(id, equation.outvars)):
            needed.update(map(id, equation.invars))
    own = zip(paths, traced.invars[: len(paths)], strict=True)
    unreached = [path for path, x in own if id(x) not in needed]
    if len(unreached) == len(paths):
        return (ALL,)
    return tuple(re.escape(path) for path in unreached if optim.moves(stage.recipe.optim, path))


def check_terms(stage: Stage, labels: np.ndarray) -> None:
    """Tries the terms of a stage on shapes alone, where methods are the user's or images are mixed.

    Args:
      stage: to be trained.
      labels: (N,) of the training split.

    Raises:
      ValueError: terms that cannot be computed or are none, or a method that takes the first label
        of mixed images for the only one.
    """
    own = [name for name, _ in stage.methods if methods_by_name.is_registered(name)]
    mixed = bool(stage.recipe.mixup or stage.recipe.cutmix)
    tables = any(isinstance(teacher, LogitsTable) for teacher in stage.teachers)
    if stage.file or tables or not (mixed or own):
        return
    given = _shapes_given(stage, method_shapes(stage, labels))
    numbers = stage.hyper, jax.ShapeDtypeStruct((), jnp.float32)

    def values(numbers: Any, *given: Any) -> Any:
        return _values(stage, *given, mixed=mixed, numbers=numbers)

    try:
        jax.eval_shape(values, numbers, *given)
    except ValueError:
        raise
    except Exception as error:  # whatever somebody's code raises
        raise ValueError(
            f"the loss of {stage.network.name} by {', '.join(own) or 'its methods'} cannot be "
            f"computed: {kind_and_line(error)}"
        ) from error


def _shapes_given(stage: Stage, methods: dict[str, Any]) -> tuple[Any, ...]:
    """The shapes of what `_values` takes, of `methods` those of their variables."""
    size = stage.recipe.batch_size

    def of_batch(x: Any) -> Any:
        return jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)

    return (
        stage.network.shapes["params"],
        {network.name: network.shapes for network in (stage.network, *stage.live)},
        methods,
        tuple(teacher.shapes for teacher in stage.teachers),
        jax.tree.map(of_batch, stage.network.inputs),
        jax.ShapeDtypeStruct((size,), jnp.int32),
    )


def _values(
    stage: Stage,
    params,
    variables,
    methods,
    teachers,
    inputs,
    labels,
    *,
    mixed: bool = False,
    numbers: Any = (Hyper(), 0.0),
) -> Any:
    """The values of the terms of a stage's loss, by the parameters of its network."""
    networks = {x.name: x for x in (stage.network, *stage.live)}
    student = Student(
        network=stage.network,
        methods=stage.methods,
        optimizer=stage.recipe.optim,
        schedule=jnp.asarray,
        frozen=tuple(range(len(stage.teachers))),
        live=tuple(peer.name for peer in stage.live),
    )
    frozen = FrozenTeachers(stage.teachers, teacher_needs(stage.methods))
    taught = frozen.outputs(teachers, inputs, None)
    needs = [need for need in ASKED_AGAIN if need in data_needs(stage.methods)]
    others = dict.fromkeys(needs, inputs)
    own = variables | {student.name: {**variables[student.name], "params": params}}
    mixture = MixedLabels(labels, jnp.asarray(0.5)) if mixed else None
    hyper, epoch = numbers
    context = untrained.first_context(inputs, labels)
    terms, _ = student_terms(
        student,
        methods,
        dataclasses.replace(context, mixed=mixture, hyper=hyper, epoch=epoch),
        frozen_shown(frozen, taught, teachers, stage.methods),
        {name: untrained.live(x, own[name], inputs, others) for name, x in networks.items()},
        None,
        untrained.key_of,
    )
    return [term.value for term in terms.values()]
