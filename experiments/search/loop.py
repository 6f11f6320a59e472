"""The search itself: asks for points, trains them, and writes down what they gave."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import Trial, TrialState
from rich.console import Console

from distill_jax import data
from distill_jax.runs.ambient import pinned
from distill_jax.runs.checkpoint import write_text
from distill_jax.runs.config import ConfigError, Experiment, resolve
from distill_jax.runs.plan import warnings
from distill_jax.runs.prepare import prepare
from distill_jax.runs.workdir import LOCK, held
from distill_jax.train import devices
from distill_jax.train.reporter import Reporter
from distill_jax.train.sharding import ask_for_cpu_devices
from experiments.search import record, space, study, trained
from experiments.search.space import Fields, Space, SpaceError

# They change nothing of what is learned, or only how it rounds.
OWN_TO_A_CALL = ("name", "devices", "population", "checkpoint_every", "teacher_logits")


@dataclasses.dataclass(frozen=True)
class Options:
    """How a space is searched.

    Args:
      trials: how many there are to be.
      at_once: how many are asked for and trained at once.
      seed: of the sampler.
      sampler: "tpe", "grid" or "random".
      pruner: "median" or "none".
      config_file: where the config comes from.
    """

    trials: int
    at_once: int = 1
    seed: int = 0
    sampler: str = "tpe"
    pruner: str = "none"
    config_file: str = ""


@dataclasses.dataclass(frozen=True)
class Search:
    """A search that can begin.

    Args:
      fields: of the config, that all trials have in common.
      space: what is searched.
      options: how; of a grid no more trials than it has points.
      about: what is recorded of it, as JSON values.
      registers: whether the config's file registers names that are used.
      notes: a line each, to be known before it begins.
    """

    fields: Fields
    space: Space
    options: Options
    about: dict[str, Any]
    registers: bool
    notes: tuple[str, ...]

    @property
    def trained_fields(self) -> Fields:
        """The fields with as many trained at once as are asked for."""
        if self.options.at_once == 1 or self.fields["population"]:
            return self.fields
        members = self.options.at_once * len(self.fields["seeds"])
        return {**self.fields, "population": members}


def prepared(config: Mapping[str, Any], text: str, options: Options) -> Search:
    """Checks everything that can be checked before anything is trained.

    Args:
      config: whose fields are searched.
      text: of the space, see `space.parse`.
      options: how.

    Raises:
      SpaceError, ConfigError, DataError: it cannot be searched.
    """
    if config["devices"] == "auto":  # by each trial's own batch, as if it were trained by itself
        ask_for_cpu_devices(min(devices.cores(), devices.MOST_ON_CPU))
    fields, left_out = space.base_of(config)
    experiment = resolve(fields)
    with pinned(experiment.dtype, experiment.precision):
        dataset = data.load(**experiment.dataset)
        _check_choosing(experiment, dataset)
        first = prepare(experiment, dataset)
    own = space.parse(text, fields, dataset)
    begun = {name: dimension.ends[0] for name, dimension in own.items()}
    experiment = resolve(space.config_of(fields, [begun]))
    notes = [left_out] if left_out else []
    notes += [line.strip() for line in warnings(first.plan, experiment.dtype)]
    if options.sampler == "grid":
        if ranges := [name for name, dimension in own.items() if not dimension.choices]:
            raise SpaceError(f"--sampler=grid needs choices, and {ranges[0]} is a range")
        points = math.prod(len(dimension.choices) for dimension in own.values())
        if points < options.trials:
            notes.append(f"the grid has {points} points, so that there are no more trials")
            options = dataclasses.replace(options, trials=points)
    if options.at_once > 1 and not space.all_swept(own, fields):
        notes.append("fields that are named by their path are trained one after the other")
        options = dataclasses.replace(options, at_once=1)
    if options.at_once > 1 and options.pruner != "none":
        notes.append("trials that are trained at once end together: none of them is pruned")
    about = {
        "name": fields["name"],
        "guidance": experiment.comparisons[0].spec,
        "network": experiment.networks[-1],
        "seeds": list(experiment.seeds),
        "sampler": options.sampler,
        "pruner": options.pruner,
        "config": first.recorded(fields),
    }
    about["config"] = {**about["config"], "data": about["config"].pop("resolved")["data"]}
    registers = any(first.resolved["registered"].values())
    registers = registers or data.is_registered(experiment.dataset["name"])
    return Search(fields, own, options, about, registers, tuple(notes))


def _check_choosing(experiment: Experiment, dataset: data.Dataset) -> None:
    """Raises ConfigError where the validation split does not decide alone."""
    if not len(dataset.valid.labels):
        raise ConfigError(
            "the search chooses by the accuracy on the validation split, and there is none: "
            "expected dataset.valid_fraction above 0, got "
            f"{experiment.dataset['valid_fraction']}"
        )
    if experiment.selection == "test":
        raise ConfigError(
            "selection is test, so that the test set decides what the search sees: expected "
            "--config.selection=validation, or last"
        )


@contextmanager
def opened(workdir: Path, search: Search) -> Iterator[optuna.Study]:
    """The study in a working directory, which no other process searches meanwhile.

    Raises:
      WorkdirError: it is not ours, or holds another search.
    """
    kept = {k: v for k, v in search.about["config"].items() if k not in OWN_TO_A_CALL}
    kept["dataset"] = {k: v for k, v in kept["dataset"].items() if k != "data_dir"}
    dimensions = {name: dimension.as_json() for name, dimension in search.space.items()}
    about = {"config": kept, "space": dimensions}
    with (
        held(workdir, study.FILE, (LOCK, "compiled")) as folder,
        study.opened(folder, about) as found,
    ):
        yield found


def run(
    search: Search,
    found: optuna.Study,
    workdir: Path,
    stop: Callable[[], bool],
    console: Console,
    reporter: Reporter | None = None,
) -> None:
    """Trains what is missing, prints a line for each trial and the table, and writes all of it.

    Args:
      search: what is searched.
      found: its study.
      workdir: where it is kept.
      stop: asked now and then; where it says true the trial saves and ends.
      console: where lines go.
      reporter: told of each training.

    Raises:
      Interrupted: `stop` said so.
      ConfigError, and others of `distill_jax.run`: a trial cannot be trained.
    """
    options = search.options
    for line in search.notes:
        console.print(line, soft_wrap=True)
    if options.sampler == "grid":
        study.enqueue(found, study.grid(search.space)[: options.trials], search.space)
    prunes = options.pruner == "median" and options.at_once == 1
    found.pruner = optuna.pruners.MedianPruner() if prunes else optuna.pruners.NopPruner()
    _write(search, found, workdir)
    while (left := options.trials - len(study.ended(found))) > 0:
        trials = [
            study.ask(found, search.space, options.sampler, options.seed, options.at_once)
            for _ in range(min(options.at_once, left))
        ]
        points = [study.point_of(trial, search.space) for trial in trials]
        watch = trained.Watch(trials[0], search.about["network"]) if len(trials) == 1 else None
        outcomes = trained.train(
            search.trained_fields,
            points,
            workdir,
            stop=stop,
            watch=watch,
            reporter=reporter,
            config_file=options.config_file,
        )
        where = trained.place(workdir, points).relative_to(workdir)
        for trial, outcome in zip(trials, outcomes, strict=True):
            trial.set_user_attr(record.FOLDER, str(where))
            _tell(found, trial, outcome)
        _write(search, found, workdir)
        numbers = [trial.number for trial in trials]
        for line in record.lines_of(found, search.space):
            if line["trial"] in numbers:
                _say(console, line, len(study.ended(found)), options.trials)
    _finish(search, found, workdir, console)


def _tell(found: optuna.Study, trial: Trial, outcome: trained.Outcome) -> None:
    if outcome.pruned:
        found.tell(trial, state=TrialState.PRUNED)
    elif outcome.failed:
        trial.set_user_attr(study.FAILED, outcome.failed)
        found.tell(trial, state=TrialState.FAIL)
    else:
        own = {str(seed): value for seed, value in outcome.accuracies.items()}
        trial.set_user_attr(record.ACCURACIES, own)
        found.tell(trial, outcome.value)


def _say(console: Console, line: record.Line, done: int, trials: int) -> None:
    why = f": {line['failed']}" if line["failed"] else ""
    text = f"trial {line['trial']} ({done} of {trials}): {record.accuracy_text(line)}{why}; "
    console.print(text + record.text_of(line["point"]), soft_wrap=True, highlight=False)


def _write(search: Search, found: optuna.Study, workdir: Path) -> None:
    """Writes `search.json` and, where there is a best trial, `best.py`."""
    numbers = record.numbers(found, search.space, search.about)
    write_text(workdir / "search.json", json.dumps(numbers, indent=1) + "\n")
    if (winner := study.best(found)) is not None:
        about = {
            "trial": winner.number,
            "trials": len(study.ended(found)),
            "network": search.about["network"],
            "accuracy": winner.value,
        }
        point = study.point_of(winner, search.space)
        registering = search.options.config_file if search.registers else ""
        text = record.best_config(search.fields, point, about, registering)
        write_text(workdir / "best.py", text)


def _finish(search: Search, found: optuna.Study, workdir: Path, console: Console) -> None:
    lines, winner = record.lines_of(found, search.space), study.best(found)
    about = search.about
    of = f"{about['network']} under {about['guidance']}, seeds {len(about['seeds'])}"
    console.print(record.rich_table(lines, f"Validation accuracy of {of}"))
    if winner is None:
        raise ConfigError("no trial could be trained to the end: see search.json for why")
    point = record.text_of(study.point_of(winner, search.space))
    best = f"best: trial {winner.number}, {100 * winner.value:.2f} %; {point}"
    console.print(best, soft_wrap=True, highlight=False)
    console.print(f"best.py, search.json and search.db are in {workdir}", soft_wrap=True)
