"""The search itself: asks for points, trains them, and writes down what they gave."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.trial import Trial, TrialState
from rich.console import Console

from distill_jax.report.page.search import point_text
from distill_jax.runs.checkpoint import write_text
from distill_jax.runs.config import ConfigError
from distill_jax.runs.workdir import LOCK, held
from distill_jax.train.reporter import Reporter
from experiments.search import record, study, trained
from experiments.search.setup import Search

# They change nothing of what is learned, or only how it rounds.
OWN_TO_A_CALL = ("name", "devices", "population", "checkpoint_every", "teacher_logits")


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
        network = trained.network_of(search.trained_fields, points[0])
        watch = trained.Watch(trials[0], network) if len(trials) == 1 else None
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
    console.print(text + point_text(line["point"]), soft_wrap=True, highlight=False)


def _write(search: Search, found: optuna.Study, workdir: Path) -> None:
    """Writes `search.json` and, where there is a best trial, `best.py`."""
    numbers = record.numbers(found, search.space, search.about)
    write_text(workdir / "search.json", json.dumps(numbers, indent=1) + "\n")
    if (winner := study.best(found)) is not None:
        about = {
            "trial": winner.number,
            "trials": len(study.ended(found)),
            "accuracy": winner.value,
        }
        point = study.point_of(winner, search.space)
        registering = search.options.config_file if search.registers else ""
        text = record.best_config(search.fields, point, about, registering)
        write_text(workdir / "best.py", text)


def _finish(search: Search, found: optuna.Study, workdir: Path, console: Console) -> None:
    lines, winner = record.lines_of(found, search.space), study.best(found)
    about = search.about
    seeds = f"{len(about['seeds'])} seed{'s' * (len(about['seeds']) != 1)}"
    of = f"{about['network']} under {about['guidance']}, mean over {seeds}"
    console.print(record.rich_table(lines, f"Validation accuracy of {of}"))
    if winner is None:
        raise ConfigError("no trial could be trained to the end: see search.json for why")
    point = point_text(study.point_of(winner, search.space))
    best = f"best: trial {winner.number}, {100 * winner.value:.2f} %; {point}"
    console.print(best, soft_wrap=True, highlight=False)
    console.print(f"best.py, search.json and search.db are in {workdir}", soft_wrap=True)
