"""What terms depend on: parameters, which a phase else leaves as they are, and labels."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.methods.base import MixedLabels
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


@functools.lru_cache(maxsize=128)
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


def check_labels(stage: Stage, labels: np.ndarray) -> None:
    """Raises ValueError where images are mixed and a method takes the first label for the only one.

    Args:
      stage: to be trained.
      labels: (N,) of the training split.
    """
    if stage.recipe.mixup or stage.recipe.cutmix:
        given = _shapes_given(stage, method_shapes(stage, labels))
        jax.eval_shape(functools.partial(_values, stage, mixed=True), *given)


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
    stage: Stage, params, variables, methods, teachers, inputs, labels, mixed: bool = False
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
    terms, _ = student_terms(
        student,
        methods,
        dataclasses.replace(untrained.first_context(inputs, labels), mixed=mixture),
        frozen_shown(frozen, taught, teachers, stage.methods),
        {name: untrained.live(x, own[name], inputs, others) for name, x in networks.items()},
        None,
        untrained.key_of,
    )
    return [term.value for term in terms.values()]
