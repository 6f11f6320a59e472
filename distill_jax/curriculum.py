"""The stages in order: who is trained when, each exactly once, and the table that comes of it.

A stage is addressed by the content of all that determines it, its teachers' addresses included.
Stages of different guidances or of earlier runs that agree in all of it are one stage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax import config as config_lib
from distill_jax import data, guidance, models, parallel, report, scoring, training
from distill_jax.checkpoint import CheckpointError, Checkpoints, restore, save, write_json
from distill_jax.config import ConfigError, Experiment, Row
from distill_jax.interop.files import load_variables
from distill_jax.interop.torch_weights import WeightsError
from distill_jax.models import Network, Variables
from distill_jax.population import Asked, Means, check_table
from distill_jax.recipe import Job, check
from distill_jax.report.progress import MetricsFile, Reporter, Several
from distill_jax.scoring import Trained

FORMAT = 1  # of the addresses: raised when the same values come to mean another training


class WorkdirError(RuntimeError):
    """A working directory that cannot be used."""


@dataclasses.dataclass(frozen=True)
class Results:
    """What an experiment gives.

    Args:
      rows: one dict for each guidance, asked-for network and seed.
      networks: (guidance, network, seed) -> the network and its selected variables.
      histories: (guidance, network, seed) -> one dict an epoch.
    """

    rows: list[dict[str, Any]]
    networks: dict[tuple[str, str, int], tuple[Network, Variables]]
    histories: dict[tuple[str, str, int], list[dict[str, Any]]]

    def table(self, title: str = ""):
        """The rows as a rich table, over seeds."""
        return report.results_table(self.rows, title)


@dataclasses.dataclass(frozen=True)
class _Planned:
    """Jobs in the order of training, and which of them answers which question."""

    jobs: dict[str, Job]
    teachers: dict[str, tuple[str, ...]]  # address -> its teachers' addresses
    asked: dict[tuple[str, str, int], str]  # (label, network, seed) -> address
    plain: dict[str, str]  # address -> that of the same network trained alone by the same recipe


def run(
    config: Mapping[str, Any],
    *,
    workdir: str | Path | None = None,
    dataset: data.Dataset | None = None,
    reporter: Reporter | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Results:
    """Trains what a config asks for and has not been trained yet.

    Args:
      config: a ConfigDict, or a dict of the fields that differ from `config.default_config`.
      workdir: where stages, metrics and results are kept; None writes nothing.
      dataset: used in place of the config's.
      reporter: told of progress; None says nothing.
      stop: asked now and then; where it says true the run saves and ends.

    Raises:
      ConfigError, data.DataError: before anything is compiled.
      training.Interrupted: `stop` said so.
    """
    parallel.ask_for_cpu_devices(config.get("devices", 1))
    experiment = config_lib.resolve(config)
    if dataset is None:
        dataset = data.load(**experiment.dataset)
    try:
        plan = _plan(experiment, dataset)
        for job in plan.jobs.values():
            check(job, dataset, experiment.topology)
            check_table(job, dataset, experiment.teacher_logits)
        given = {a: load_variables(j.weights, j.network) for a, j in plan.jobs.items() if j.weights}
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with _opened(workdir) as folder:
        reporters = [reporter] if reporter else []
        if folder is not None:
            write_json(folder / "config.json", _as_json(experiment))
            reporters.append(MetricsFile(folder / "metrics.jsonl"))
        several = Several(*reporters)
        trained: dict[str, Trained] = {}
        for address, variables in given.items():  # first, so that a wrong file shows at once
            trained[address] = scoring.adopt(plan.jobs[address], dataset, variables)
            several.stage_ended(plan.jobs[address], trained[address].record)
        _train_all(plan, trained, dataset, experiment, folder, several, stop)
        results = _results(plan, trained, experiment)
        if folder is not None:
            write_json(folder / "results.json", results.rows)
    return results


def _plan(experiment: Experiment, dataset: data.Dataset) -> _Planned:
    plan = _Planned({}, {}, {}, {})
    about_data, given = _identity(dataset), experiment.teacher_weights
    for seed in experiment.seeds:
        for row in experiment.rows:
            addresses: dict[str, str] = {}
            for stage in guidance.plan(_untaught(row.guidance, given), experiment.students):
                teachers = tuple(addresses[name] for name in stage.teachers)
                job = _job(experiment, dataset, row, stage, seed)
                address = _address(job, about_data, teachers)
                plan.plain[address] = _address(job, about_data, ())
                addresses[stage.network] = address
                plan.jobs[address] = dataclasses.replace(job, address=address)
                plan.teachers[address] = teachers
            for student in experiment.students:
                plan.asked[row.label, student, seed] = addresses[student]
    return plan


def _untaught(row: guidance.Guidance, names: Mapping[str, Any]) -> guidance.Guidance:
    """The guidance in which nobody teaches `names`: their weights are given."""
    teachers = zip(row.names, row.teachers, strict=True)
    return guidance.Guidance(
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


def _address(job: Job, about_data: str, teachers: tuple[str, ...]) -> str:
    if job.weights:
        network = (job.network.name, job.network.dtype)
        return _digest({"network": network, "data": about_data, "file": _file_digest(job.weights)})
    recipe = dataclasses.asdict(job.recipe)
    if not job.network.branches:
        del recipe["evolve"]
    if not teachers:  # what only concerns teachers does not make another plain training
        for name in ("temperature", "kd_weight", "survival", "loss", "dropping"):
            del recipe[name]
    elif job.recipe.dropping.kind != "bernoulli":
        del recipe["survival"]
    about = {
        "network": [job.network.name, job.network.dtype],
        "data": about_data,
        "recipe": recipe,
        "seed": job.seed,
        "teachers": teachers,
    }
    return _digest(about)


def _digest(about: dict[str, Any]) -> str:
    text = json.dumps({"format": FORMAT, **about}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _file_digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"teacher_weights {path} cannot be read: {error}") from error


def _identity(dataset: data.Dataset) -> str:
    sha = hashlib.sha256(repr((dataset.classes, dataset.mean, dataset.std)).encode())
    for split in (dataset.train, dataset.valid, dataset.test):
        for array in split:
            if isinstance(array, data.Streamed):
                sha.update(array.identity.encode())
                continue
            sha.update(repr((array.shape, array.dtype.str)).encode())
            sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()


def _train_all(plan, trained, dataset, experiment, folder, reporter, stop) -> None:
    """Adds every stage of the plan to `trained`: found finished, or trained, several at once."""
    if folder is not None:
        for address, job in plan.jobs.items():
            if address not in trained and (found := _finished(_place(folder, job), job)):
                trained[address] = found
    means = Means(
        topology=experiment.topology,
        teacher_logits=experiment.teacher_logits,
        may_skip=experiment.may_skip,
        due=config_lib.checkpoint_due(experiment.checkpoint_every),
        reporter=reporter,
        stop=stop,
    )
    while waiting := [address for address in plan.jobs if address not in trained]:
        addresses = _next_group(plan, waiting, dataset, experiment, folder)
        asked = [_ask(plan, address, trained, folder) for address in addresses]
        for one, result in zip(asked, training.train(asked, dataset, means), strict=True):
            if folder is not None:
                _keep(folder, one.job, result)
            trained[one.job.address] = result
            reporter.stage_ended(one.job, result.record)


def _next_group(plan, waiting, dataset, experiment, folder) -> list[str]:
    """The next stage, and those that can be trained at once with it: same shape, other numbers."""

    def shape(address):
        job = plan.jobs[address]
        return job.network, job.teachers, job.recipe.structure, job.recipe.train_limit

    together = [
        address
        for address in waiting
        if shape(address) == shape(waiting[0]) and not set(plan.teachers[address]) & set(waiting)
    ]
    streamed = isinstance(dataset.train.images, data.Streamed)
    number = experiment.topology.members(len(together), 1 if streamed else experiment.population)
    group = together[:number]
    if folder is None:
        return group
    # Stages that were saved at steps of their own go on by themselves.
    saved = [set(_progress(folder, plan.jobs[address]).steps()) for address in group]
    return group if not any(saved) or set.intersection(*saved) else group[:1]


def _ask(plan, address, trained, folder) -> Asked:
    job = plan.jobs[address]
    plain = trained.get(plan.plain.get(address, ""))
    return Asked(
        job,
        tuple(trained[teacher].variables for teacher in plan.teachers[address]),
        _progress(folder, job) if folder is not None else None,
        plain.record["valid_accuracy"] if plain else None,
    )


def _place(folder: Path, job: Job) -> Path:
    return folder / "stages" / f"{job.network.name.replace(':', '-')}-{job.address}"


def _progress(folder: Path, job: Job) -> Checkpoints:
    return Checkpoints(_place(folder, job) / "progress")


def _finished(place: Path, job: Job) -> Trained | None:
    """A stage's result from its folder; None where it is not finished there."""
    result = place / "result.json"
    if not result.exists():
        return None
    template = job.network.backbone.shapes
    try:
        variables, _ = restore(place / "weights", template)
        found = json.loads(result.read_text())
        return Trained(variables, found["history"], found["record"])
    except (CheckpointError, ValueError, KeyError) as error:
        raise WorkdirError(
            f"the finished stage {place} is damaged: {error}; remove that folder to train it again"
        ) from error


