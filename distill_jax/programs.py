"""What is compiled, once for all stages that share it: training, evaluation, prediction."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from distill_jax import data, metrics, models, optim, parallel, preflight
from distill_jax.models import Network, Variables
from distill_jax.recipe import Recipe
from distill_jax.step import (
    Objective,
    Resident,
    TrainStep,
    draw_from,
    evolving_objective,
    make_eval_step,
    make_predict_step,
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
    step = make_predict_step(
        network=network, prepare=lambda images: data.normalise(images, mean, std)
    )
    return jax.jit(step)


def predict(
    network: Network, variables: Variables, split: data.Split, dataset: data.Dataset
) -> np.ndarray:
    """The logits of a whole split, (E, N, C) float32: the network's, then those of its branches.

    Computed batch by batch, so that one program serves splits of every size.

    Args:
      network: the network.
      variables: its variables.
      split: images and labels, decoded part by part where they are streamed.
      dataset: gives the normalisation.
    """
    n = len(split.labels)
    program = _predict_program(network, dataset.mean, dataset.std)
    variables, logits = jax.device_put(variables), []
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
