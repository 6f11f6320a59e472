"""Which stages an experiment needs, each under the address of all that determines it.

An address is a digest of content, that of the stage's teachers included: stages of different
guidances or of earlier runs that agree in all of it are one stage.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from distill_jax import data, graph, models
from distill_jax.identity import digest_json
from distill_jax.interop.files import read_bytes
from distill_jax.interop.torch_weights import WeightsError
from distill_jax.runs.config import Experiment, Row
from distill_jax.train.recipe import Job

FORMAT = 1  # of the addresses: raised when the same values come to mean another training


@dataclasses.dataclass(frozen=True)
class Planned:
    """Jobs in the order of training, and which of them answers which question."""

    jobs: dict[str, Job]
    teachers: dict[str, tuple[str, ...]]  # address -> its teachers' addresses
    asked: dict[tuple[str, str, int], str]  # (label, network, seed) -> address
    plain: dict[str, str]  # address -> that of the same network trained alone by the same recipe
    about: dict[str, dict[str, Any]]  # address -> what it is the digest of


def make_plan(experiment: Experiment, dataset: data.Dataset, about_data: str) -> Planned:
    """The stages of an experiment, each once, teachers before those whom they teach.

    Args:
      experiment: what is asked for.
      dataset: on what.
      about_data: see `identity_of`.

    Raises:
      ValueError: a network cannot be built for these images, or given weights cannot be read.
    """
    plan = Planned({}, {}, {}, {}, {})
    given = experiment.teacher_weights
    for seed in experiment.seeds:
        for row in experiment.rows:
            addresses: dict[str, str] = {}
            for stage in graph.plan(_untaught(row.guidance, given), experiment.students):
                teachers = tuple(addresses[name] for name in stage.teachers)
                job = _job(experiment, dataset, row, stage, seed)
                about = _about(job, about_data, teachers)
                address = _digest(about)
                plan.about[address] = about
                plan.plain[address] = _digest(_about(job, about_data, ()))
                addresses[stage.network] = address
                plan.jobs[address] = dataclasses.replace(job, address=address)
                plan.teachers[address] = teachers
            for student in experiment.students:
                plan.asked[row.label, student, seed] = addresses[student]
    return plan


def _untaught(row: graph.Guidance, names: Mapping[str, Any]) -> graph.Guidance:
    """The guidance in which nobody teaches `names`: their weights are given."""
    teachers = zip(row.names, row.teachers, strict=True)
    return graph.Guidance(
        row.names, tuple(() if name in names else taught for name, taught in teachers)
    )


def _job(experiment: Experiment, dataset: data.Dataset, row: Row, stage, seed: int) -> Job:
    def build(name):
        return models.build(name, dataset.classes, dataset.image_shape, experiment.dtype)

    changes = dict(row.changes) if stage.network in experiment.students else {}
    if row.stochastic and stage.network == experiment.networks[-1]:
        changes["dropping"] = experiment.dropping
    return Job(
        network=build(stage.network),
        # An evolving network teaches as what is left of it, under the name that the row gives it.
        teachers=tuple(
            dataclasses.replace(build(name).backbone, name=name) for name in stage.teachers
        ),
        weights=experiment.teacher_weights.get(stage.network, ""),
        recipe=experiment.recipe_of(stage.network, **changes),
        seed=experiment.seed_of(stage.network, seed),
    )


def _about(job: Job, about_data: str, teachers: tuple[str, ...]) -> dict[str, Any]:
    """All that determines a stage, as JSON values; its address is their digest."""
    if job.weights:
        network = (job.network.name, job.network.dtype)
        return {"network": network, "data": about_data, "file": _file_digest(job.weights)}
    recipe = dataclasses.asdict(job.recipe)
    if not job.network.branches:
        del recipe["evolve"]
    if not teachers:  # what only concerns teachers does not make another plain training
        for name in ("temperature", "kd_weight", "survival", "loss", "dropping"):
            del recipe[name]
    elif job.recipe.dropping.kind != "bernoulli":
        del recipe["survival"]
    return {
        "network": [job.network.name, job.network.dtype],
        "data": about_data,
        "recipe": recipe,
        "seed": job.seed,
        "teachers": teachers,
    }


def _digest(about: dict[str, Any]) -> str:
    return digest_json({"format": FORMAT, **about})[:16]


def _file_digest(path: str) -> str:
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except WeightsError as error:
        raise WeightsError(f"teacher_weights cannot be read: {error}") from None


def identity_of(dataset: data.Dataset) -> str:
    """SHA-256 (hex) of all that a stage sees of a data set: splits, classes and normalisation."""
    sha = hashlib.sha256(repr((dataset.classes, dataset.mean, dataset.std)).encode())
    for split in (dataset.train, dataset.valid, dataset.test):
        for array in split:
            if isinstance(array, data.Streamed):
                sha.update(array.identity.encode())
                continue
            sha.update(repr((array.shape, array.dtype.str)).encode())
            sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()