def _keep(folder: Path, job: Job, trained: Trained) -> None:
    place = _place(folder, job)
    place.mkdir(parents=True, exist_ok=True)
    save(place / "weights", trained.variables, {"address": job.address})
    # Written last: a stage is finished when this file is there.
    write_json(place / "result.json", {"record": trained.record, "history": trained.history})
    _progress(folder, job).remove()


def _results(plan: _Planned, trained: dict[str, Trained], experiment: Experiment) -> Results:
    rows, networks, histories = [], {}, {}
    for (label, student, seed), address in plan.asked.items():
        job, stage = plan.jobs[address], trained[address]
        rows.append(
            {
                "guidance": label,
                "network": student,
                "teachers": [teacher.name for teacher in job.teachers],
                "seed": seed,
                **stage.record,
                "protocol": experiment.protocol,
                "selection": experiment.selection,
                "stage": address,
            }
        )
        networks[label, student, seed] = (job.network.backbone, stage.variables)
        histories[label, student, seed] = stage.history
    return Results(rows, networks, histories)


@contextlib.contextmanager
def _opened(workdir: str | Path | None) -> Iterator[Path | None]:
    """The working directory, made where it is missing and held by this run alone."""
    if workdir is None:
        yield None
        return
    folder = Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise WorkdirError(f"cannot write to the working directory {folder}: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise WorkdirError(f"another run is at work in {folder}") from error
        yield folder


def _as_json(experiment: Experiment) -> dict[str, Any]:
    values = dataclasses.asdict(experiment)
    for row, source in zip(values["rows"], experiment.rows, strict=True):
        row["guidance"] = dict(zip(source.guidance.names, source.guidance.teachers, strict=True))
    return values


__all__ = ["ConfigError", "Results", "WorkdirError", "run"]
