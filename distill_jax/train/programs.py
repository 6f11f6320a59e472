"""What is compiled for training, once for all stages that share it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from distill_jax import data, rng, traced
from distill_jax.data.task import Examples, Images
from distill_jax.methods import total
from distill_jax.methods.losses import cross_entropy
from distill_jax.models import Network, Variables, run_once
from distill_jax.models.backend import backend, traced_for
from distill_jax.train import metrics, optim, preflight, sharding, untrained
from distill_jax.train.metrics import StepMetrics
from distill_jax.train.stage import Recipe, Stage, data_needs_of, frozen_teachers
from distill_jax.train.state import Batch, TrainState
from distill_jax.train.step import Hypers, draw_from, make_train_step
from distill_jax.train.teachers import FrozenTeachers, FrozenVariables, TeacherOutputs
from distill_jax.train.terms import Live, Student, data_needs, frozen_shown, student_terms

Preprocessing = Examples | Images


class TrainProgram(NamedTuple):
    """A compiled train loop, and its step on one device.

    On one device the loop's step is that one: what asked it for shapes has traced it for the loop.
    """

    loop: Callable
    body: traced.Program


def train_program(
    stages: Sequence[Stage],
    steps: int,
    dataset: data.Dataset,
    topology: sharding.Topology,
    *,
    max_nonfinite_steps: int = 0,
    shared_data: bool | None = None,
    own_data: bool = False,
) -> TrainProgram:
    """The train loop of a stage, or of those of a cycle, which are trained together.

    Args:
      stages: they.
      steps: of an epoch.
      dataset: gives the preprocessing.
      topology: the devices.
      max_nonfinite_steps: see `make_train_step`.
      shared_data: of a population whether all see the same images; None for one replica alone.
      own_data: see `sharding.train_loop`.
    """
    return _train_program(
        tuple(stage.structure for stage in stages),
        steps,
        dataset.preprocessing,
        topology,
        max_nonfinite_steps,
        shared_data,
        tuple(optim.builder_of(stage.recipe.optim.optimizer) for stage in stages),
        own_data,
    )


@functools.lru_cache(maxsize=32)
def _train_program(
    stages: tuple[Stage, ...],
    steps: int,
    preprocessing: Preprocessing,
    topology: sharding.Topology,
    max_nonfinite_steps: int,
    shared_data: bool | None,
    builders: tuple[optim.BuildOptimizer | None, ...],  # a name may be registered anew
    own_data: bool,
) -> TrainProgram:
    recipe, teachers = stages[0].recipe, frozen_teachers(stages)

    def step(axis_name):
        body = make_train_step(
            students=tuple(_student(stage, teachers, steps) for stage in stages),
            teachers=teachers,
            preprocess=functools.partial(preprocessing.train, recipe.augment),
            steps_per_epoch=steps,
            axis_name=axis_name,
            sync_bn=recipe.sync_bn,
            max_nonfinite_steps=max_nonfinite_steps,
            epochs=recipe.epochs,
            mixup=recipe.mixup,
            cutmix=recipe.cutmix,
        )
        return traced_for(topology.backend, body)

    key = ("step", stages, steps, preprocessing, topology, max_nonfinite_steps, builders)
    body = traced.Program(step(None), key)
    if shared_data is not None:
        loop = sharding.population_loop(body, topology, shared_data=shared_data)
    else:
        each = body if topology.axis_name is None else step(topology.axis_name)
        named = (*key, "own data") if own_data else key
        loop = sharding.train_loop(each, topology, named, own_data=own_data)
    return TrainProgram(loop, body)


def _student(stage: Stage, teachers: tuple[Network, ...], steps: int = 1) -> Student:
    """A stage as the step knows it, among the frozen teachers of all that it trains."""
    recipe = stage.recipe
    return Student(
        network=stage.network,
        methods=stage.methods,
        optimizer=recipe.optim,
        schedule=optim.schedule(recipe.optim, recipe.epochs, steps),
        frozen=tuple(teachers.index(teacher) for teacher in stage.teachers),
        live=tuple(peer.name for peer in stage.live),
        draw_mask=draw_from(recipe.dropping, len(stage.teachers)),
    )


def zero_sums(
    body: traced.Program,
    state: TrainState,
    frozen: Any,
    hyper: Hypers,
    key: Array,
    *,
    batch_size: int,
    spec: Any,
    cached: TeacherOutputs | None,
    partners: bool = False,
    where: jax.sharding.Sharding | None,
) -> dict[str, StepMetrics]:
    """Where the sums of a step's metrics start, by its shapes alone.

    Args:
      body: the step; traced, once for all that give it the same.
      state: and frozen, hyper, key: what it is given.
      batch_size: and spec, of one example: of its batch.
      cached: the teachers' outputs on the training split, where the batch brings theirs.
      partners: whether it brings partners.
      where: the examples are, as the type of what a step is given has it.
    """

    def per_example(*shape, dtype=jnp.int32, where=None):
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=where)

    inputs = jax.tree.map(lambda x: per_example(*x.shape, dtype=x.dtype, where=where), spec)
    batch = Batch(
        inputs=inputs,
        labels=per_example(where=where),
        index=per_example(),
        position=per_example(),
        teachers=jax.tree.map(
            lambda x: per_example(*x.shape[1:], dtype=x.dtype, where=where), cached
        ),
        partners=inputs if partners else None,
    )
    return metrics.zeros_like(body.shapes(state, frozen, batch, hyper, key)[1])


def freeze_teachers(
    teachers: tuple[Network, ...], variables: Sequence[Variables], topology: sharding.Topology
) -> FrozenVariables:
    """What frozen networks make of their variables, in one program, on every device."""
    placed = topology.device_put(tuple(variables))
    return _freeze_program(teachers, topology, topology.backend)(placed)


@functools.lru_cache(maxsize=32)
def _freeze_program(teachers, topology, platform):
    def freeze(variables):
        return FrozenTeachers(teachers).freeze(variables)

    return traced.Program(
        traced_for(platform, freeze),
        ("freeze", teachers, topology, platform),
        out_shardings=topology.replicated,
        compiler_options=run_once(platform),
    )


def first_terms(
    stages: Sequence[Stage],
    state: TrainState,
    teacher_variables: tuple[Variables, ...],
    split: data.Split,
    taught: TeacherOutputs,
    dataset: data.Dataset,
) -> dict[str, tuple[dict[str, tuple[Array, Array]], Array]]:
    """`preflight.term_gradients` of untrained networks on the images and labels of `split`.

    Beside them the size of a step, in steps of the cross-entropy alone; by network.

    Args:
      stages: one, or those of a cycle.
      state: before the first step.
      teacher_variables: of their frozen teachers, see `frozen_teachers`.
      split: a batch.
      taught: the frozen teachers' outputs on it.
      dataset: gives the preprocessing.
    """
    needs = data_needs_of(stages)
    seen = Recipe(augment=stages[0].recipe.augment if "view" in needs else "none")
    structures = tuple(dataclasses.replace(s.structure, recipe=seen) for s in stages)
    program = _terms_program(structures, dataset.preprocessing, backend())
    images = jax.tree.map(np.asarray, split.images)
    partners = None
    if "partner" in needs:
        partners = data.take(images, data.partners(split.labels, seed=0, epoch=0))
    return program(
        *jax.device_get((state, teacher_variables)),
        images,
        partners,
        split.labels,
        taught._replace(logits=taught.logits.swapaxes(0, 1)),
        {stage.network.name: stage.hyper for stage in stages},
    )


@functools.lru_cache(maxsize=32)
def _terms_program(stages, preprocessing, platform):
    teachers = frozen_teachers(stages)
    frozen = FrozenTeachers(teachers)
    students = [_student(stage, teachers) for stage in stages]
    methods = tuple(pair for student in students for pair in student.methods)

    def first_terms(state, teacher_variables, raw, raw_partners, labels, taught, hyper):
        inputs = preprocessing.evaluate(raw)
        taught_by = frozen_shown(frozen, taught, teacher_variables, methods)
        context = untrained.first_context(inputs, labels)
        asked, besides = data_needs(methods), {}
        if "view" in asked:
            keys = rng.per_example(jax.random.key(untrained.KEY), context.position)
            besides["view"] = preprocessing.train(stages[0].recipe.augment, keys, raw)
        if "partner" in asked:
            besides["partner"] = preprocessing.evaluate(raw_partners)

        def live_of(student):
            own = data_needs(student.methods)
            others = {need: x for need, x in besides.items() if need in own}
            variables = state.variables(student.name)
            return untrained.live(student.network, variables, inputs, others)

        live = {student.name: live_of(student) for student in students}

        def sizes_of(student):
            own = live[student.name]

            def terms_by(shown):
                return student_terms(
                    student,
                    state.method_variables(student.name),
                    dataclasses.replace(context, hyper=hyper[student.name]),
                    taught_by,
                    {**live, student.name: shown},
                    None,
                    untrained.key_of,
                )[0]

            def terms_of(outputs, others, *asked):
                # What methods ask on other inputs is moved by zeros, by which there is a gradient.
                moves = iter(asked)

                def apply(params, inputs):
                    return jax.tree.map(jnp.add, own.apply(params, inputs), next(moves))

                return terms_by(own._replace(outputs=outputs, apply=apply, others=others))

            outputs = own.outputs, own.others, *_zeros_of_asked(terms_by, own)
            whole = preflight.gradient_norm(lambda *x: total(terms_of(*x)), *outputs)
            labels_alone = preflight.gradient_norm(
                lambda x: jnp.mean(cross_entropy(x.logits, labels)), own.outputs
            )
            return preflight.term_gradients(terms_of, *outputs), whole / labels_alone

        return {student.name: sizes_of(student) for student in students}

    key = ("terms", stages, preprocessing, platform)
    return traced.Program(first_terms, key, compiler_options=run_once(platform))


def _zeros_of_asked(terms_by: Callable[[Live], Any], own: Live) -> list[Any]:
    """Zeros like the outputs that methods ask of a network on other inputs, in their order."""
    asked: list[Any] = []

    def noted(params, inputs):
        shown = own.apply(params, inputs)
        asked.append(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shown))
        return shown

    jax.eval_shape(lambda: terms_by(own._replace(apply=noted)))
    return [metrics.zeros_like(shapes) for shapes in asked]
