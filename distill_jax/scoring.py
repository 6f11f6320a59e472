"""What is said of one network: before its first step, and when it is trained or was given."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from distill_jax import data, fidelity, models, preflight, programs
from distill_jax.checkpoint import digest
from distill_jax.models import Variables
from distill_jax.recipe import Job


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
    plain_accuracy: float | None,
) -> preflight.Preflight:
    """The teachers on the validation split, and the terms of the loss on one batch of it.

    Args:
      job: the stage.
      frozen: the variables of its teachers.
      fresh: the student's own, before its first step.
      dataset: with its training split as the stage sees it.
      plain_accuracy: see `preflight.worry`.
    """
    split = dataset.valid if len(dataset.valid.labels) else dataset.train
    logits = programs.teach(job.teachers, frozen, split, dataset)
    some = slice(0, programs.EVAL_BATCH)
    images, labels = np.asarray(split.images[some]), np.asarray(split.labels[some])
    program = programs.terms_program(job.network, job.recipe.structure, dataset.mean, dataset.std)
    found = program(jax.device_get(fresh), images, labels, logits[:, some], job.recipe.hyper)
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
) -> tuple[Variables, dict[str, Any]]:
    """Scores the test set with a stage's best and last weights, once each; once if they are one.

    Returns:
      The weights to deploy, and for the record: accuracies (those of the branches too), calibration
      error, agreement with each teacher and KL from it.
    """
    same = last is best
    best, last = jax.device_get((best, last))
    deployed, labels = models.deploy(job.network, best), dataset.test.labels
    own, *branches = programs.predict(job.network, best, dataset.test, dataset)
    final = own if same else programs.predict(job.network, last, dataset.test, dataset)[0]
    record = {
        "parameters": _size(deployed),
        "test_accuracy": fidelity.accuracy(own, labels),
        **{
            f"test_branch{i}_accuracy": fidelity.accuracy(logits, labels)
            for i, logits in enumerate(branches, 1)
        },
        "last_test_accuracy": fidelity.accuracy(final, labels),
        "ece": fidelity.expected_calibration_error(own, labels),
    }
    agreement, kl = {}, {}
    said = programs.teach(job.teachers, frozen, dataset.test, dataset)
    for network, theirs in zip(job.teachers, said, strict=True):
        agreement[network.name] = fidelity.agreement(own, theirs)
        kl[network.name] = fidelity.kl(theirs, own)
    return deployed, {**record, "agreement": agreement, "kl": kl}


def adopt(job: Job, dataset: data.Dataset, variables: Variables) -> Trained:
    """A network that comes with its weights: evaluated once, trained never."""
    _, scored = score(dataclasses.replace(job, teachers=()), (), variables, variables, dataset)
    valid = dataset.valid
    accuracy = None
    if len(valid.labels):
        logits = programs.predict(job.network, variables, valid, dataset)[0]
        accuracy = fidelity.accuracy(logits, valid.labels)
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
