"""What is known of one network: before its first step, and when it is trained or was given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from distill_jax import data, models
from distill_jax.evals import classification
from distill_jax.evals.metrics import combined, measure
from distill_jax.identity import digest
from distill_jax.models import LogitsTable, Network, Variables
from distill_jax.train import inference, preflight, programs, sharding
from distill_jax.train.checks import view_warnings
from distill_jax.train.metrics import accuracy_names
from distill_jax.train.stage import Stage, frozen_teachers, needs_of
from distill_jax.train.stage_methods import method_warnings
from distill_jax.train.state import TrainState

PREFLIGHT_IMAGES = 64  # of the batch on which the terms of the loss are computed


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What a stage gives.

    Of a network with branches only the backbone's weights stay, those of `Network.backbone`.

    Args:
      variables: the selected weights, to deploy and to teach with.
      history: one dict an epoch.
      record: accuracies, and what else is known of the stage.
      whole: of a phase, what the next one starts from: {"network": variables, branches included,
        "methods": {method: variables}}; empty of any other stage.
      logits: (N, C) as a teacher by split, computed once for all students.
    """

    variables: Variables
    history: list[dict[str, Any]]
    record: dict[str, Any]
    whole: dict[str, Any] = dataclasses.field(default_factory=dict)
    logits: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def cached_teacher_logits(
    networks: tuple[Network, ...],
    teachers: tuple[StageResult, ...],
    part: str,
    dataset: data.Dataset,
    topology: sharding.Topology,
) -> np.ndarray:
    """(N, K, C) logits of frozen teachers for the "valid", "test" or "train" split.

    On the first two a teacher is run once, however many stages it teaches; training images may be
    others in each.
    """
    pairs = list(zip(networks, teachers, strict=True))
    if part == "train":
        places = dataset.places.get("train", slice(None))
        return frozen_outputs(
            dict(pairs),
            dataset.train,
            dataset,
            topology,
            (),
            lambda result: result.logits["train"][places],
        ).logits
    missing = [(network, result) for network, result in pairs if part not in result.logits]
    split = getattr(dataset, part)
    variables = [(network, result.variables) for network, result in missing]
    logits = inference.teacher_outputs(variables, split, dataset, topology).logits
    for k, (_, result) in enumerate(missing):
        result.logits[part] = logits[:, k]
    empty = np.zeros((len(split.labels), 0, dataset.classes), np.float32)
    return np.concatenate([empty, *(result.logits[part][:, None] for result in teachers)], 1)


def frozen_outputs(
    teachers: Mapping[Network, StageResult],
    split: data.Split,
    dataset: data.Dataset,
    topology: sharding.Topology,
    needs: tuple[str, ...],
    known: Callable[[StageResult], np.ndarray],
) -> inference.TeacherOutputs:
    """What frozen teachers give for a split: they are run, but for files of logits, which are read.

    Args:
      teachers: the results, by network.
      split: the examples.
      dataset: gives the preprocessing.
      topology: the devices that share the examples.
      needs: the outputs that are asked for besides the logits, of those that are run.
      known: the rows (N, C) of a file of logits.
    """
    run = [(n, x.variables) for n, x in teachers.items() if not isinstance(n, LogitsTable)]
    outputs = inference.teacher_outputs(run, split, dataset, topology, needs)
    if len(run) == len(teachers):
        return outputs
    logits, features = iter(outputs.logits.swapaxes(0, 1)), iter(outputs.features)
    columns, others = [], []
    for network, result in teachers.items():
        table = isinstance(network, LogitsTable)
        columns.append(known(result) if table else next(logits))
        nothing = {name: getattr(network.output_shapes, name) for name in needs if table}
        others.append(nothing if table else next(features))
    return inference.TeacherOutputs(np.stack(columns, 1), tuple(others))


