"""What is compiled, once for all stages that share it: training, and the logits of a split."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from distill_jax import data, models
from distill_jax.evals import classification
from distill_jax.models import Network, Variables, run_once
from distill_jax.train import metrics, optim, preflight, sharding
from distill_jax.train.recipe import Recipe
from distill_jax.train.step import (
    Batch,
    Hyper,
    Objective,
    TrainState,
    TrainStep,
    accuracy_names,
    draw_from,
    evolving_objective,
    make_train_step,
    multi_teacher_objective,
)
from distill_jax.train.teachers import Frozen, Prepared, exit_logits

PART = {"cpu": 64, "gpu": 256}  # images that a device takes at once; the last of them fill up
DISPATCH_BYTES = 2**23  # of images, about, that are asked about in one dispatch


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
        loop = sharding.population_loop(body, topology, shared_data=shared_data)
    else:
        each = body if topology.axis_name is None else step(topology.axis_name)
        loop = sharding.train_loop(each, topology)
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
        teacher_logits=per_example(*table, dtype=jnp.float32, where=where) if table else None,
    )
    return metrics.zeros_like(jax.eval_shape(body, state, frozen, batch, hyper, key)[1])


def prepare(
    teachers: tuple[Network, ...], variables: Sequence[Variables], topology: sharding.Topology
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


def predict(
    asked: Sequence[tuple[Network, Variables]],
    split: data.Split | Placed,
    dataset: data.Dataset,
    topology: sharding.Topology = sharding.Topology(),
) -> list[np.ndarray]:
    """What each network says of a whole split: (E, N, C) float32, its own logits and its branches'.

    Args:
      asked: the networks, each with its variables; streamed images are decoded once for all.
      split: images and labels, or what `place` made of them.
      dataset: gives the normalisation.
      topology: the devices that share the images.
    """
    programs = [
        _logits_program(network, dataset.mean, dataset.std, topology) for network, _ in asked
    ]
    placed = [topology.place(variables) for _, variables in asked]
    found: list[list[np.ndarray]] = [[] for _ in asked]
    for images, parts in split.parts if isinstance(split, Placed) else _in_parts(split, topology):
        for program, variables, logits in zip(programs, placed, found, strict=True):
            logits.append(np.asarray(program(variables, images, np.int32(parts)))[:parts])
    n = len(split.labels)
    # (P, E, B, C) of each dispatch -> (E, N, C); what filled up the last part is cut off.
    return [
        np.concatenate([np.concatenate(part, 1) for part in logits], 1)[:, :n] for logits in found
    ]


def teach(
    asked: Sequence[tuple[Network, Variables]],
    split: data.Split,
    dataset: data.Dataset,
    topology: sharding.Topology = sharding.Topology(),
) -> np.ndarray:
    """As `predict`, the networks' own logits alone: (K, N, C), of no network too."""
    empty = np.zeros((0, len(split.labels), dataset.classes), np.float32)
    return np.concatenate([empty, *(x[:1] for x in predict(asked, split, dataset, topology))])


class Placed(NamedTuple):
    """A split on the devices, to be asked about more than once."""

    parts: list[tuple[Array, int]]
    labels: np.ndarray


def place(split: data.Split, topology: sharding.Topology) -> data.Split | Placed:
    """The split as `predict` takes it at once; streamed images stay where they are."""
    if isinstance(split.images, data.Streamed):
        return split
    return Placed(list(_in_parts(split, topology)), split.labels)


def _in_parts(split: data.Split, topology: sharding.Topology) -> Iterator[tuple[Array, int]]:
    """Images (P, B, H, W, channels) shared by the devices, and how many of the P parts are any."""
    if not len(split.labels):
        return
    shape = split.images.shape[1:]
    batch = topology.count * PART.get(jax.default_backend(), PART["gpu"])
    size = batch * max(1, DISPATCH_BYTES // (batch * math.prod(shape)))
    for start, images in enumerate(data.parts(split.images, size)):
        parts = -(-min(size, len(split.labels) - start * size) // batch)
        placed = jax.device_put(images.reshape(-1, batch, *shape), topology.shared_parts)
        yield placed, parts


@functools.lru_cache(maxsize=32)
def _logits_program(network, mean, std, topology):
    def freeze(variables):
        return network.freeze(variables)

    def logits_of(frozen, images):
        return exit_logits(network, frozen, data.normalise(images, mean, std))

    return sharding.logits_loop(freeze, logits_of, topology)


def evaluate(
    network: Network,
    variables: Variables,
    split: data.Split | Placed,
    dataset: data.Dataset,
    topology: sharding.Topology = sharding.Topology(),
) -> dict[str, float]:
    """Accuracies, the branches' too, and cross-entropy over a whole split; see `predict`."""
    (logits,) = predict([(network, variables)], split, dataset, topology)
    return measure(logits, split.labels)


def measure(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The accuracy of each exit, and the cross-entropy of the first; logits (E, N, C)."""
    names = accuracy_names(len(logits))
    found = {k: classification.accuracy(x, labels) for k, x in zip(names, logits, strict=True)}
    return {**found, "loss": classification.cross_entropy(logits[0], labels)}


def terms(
    network: Network,
    recipe: Recipe,
    variables: Variables,
    split: data.Split,
    teacher_logits: np.ndarray,
    dataset: data.Dataset,
) -> dict[str, tuple[Array, Array]]:
    """`preflight.weighted_terms` of an untrained network on the images and labels of `split`."""
    program = _terms_program(
        network, recipe.structure, dataset.mean, dataset.std, jax.default_backend()
    )
    told = np.asarray(split.images), split.labels, teacher_logits, recipe.hyper
    return program(jax.device_get(variables), *told)


@functools.lru_cache(maxsize=32)
def _terms_program(network, structure, mean, std, backend):
    objective = objective_of(network, structure)

    def first_terms(variables, images, labels, teacher_logits, hyper):
        # By the batch's own statistics: an untrained network has no others.
        outputs = network.apply(variables, data.normalise(images, mean, std), train=True)[0]
        return preflight.weighted_terms(objective, outputs, labels, teacher_logits, hyper)

    return jax.jit(first_terms, compiler_options=run_once(backend))
