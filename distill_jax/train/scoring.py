"""What is said of one network: before its first step, and when it is trained or was given."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from distill_jax import data, models
from distill_jax.evals import classification
from distill_jax.identity import digest
from distill_jax.models import Variables
from distill_jax.train import preflight, programs, sharding
from distill_jax.train.recipe import Job
from distill_jax.train.step import accuracy_names

LOOKED_AT = 64  # images of the batch on which the terms of the loss are looked at


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a stage gives: the selected weights, its history (one dict an epoch) and its record.

    Of an evolving network only the backbone's weights stay, those of `Network.backbone`. What it
    says as a teacher of the validation and test split, (N, C) logits, is kept for all students.
    """

    variables: Variables
    history: list[dict[str, Any]]
    record: dict[str, Any]
    said: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def what_teachers_say(
    job: Job,
    teachers: tuple[Trained, ...],
    part: str,
    dataset: data.Dataset,
    topology: sharding.Topology,
) -> np.ndarray:
    """(K, N, C) logits of the teachers of a stage for the "train", "valid" or "test" split.

    A teacher is asked about the last two once, however many stages it teaches; training images may
    be others in each.
    """
    pairs = list(zip(job.teachers, teachers, strict=True))
    unasked = [(network, trained) for network, trained in pairs if part not in trained.said]
    asked = [(network, trained.variables) for network, trained in unasked]
    split = getattr(dataset, part)
    answers = programs.teach(asked, split, dataset, topology)
    if part == "train":
        return answers
    for (_, trained), logits in zip(unasked, answers, strict=True):
        trained.said[part] = logits
    return np.concatenate([answers[:0], *(trained.said[part][None] for trained in teachers)])


def look_before(
    job: Job,
    teachers: tuple[Trained, ...],
    fresh: Variables,
    dataset: data.Dataset,
    topology: sharding.Topology,
    plain_accuracy: float | None,
) -> preflight.Preflight:
    """The teachers on the validation split, and the terms of the loss on one batch of it.

    Args:
      job: the stage.
      teachers: those of the stage.
      fresh: the student's own, before its first step.
      dataset: with its training split as the stage sees it.
      topology: see `programs.predict`.
      plain_accuracy: see `preflight.worry`.
    """
    part = "valid" if len(dataset.valid.labels) else "train"
    split = getattr(dataset, part)
    logits = what_teachers_say(job, teachers, part, dataset, topology)
    batch = data.Split(split.images[:LOOKED_AT], split.labels[:LOOKED_AT])
    found = programs.terms(job.network, job.recipe, fresh, batch, logits[:, :LOOKED_AT], dataset)
    looked = preflight.look_at_teachers(
        tuple(network.name for network in job.teachers), list(logits), split.labels
    )
    terms = preflight.look_at_terms(found)
    warnings = preflight.worry(looked, terms, plain_accuracy)
    where = "validation" if part == "valid" else "training images"
    return preflight.Preflight(looked, terms, warnings, where)


def score(
    job: Job,
    teachers: tuple[Trained, ...],
    best: Variables,
    last: Variables,
    dataset: data.Dataset,
    topology: sharding.Topology,
) -> tuple[Variables, dict[str, Any]]:
    """Scores the test set with a stage's best and last weights, once each; once if they are one.

    Returns:
      The weights to deploy, and for the record: accuracies (those of the branches too), calibration
      error, agreement with each teacher and KL from it.
    """
    weights = [best] if last is best else [best, last]
    asked = [(job.network, variables) for variables in weights]
    answers = programs.predict(asked, dataset.test, dataset, topology)
    own, newest = answers[0], answers[-1]
    labels, deployed = dataset.test.labels, models.deploy(job.network, jax.device_get(best))
    found = programs.measure(own, labels)
    record = {
        "parameters": _size(deployed),
        **{f"test_{name}": found[name] for name in accuracy_names(len(own))},
        "last_test_accuracy": classification.accuracy(newest[0], labels),
        "ece": classification.expected_calibration_error(own[0], labels),
    }
    agreement, kl = {}, {}
    said = what_teachers_say(job, teachers, "test", dataset, topology)
    for network, theirs in zip(job.teachers, said, strict=True):
        agreement[network.name] = classification.agreement(own[0], theirs)
        kl[network.name] = classification.kl(theirs, own[0])
    return deployed, {**record, "agreement": agreement, "kl": kl}


def adopt(
    job: Job, dataset: data.Dataset, variables: Variables, topology: sharding.Topology
) -> Trained:
    """A network that comes with its weights: evaluated once, trained never."""
    alone = dataclasses.replace(job, teachers=())
    _, scored = score(alone, (), variables, variables, dataset, topology)
    accuracy = None
    if len(dataset.valid.labels):
        found = programs.evaluate(job.network, variables, dataset.valid, dataset, topology)
        accuracy = found["accuracy"]
    record = {
        **scored,
        "valid_accuracy": accuracy,
        "best_epoch": 0,
        "epochs": 0,
        "seconds": 0.0,
        "state_digest": digest(variables),
    }
    return Trained(variables, [], record)


def _size(variables: Variables) -> int:
    return sum(x.size for x in jax.tree.leaves(variables["params"]))
