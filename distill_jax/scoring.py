"""What is said of one network: before its first step, and when it is trained or was given."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from distill_jax import data, fidelity, models, parallel, preflight, programs
from distill_jax.checkpoint import digest
from distill_jax.models import Variables
from distill_jax.recipe import Job
from distill_jax.step import accuracy_names

LOOKED_AT = 64  # images of the batch on which the terms of the loss are looked at


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a stage gives: the selected weights, its history (one dict an epoch) and its record.

    Of an evolving network only the backbone's weights stay, those of `Network.backbone`.
    """

    variables: Variables
    history: list[dict[str, Any]]
    record: dict[str, Any]


def look_before(
    job: Job,
    frozen: tuple[Variables, ...],
    fresh: Variables,
    dataset: data.Dataset,
    topology: parallel.Topology,
    plain_accuracy: float | None,
) -> preflight.Preflight:
    """The teachers on the validation split, and the terms of the loss on one batch of it.

    Args:
      job: the stage.
      frozen: the variables of its teachers.
      fresh: the student's own, before its first step.
      dataset: with its training split as the stage sees it.
      topology: see `programs.predict`.
      plain_accuracy: see `preflight.worry`.
    """
    split = dataset.valid if len(dataset.valid.labels) else dataset.train
    asked = list(zip(job.teachers, frozen, strict=True))
    logits = programs.teach(asked, split, dataset, topology)
    batch = data.Split(split.images[:LOOKED_AT], split.labels[:LOOKED_AT])
    found = programs.terms(job.network, job.recipe, fresh, batch, logits[:, :LOOKED_AT], dataset)
    teachers = preflight.look_at_teachers(
        tuple(network.name for network in job.teachers), list(logits), split.labels
    )
    terms = preflight.look_at_terms(found)
    warnings = preflight.worry(teachers, terms, plain_accuracy)
    where = "validation" if split is dataset.valid else "training images"
    return preflight.Preflight(teachers, terms, warnings, where)


def score(
    job: Job,
    frozen: tuple[Variables, ...],
    best: Variables,
    last: Variables,
    dataset: data.Dataset,
    topology: parallel.Topology,
) -> tuple[Variables, dict[str, Any]]:
    """Scores the test set with a stage's best and last weights, once each; once if they are one.

    Returns:
      The weights to deploy, and for the record: accuracies (those of the branches too), calibration
      error, agreement with each teacher and KL from it.
    """
    asked = [(job.network, best), *zip(job.teachers, frozen, strict=True)]
    if last is not best:
        asked.append((job.network, last))
    own, *said = programs.predict(asked, dataset.test, dataset, topology)
    newest = own if last is best else said.pop()
    labels, deployed = dataset.test.labels, models.deploy(job.network, jax.device_get(best))
    found = programs.measure(own, labels)
    record = {
        "parameters": _size(deployed),
        **{f"test_{name}": found[name] for name in accuracy_names(len(own))},
        "last_test_accuracy": fidelity.accuracy(newest[0], labels),
        "ece": fidelity.expected_calibration_error(own[0], labels),
    }
    agreement, kl = {}, {}
    for network, theirs in zip(job.teachers, said, strict=True):
        agreement[network.name] = fidelity.agreement(own[0], theirs[0])
        kl[network.name] = fidelity.kl(theirs[0], own[0])
    return deployed, {**record, "agreement": agreement, "kl": kl}


def adopt(
    job: Job, dataset: data.Dataset, variables: Variables, topology: parallel.Topology
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