def run_preflight(
    stages: Sequence[Stage],
    teachers: Mapping[Network, StageResult],
    state: TrainState,
    dataset: data.Dataset,
    topology: sharding.Topology,
    plain_accuracies: Sequence[float | None],
) -> list[preflight.Preflight]:
    """The teachers on the validation split, and the terms of each loss on one batch of it.

    Args:
      stages: one, or those of a cycle.
      teachers: the results of all their frozen teachers.
      state: before the first step.
      dataset: with its training split as the stages see it.
      topology: see `inference.outputs_on_split`.
      plain_accuracies: of each stage, see `preflight.warnings`.
    """
    part = "valid" if len(dataset.valid.labels) else "train"
    networks, whole = frozen_teachers(stages), getattr(dataset, part)
    results = tuple(teachers[network] for network in networks)
    split: Any = next(inference.pieces(whole, dataset.classes))
    if split is whole:
        logits = cached_teacher_logits(networks, results, part, dataset, topology)
    else:  # the first of so many classes say enough
        logits = frozen_outputs(
            dict(zip(networks, results, strict=True)),
            split,
            dataset,
            topology,
            (),
            lambda result: result.logits[part][: len(split.labels)],
        ).logits
    first = slice(PREFLIGHT_IMAGES)
    batch = data.Split(data.take(split.images, first), split.labels[first])
    taught = inference.TeacherOutputs(logits[:PREFLIGHT_IMAGES])
    variables = tuple(result.variables for result in results)
    if needs := needs_of(stages):
        taught = frozen_outputs(
            dict(zip(networks, results, strict=True)),
            batch,
            dataset,
            topology,
            needs,
            lambda result: result.logits[part][first],
        )
    sizes = programs.first_terms(stages, state, variables, batch, taught, dataset)
    where = "validation" if part == "valid" else "training images"
    logits_of = dict(zip(networks, logits.swapaxes(0, 1), strict=True))
    reports = []
    for stage, plain_accuracy in zip(stages, plain_accuracies, strict=True):
        names = tuple(network.name for network in stage.teachers)
        own = [logits_of[network] for network in stage.teachers]
        quality = preflight.teacher_quality(names, own, split.labels)
        own_terms, ratio = sizes[stage.network.name]
        terms, step = preflight.term_sizes(own_terms), float(ratio)
        rate = stage.recipe.optim.learning_rate
        warnings = method_warnings(stage, dataset.train.labels)
        warnings += view_warnings(stage, dataset)
        warnings += preflight.warnings(quality, terms, plain_accuracy, step, rate)
        reports.append(preflight.Preflight(quality, terms, warnings, where, step))
    return reports


def score(
    stage: Stage,
    teachers: tuple[StageResult, ...],
    best: Variables,
    last: Variables,
    dataset: data.Dataset,
    topology: sharding.Topology,
) -> tuple[Variables, dict[str, Any]]:
    """Scores the test set with a stage's best and last weights, once each; once if they are one.

    Returns:
      The weights to deploy, and for the record: accuracies (those of the branches too), calibration
      error and its bins, agreement with each teacher and KL from it.
    """
    weights = [best] if last is best else [best, last]
    pairs = [(stage.network, variables) for variables in weights]
    scored, bins, examples, exits = [], [], 0, 1
    names = [network.name for network in stage.teachers]
    for piece in inference.pieces(dataset.test, dataset.classes):
        if isinstance(stage.network, LogitsTable):
            logits = [best["logits"]["test"][None, examples : examples + len(piece.labels)]]
        else:
            logits = inference.predict_logits(pairs, piece, dataset, topology)
        taught = _teachers_on(piece, examples, stage, teachers, dataset, topology)
        own, newest, count = logits[0], logits[-1][0], float(len(piece.labels))
        exits = len(own)
        means = {"last": classification.accuracy(newest, piece.labels)}
        for k, name in enumerate(names):
            means[f"agreement {name}"] = classification.agreement(own[0], taught[:, k])
            means[f"kl {name}"] = classification.kl(taught[:, k], own[0])
        weighed = {name: (value, count) for name, value in means.items()}
        scored.append(inference.measured(own, piece, dataset) | weighed)
        bins.append(classification.reliability(own[0], piece.labels))
        examples += len(piece.labels)
    measured = combined(scored)
    deployed = models.deploy(stage.network, jax.device_get(best))
    reliability = classification.added(bins)
    record = {
        "parameters": _size(deployed),
        **{f"test_{name}": measured[name] for name in (*accuracy_names(exits), *dataset.metrics)},
        "last_test_accuracy": measured["last"],
        "ece": classification.error_of(reliability, examples),
        "reliability": reliability,
    }
    for what in ("agreement", "kl"):
        record[what] = {name: measured[f"{what} {name}"] for name in names}
    return deployed, record


