"""The stages in order: who is trained when, each exactly once, and the table that comes of it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distill_jax import data, report
from distill_jax.interop.files import load_variables
from distill_jax.models import Network, Variables
from distill_jax.runs import config as config_lib
from distill_jax.runs.checkpoint import Checkpoints, Damaged, restore, save, write_json
from distill_jax.runs.config import ConfigError, Experiment
from distill_jax.runs.plan import Planned, identity_of, make_plan
from distill_jax.runs.records import MetricsFile
from distill_jax.runs.workdir import WorkdirError, opened
from distill_jax.train import fit, scoring
from distill_jax.train.options import Asked, Means, check_table
from distill_jax.train.recipe import check
from distill_jax.train.reporter import Reporter, Several
from distill_jax.train.scoring import Trained

log = logging.getLogger("distill_jax")


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
      ConfigError, data.DataError, WorkdirError: before anything is compiled.
      CheckpointError: something cannot be written, or what was is of another training.
      fit.Interrupted: `stop` said so.
    """
    experiment = config_lib.resolve(config)
    if dataset is None:
        dataset = data.load(**experiment.dataset)
    data.check(dataset)
    try:
        about_data = identity_of(dataset)
        plan = make_plan(experiment, dataset, about_data)
        for job in plan.jobs.values():
            check(job, dataset, experiment.topology)
            check_table(job, dataset, experiment.teacher_logits)
        given = {
            address: load_variables(job.weights, job.network, (dataset.mean, dataset.std))
            for address, job in plan.jobs.items()
            if job.weights
        }
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with opened(workdir, _as_json(experiment, about_data)) as folder:
        reporters = [reporter] if reporter else []
        if folder is not None:
            reporters.append(MetricsFile(folder / "metrics.jsonl"))
        several = Several(*reporters)
        trained: dict[str, Trained] = {}
        for address, variables in given.items():  # first, so that a wrong file shows at once
            trained[address] = scoring.adopt(
                plan.jobs[address], dataset, variables, experiment.topology
            )
            several.stage_ended(plan.jobs[address], trained[address].record)
        _train_all(plan, trained, dataset, experiment, folder, several, stop)
        results = _results(plan, trained, experiment)
        if folder is not None:
            write_json(folder / "results.json", results.rows)
    return results


def _train_all(plan, trained, dataset, experiment, folder, reporter, stop) -> None:
    """Adds every stage of the plan to `trained`: found finished, or trained, several at once."""
    for address in plan.jobs if folder is not None else ():
        if address not in trained and (found := _finished(plan, address, folder)):
            trained[address] = found
            _tidy(plan, address, folder, found)
    means = Means(
        topology=experiment.topology,
        teacher_logits=experiment.teacher_logits,
        may_skip=experiment.may_skip,
        due=config_lib.checkpoint_due(experiment.checkpoint_every),
        reporter=reporter,
        stop=stop,
    )
    while waiting := [address for address in plan.jobs if address not in trained]:
        if stop():  # between stages there is nothing to save
            raise fit.Interrupted
        addresses = _next_group(plan, waiting, dataset, experiment, folder)
        asked = [_ask(plan, address, trained, folder) for address in addresses]
        results = fit.train(asked, dataset, means)
        for address, result in zip(addresses, results, strict=True):
            if folder is not None:
                _keep(plan, address, folder, result)
            trained[address] = result
            reporter.stage_ended(plan.jobs[address], result.record)


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
    saved = [set(_progress(plan, address, folder).steps()) for address in group]
    return group if not any(saved) or set.intersection(*saved) else group[:1]


def _ask(plan, address, trained, folder) -> Asked:
    plain = trained.get(plan.plain.get(address, ""))
    return Asked(
        plan.jobs[address],
        tuple(trained[teacher] for teacher in plan.teachers[address]),
        _progress(plan, address, folder) if folder is not None else None,
        plain.record["valid_accuracy"] if plain else None,
    )


def _place(plan, address: str, folder: Path) -> Path:
    return folder / "stages" / f"{plan.jobs[address].network.name.replace(':', '-')}-{address}"


def _progress(plan, address: str, folder: Path) -> Checkpoints:
    return Checkpoints(_place(plan, address, folder) / "progress", plan.about[address])


def _finished(plan, address: str, folder: Path) -> Trained | None:
    """What a finished stage gave; None where it is not finished or, loudly, not to be believed."""
    place = _place(plan, address, folder)
    if not (place / "weights").exists() and not (place / "result.json").exists():
        return None
    template = plan.jobs[address].network.backbone.shapes
    try:
        variables, found = restore(place / "weights", template, plan.about[address])
        return Trained(variables, found["history"], found["record"])
    except (Damaged, KeyError) as error:
        log.warning("%s was finished and is damaged: %s; it is trained again", place, error)
        return None


def _keep(plan, address: str, folder: Path, trained: Trained) -> None:
    place = _place(plan, address, folder)
    place.mkdir(parents=True, exist_ok=True)
    # In one save, so that the weights and what is said of them cannot part.
    found = {"record": trained.record, "history": trained.history}
    save(place / "weights", trained.variables, {"about": plan.about[address], **found})
    _tidy(plan, address, folder, trained)


def _tidy(plan, address: str, folder: Path, trained: Trained) -> None:
    """What follows the save of a finished stage, done again where a kill came between."""
    # For people to read: a run reads what was saved with the weights.
    found = {"record": trained.record, "history": trained.history}
    write_json(_place(plan, address, folder) / "result.json", found)
    _progress(plan, address, folder).remove()


def _results(plan: Planned, trained: dict[str, Trained], experiment: Experiment) -> Results:
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


def _as_json(experiment: Experiment, about_data: str) -> dict[str, Any]:
    values = {**dataclasses.asdict(experiment), "data": about_data}
    for row, source in zip(values["rows"], experiment.rows, strict=True):
        row["guidance"] = dict(zip(source.guidance.names, source.guidance.teachers, strict=True))
    return values


__all__ = ["ConfigError", "Results", "WorkdirError", "run"]
