"""The library's train loops with shapes in the place of arrays, compiled for devices not here."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax import data, models
from distill_jax.models.backend import traced_for
from distill_jax.train import programs, sharding
from distill_jax.train.options import cache_shapes
from distill_jax.train.state import DeviceDataset
from distill_jax.train.step import init_state
from distill_jax.train.teachers import FrozenTeachers
from experiments.benchmark import cases, flops
from experiments.benchmark.cases import Case
from experiments.benchmark.jax_steps import stage_of
from experiments.compiled.hlo import Program
from experiments.compiled.targets import Absent

Shape = jax.ShapeDtypeStruct
STEPS = 8  # of an epoch
IMAGENET = (1000, (224, 224, 3))  # classes and shape of images
MEMBERS = (True, True, True, None, True, False, False, True, True)  # has an axis of them


def lowered(case: Case, devices: tuple[Any, ...]) -> jax.stages.Lowered:
    """The train loop of a case for as many of `devices` as it says, before XLA has seen it."""
    topology = Absent(devices=case.devices, target=devices[: case.devices])
    classes, image_shape = _examples_of(case)
    *teachers, network = _built(case, (*case.teachers, case.student))
    stage = stage_of(case, network, tuple(teachers))
    examples = STEPS * case.batch
    few = (np.zeros((8, *image_shape), np.uint8), np.arange(8, dtype=np.int32))
    about = data.from_arrays(
        few, few, classes=classes, mean=cases.MEAN, std=cases.STD, valid_fraction=0.0
    )
    shared = True if case.members > 1 else None
    program = programs.train_program((stage,), STEPS, about, topology, shared_data=shared)

    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key: init_state(network, stage.recipe.optim, key), key)
    hyper = jax.eval_shape(lambda: {network.name: stage.hyper})
    cached, frozen = None, ()
    if case.variant == "table":
        cached = cache_shapes((stage,), examples)
    else:
        freeze = traced_for(topology.backend, FrozenTeachers(tuple(teachers)).freeze)
        frozen = jax.eval_shape(freeze, tuple(teacher.shapes for teacher in teachers))
    sums = programs.zero_sums(
        program.body,
        *(state, frozen, hyper, key),
        batch_size=case.batch,
        spec=about.spec,
        cached=cached,
        where=None,
    )
    images = Shape((examples, *image_shape), jnp.uint8)
    dataset = jax.eval_shape(topology.hold, DeviceDataset(images, None))
    dataset = dataset._replace(labels=Shape((examples,), jnp.int32), teachers=cached)
    order, at = Shape((STEPS, case.batch), jnp.int32), Shape((), jnp.int32)
    arguments = (state, sums, frozen, dataset, order, at, at, hyper, key)
    return program.loop.lower(*_placed(arguments, case.members, topology))


def _placed(arguments: tuple[Any, ...], members: int, topology: sharding.Topology) -> list[Any]:
    """The shapes, on the devices; those of a population with its axis."""
    whole = topology.replicated
    if members == 1:
        return [_on(tree, whole) for tree in arguments]
    spread = NamedSharding(topology.mesh, PartitionSpec(sharding.AXIS))

    def one(tree, has_axis):
        return _on(tree, spread, members) if has_axis else _on(tree, whole)

    dataset = arguments[3]
    placed = [one(tree, axis) for tree, axis in zip(arguments, MEMBERS, strict=True)]
    placed[3] = DeviceDataset(
        *(one(x, False) for x in dataset[:2]), teachers=one(dataset.teachers, True)
    )
    return placed


def _on(tree: Any, where: NamedSharding, members: int = 0) -> Any:
    def shape(x):
        return Shape((members, *x.shape) if members else x.shape, x.dtype, sharding=where)

    return jax.tree.map(shape, tree)


def program(compiled: jax.stages.Compiled) -> Program:
    """Its HLO."""
    return Program(compiled.as_text())


def flops_of(case: Case) -> float:
    """Operations of a step on one device, by the networks' layers."""
    names = (case.student, *(() if case.variant == "table" else case.teachers))
    network, *teachers = _built(case, names)
    return flops.step(network, tuple(teachers), case.batch) * case.members / case.devices


def _built(case: Case, names: tuple[str, ...]) -> list[models.Network]:
    return [models.build(name, *_examples_of(case), case.dtype) for name in names]


def _examples_of(case: Case) -> tuple[int, tuple[int, int, int]]:
    """Classes and shape of the images that a case's networks are for."""
    if case.student.startswith("imagenet_"):
        return IMAGENET
    return cases.CLASSES, cases.IMAGE_SHAPE
