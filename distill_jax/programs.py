"""What is compiled, once for all stages that share it: training, evaluation, prediction."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from distill_jax import data, metrics, models, optim, parallel, preflight
from distill_jax.frozen import Frozen, Prepared, exit_logits
from distill_jax.models import Network, Variables, run_once
from distill_jax.recipe import Recipe
from distill_jax.step import (
    Batch,
    Hyper,
    Objective,
    Resident,
    TrainState,
    TrainStep,
    draw_from,
    evolving_objective,
    make_eval_step,
    make_train_step,
    multi_teacher_objective,
)

EVAL_BATCH = 256


def objective_of(network: models.Network, recipe: Recipe) -> Objective:
    """What a network minimises: its teachers' loss, or TESKD's where it carries branches."""
    if network.branches:
        return evolving_objective(recipe.evolve, recipe.loss)
    return multi_teacher_objective(recipe.loss)


class TrainProgram(NamedTuple):
    """A compiled train loop, and its step on one device.

    On one device the loop's step is that one: what asked it for shapes has traced it for the loop.
    """

    loop: Callable
    body: TrainStep


@functools.lru_cache(maxsize=32)
def train_program(
    network, teachers, structure, steps, mean, std, topology, *, may_skip=0, shared_data=None
) -> TrainProgram:
    """The train loop of one network; of a population where `shared_data` says how it is fed."""
    augment = data.AUGMENT[structure.augment]

    def step(axis_name):
        return make_train_step(
            network=network,
            teachers=teachers,
            optimizer=structure.optim,
            schedule=optim.schedule(structure.optim, structure.epochs, steps),
            objective=objective_of(network, structure),
            prepare=lambda keys, images: data.normalise(augment(keys, images), mean, std),
            draw_keep=draw_from(structure.dropping, len(teachers)),
            axis_name=axis_name,
            sync_bn=structure.sync_bn,
            may_skip=may_skip,
        )

    body = jax.jit(step(None))
    if shared_data is not None:
        loop = parallel.population_loop(body, topology, shared_data=shared_data)
    else:
        each = body if topology.axis_name is None else step(topology.axis_name)
        loop = parallel.train_loop(each, topology)
    return TrainProgram(loop, body)


def zero_sums(
    body: TrainStep,
    state: TrainState,
    frozen: Any,
    hyper: Hyper,
    key: Array,
    *,
    batch_size: int,
    image_shape: tuple[int, int, int],
    table: tuple[int, int] | None,
    where: jax.sharding.Sharding | None,
) -> metrics.Metrics:
    """Where the sums of a step's metrics start, by its shapes alone.

    Args:
      body: the step; traced, once for all that tell it the same.
      state: and frozen, hyper, key: what it is given.
      batch_size: and image_shape: of its batch.
      table: teachers and classes of a logit table, where the batch brings their logits.
      where: the images are, as the type of what a step is told has it.
    """

    def per_example(*shape, dtype=jnp.int32, where=None):
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=where)

    batch = Batch(
        images=per_example(*image_shape, dtype=jnp.uint8, where=where),
        labels=per_example(where=where),
        positions=per_example(),
        mask=per_example(dtype=bool),
        teacher_logits=per_example(*table, dtype=jnp.float32, where=where) if table else None,
    )
    return metrics.zeros_like(jax.eval_shape(body, state, frozen, batch, hyper, key)[1])


def prepare(
    teachers: tuple[Network, ...], variables: Sequence[Variables], topology: parallel.Topology
) -> Prepared:
    """What frozen networks make of their variables, in one program, on every device."""
    placed = topology.place(tuple(variables))
    return _prepare_program(teachers, topology, jax.default_backend())(placed)


@functools.lru_cache(maxsize=32)
def _prepare_program(teachers, topology, backend):
    def prepare_teachers(variables):
        return Frozen(teachers).prepare(variables)

    return jax.jit(
        prepare_teachers,
        out_shardings=topology.replicated,
        compiler_options=run_once(backend),
    )


@functools.lru_cache(maxsize=32)
def _eval_program(network, mean, std, topology):
    step = make_eval_step(
        network=network,
        prepare=lambda images: data.normalise(images, mean, std),
        axis_name=topology.axis_name,
    )
    return parallel.eval_loop(step, topology)


def evaluate(
    network: Network,
    variables: Variables,
    split: data.Split,
    dataset: data.Dataset,
    topology: parallel.Topology = parallel.Topology(),
) -> dict[str, float]:
    """Accuracy and cross-entropy over a whole split, every example counted once.

    Args:
      network: the network.
      variables: its variables.
      split: images and labels.
      dataset: gives the normalisation.
      topology: where to run it.
    """
    program = _eval_program(network, dataset.mean, dataset.std, topology)
    batch = -(-min(EVAL_BATCH, len(split.labels)) // topology.count) * topology.count
    sums = [
        jax.block_until_ready(
            program(variables, Resident(chunk.images, chunk.labels), chunk.order, mask)
        )
        for chunk, mask in _eval_chunks(split, batch)
    ]
    return metrics.compute(functools.reduce(metrics.merge, sums))


def _eval_chunks(split, batch):
    """Chunks that hold every example of a split, and the mask (S, B) of each."""
    order, mask = data.eval_order(len(split.labels), batch)
    for chunk in data.chunks(split, order):
        padding = len(chunk.order) - chunk.steps
        marked = mask[chunk.start : chunk.start + chunk.steps]
        yield chunk, np.pad(marked, ((0, padding), (0, 0)))


@functools.lru_cache(maxsize=32)
def _predict_program(network, mean, std):
    def predict(variables, images):
        return exit_logits(network, variables, data.normalise(images, mean, std))

    return jax.jit(predict)


def predict(
    network: Network, variables: Variables, split: data.Split, dataset: data.Dataset
) -> np.ndarray:
    """The logits of a whole split, (E, N, C) float32: the network's, then those of its branches.

    Args:
      network: the network.
      variables: its variables.
      split: images and labels, decoded part by part where they are streamed.
      dataset: gives the normalisation.
    """
    program = _predict_program(network, dataset.mean, dataset.std)
    return _over_batches(program, jax.device_put(variables), split)


@functools.lru_cache(maxsize=32)
def _teach_program(teachers, mean, std):
    def teach(frozen, images):
        return Frozen(teachers).logits(frozen, data.normalise(images, mean, std), None)

    return jax.jit(teach)


def teach(
    teachers: tuple[Network, ...],
    variables: Sequence[Variables],
    split: data.Split,
    dataset: data.Dataset,
) -> np.ndarray:
    """What frozen networks say of a whole split, (K, N, C) float32; as `predict`, but of several.

    Args:
      teachers: the networks.
      variables: of each.
      split: images and labels.
      dataset: gives the normalisation.
    """
    if not teachers:
        return np.zeros((0, len(split.labels), dataset.classes), np.float32)
    program = _teach_program(teachers, dataset.mean, dataset.std)
    return _over_batches(program, prepare(teachers, variables, parallel.Topology()), split)


def _over_batches(program: Callable, variables: Any, split: data.Split) -> np.ndarray:
    """program(variables, images) (..., N, C), batch by batch: one serves splits of every size."""
    n, logits = len(split.labels), []
    for start in range(0, n, EVAL_BATCH):
        images = np.asarray(split.images[start : start + EVAL_BATCH])
        padding = [(0, EVAL_BATCH - len(images))] + [(0, 0)] * 3
        logits.append(program(variables, np.pad(images, padding)))
    return np.concatenate(jax.device_get(logits), 1)[:, :n]


@functools.lru_cache(maxsize=32)
def terms_program(network, structure, mean, std):
    """(variables, uint8 images, labels, teachers' logits, hyper) -> `preflight.weighted_terms`."""
    objective = objective_of(network, structure)

    def first_terms(variables, images, labels, teacher_logits, hyper):
        # By the batch's own statistics: an untrained network has no others.
        outputs = network.apply(variables, data.normalise(images, mean, std), train=True)[0]
        return preflight.weighted_terms(objective, outputs, labels, teacher_logits, hyper)

    return jax.jit(first_terms)