def _teachers_on(
    piece: Any,
    start: int,
    stage: Stage,
    teachers: tuple[StageResult, ...],
    dataset: data.Dataset,
    topology: sharding.Topology,
) -> np.ndarray:
    """(n, K, C) logits of a stage's teachers on a piece of the test split; of all of it kept."""
    if piece is dataset.test:
        return cached_teacher_logits(stage.teachers, teachers, "test", dataset, topology)
    return frozen_outputs(
        dict(zip(stage.teachers, teachers, strict=True)),
        piece,
        dataset,
        topology,
        (),
        lambda result: result.logits["test"][start : start + len(piece.labels)],
    ).logits


def evaluate_pretrained(
    stage: Stage, dataset: data.Dataset, variables: Variables, topology: sharding.Topology
) -> StageResult:
    """A network that comes with its weights: evaluated once, trained never.

    Of a network with branches these are the backbone's.
    """
    alone = dataclasses.replace(stage, network=stage.network.backbone, teachers=())
    _, scored = score(alone, (), variables, variables, dataset, topology)
    metrics: dict[str, Any] = {}
    known = variables["logits"] if isinstance(alone.network, LogitsTable) else {}
    if known and len(dataset.valid.labels):
        metrics = combined([inference.measured(known["valid"][None], dataset.valid, dataset)])
    elif len(dataset.valid.labels):
        pairs = [(alone.network, variables)]
        (metrics,) = inference.evaluate(pairs, dataset.valid, dataset, topology)
    record = {
        **scored,
        **valid_metrics({f"valid_{name}": value for name, value in metrics.items()}, dataset),
        "best_epoch": 0,
        "epochs": 0,
        "seconds": 0.0,
        "state_digest": digest(variables),
    }
    own = {"params": {}} if known else variables
    return StageResult(own, [], record, logits=dict(known))


def chance_warning(stage: Stage, result: StageResult, dataset: data.Dataset) -> list[str]:
    """A line where given weights know no more than chance, as those of another task do."""
    accuracy, labels = result.record["test_accuracy"], dataset.test.labels
    # Three standard errors above always naming the commonest class.
    chance = np.bincount(labels, minlength=dataset.classes).max() / len(labels)
    if accuracy > chance + 3 * np.sqrt(chance * (1 - chance) / len(labels)):
        return []
    return [
        f"  warning: {stage.network.name} with the weights of {stage.file} is right on "
        f"{100 * accuracy:.2f} % of the test set, no more than chance ({100 * chance:.2f} %): were "
        "they trained on these classes, in this order, and on images normalised like these?"
    ]


def valid_metrics(evaluated: dict[str, Any], dataset: data.Dataset) -> dict[str, float | None]:
    """Accuracy and the data set's metrics on the validation split, of an epoch's record."""
    names = (f"valid_{name}" for name in ("accuracy", *dataset.metrics))
    return {name: evaluated.get(name) for name in names}


def with_metrics(
    stage: Stage, result: StageResult, dataset: data.Dataset, topology: sharding.Topology
) -> StageResult:
    """A finished stage's result with the metrics that were not asked for when it was trained."""
    missing = {k: m for k, m in dataset.metrics.items() if f"test_{k}" not in result.record}
    pairs, record = [(stage.network.backbone, result.variables)], dict(result.record)
    for part in ("valid", "test") if missing else ():
        split = getattr(dataset, part)
        if part == "test" or record["valid_accuracy"] is not None:
            measured = []
            for piece in inference.pieces(split, dataset.classes):
                ((logits, *_),) = inference.predict_logits(pairs, piece, dataset, topology)
                measured.append(measure(missing, logits, piece.labels, piece.images))
            record |= {f"{part}_{name}": value for name, value in combined(measured).items()}
    return dataclasses.replace(result, record=record)


def _size(variables: Variables) -> int:
    return sum(x.size for x in jax.tree.leaves(variables["params"]))
