"""Trains the stages of a plan in order, each exactly once, and gathers their results."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_jax import data, processes, report
from distill_jax.models import Variables
from distill_jax.refusals import refuses
from distill_jax.runs import config as config_lib
from distill_jax.runs import initial
from distill_jax.runs.ambient import pinned
from distill_jax.runs.checkpoint import (
    CheckpointError,
)
from distill_jax.runs.config import ConfigError
from distill_jax.runs.interrupts import first_interrupt
from distill_jax.runs.plan import warnings
from distill_jax.runs.prepare import Prepared, prepare
from distill_jax.runs.provenance import versions, write_files, write_run
from distill_jax.runs.records import MetricsFile, guidance_of
from distill_jax.runs.results import Results, StagesFailed, results_of
from distill_jax.runs.stage_folder import StageFolder, Together
from distill_jax.runs.store import Store
from distill_jax.runs.workdir import WorkdirError, check_shared, folder_of, opened
from distill_jax.runs.writers import Writers, board, check_tensorboard, check_writers
from distill_jax.train import evaluation, fit, memory
from distill_jax.train.evaluation import StageResult
from distill_jax.train.memory import OutOfMemoryError
from distill_jax.train.options import ReplicaInputs, StageInputs, TrainOptions, caches_teachers
from distill_jax.train.reporter import Planned, Reporter, Several
from distill_jax.train.stage import Stage, steps_per_epoch
from distill_jax.train.trainer import NotFiniteError


@refuses(
    ConfigError,
    data.DataError,
    WorkdirError,
    CheckpointError,
    OutOfMemoryError,
    StagesFailed,
    processes.ProcessError,
    fit.Interrupted,
)
def run(
    config: Mapping[str, Any],
    *,
    workdir: str | Path | None = None,
    dataset: data.Dataset | None = None,
    reporter: Reporter | None = None,
    progress: bool = True,
    writers: Sequence[report.Writer] = (),
    stop: Callable[[], bool] | None = None,
    store: str | Path | None = None,
    config_file: str = "",
) -> Results:
    """Trains what a config asks for and has not been trained yet.

    Args:
      config: a ConfigDict, or a dict of the fields that differ from `config.default_config`.
      workdir: where stages, metrics and results are kept; None writes nothing.
      dataset: used in place of the config's.
      reporter: told of progress, in the place of what `progress` shows.
      progress: whether to show progress as the command does: live on a terminal and in a notebook,
        in lines elsewhere.
      writers: functions that are told of stages and epochs by a record each, such as
        `report.EpochEnded`; one that raises is warned of once, and training goes on.
      stop: asked now and then; where it says true the run saves and ends. None does so on Ctrl-C;
        a second one ends at once.
      store: a folder in which working directories find stages that another has trained, by their
        ids, and leave their own.
      config_file: where the config comes from, as `load_config` takes it; written to `run.json`, so
        that later commands know the names that the file registers.

    Raises:
      ConfigError, data.DataError, WorkdirError: before anything is compiled.
      CheckpointError: something cannot be written, or what was is of another training.
      fit.Interrupted: a KeyboardInterrupt: `stop` said so, or Ctrl-C did. What there is was saved;
        without a `workdir` Ctrl-C gives the results that are finished, marked `interrupted`.
      OutOfMemoryError: a device's memory does not suffice; what was saved stays.
      StagesFailed: a stage's numbers were not finite; the others are trained, their results in it.
      ProcessError: of several processes one failed, was lost, or is not like the first.
    """
    fields = config_lib.fields_of(config)
    experiment = config_lib.resolve(fields)
    if store is not None and workdir is None:
        raise WorkdirError(f"a store ({store}) is of working directories: expected one besides")
    check_writers(writers)
    if experiment.tensorboard:
        check_tensorboard(workdir)
    shared = None if store is None else Store(folder_of(store))
    first = processes.is_first()  # the others say nothing
    shown = report.console_reporter() if reporter is None and progress and first else None
    told = (reporter if first else None) or shown or Reporter()
    writers = writers if first else ()
    try:
        with (
            processes.lost_told(str(workdir or "")),
            pinned(experiment.dtype, experiment.precision),
        ):
            prepared = processes.each(lambda: prepare(experiment, dataset))
            processes.check_same(lambda: {"config": prepared.shared, "versions": versions()})
            with opened(workdir, prepared.recorded(fields)) as folder:
                if folder is not None:
                    processes.of_first(lambda: write_run(folder, prepared.plan, config_file))
                    processes.of_first(lambda: write_files(folder, prepared.dataset.task))
                    check_shared(folder_of(workdir or ""), folder)
                if stop is not None:
                    stop = processes.agreed(stop)
                    return _train(prepared, folder, told, writers, stop, shared)
                with first_interrupt() as noted:
                    interrupted = processes.agreed(noted)
                    results = _train(
                        prepared, folder, told, writers, interrupted, shared, partial=True
                    )
                late = interrupted()
                if late and folder is not None:  # too late to stop anything here
                    raise _stopped(folder)
                return dataclasses.replace(results, interrupted=late)
    finally:
        if shown is not None:
            shown.close()


def _train(
    prepared: Prepared,
    folder: Path | None,
    reporter: Reporter,
    writers: Sequence[report.Writer],
    stop: Callable[[], bool],
    store: Store | None,
    partial: bool = False,
) -> Results:
    """Trains what is prepared; `partial` gives results where it was stopped and saves nothing."""
    stages = _Stages(prepared, folder, reporter, stop, store)
    stages.take_finished()
    first = processes.is_first()
    written = folder if prepared.experiment.tensorboard and first else None
    with board(written, prepared.plan, stages.done) as boards:
        files = [] if folder is None or not first else [MetricsFile(folder / "metrics.jsonl")]
        told = [Writers(prepared.plan, writers)] if writers else []
        stages.reporter = Several(reporter, *files, *boards, *told)
        return _train_stages(prepared, folder, stages, partial)


def _train_stages(
    prepared: Prepared, folder: Path | None, stages: _Stages, partial: bool
) -> Results:
    """Trains the stages that are not finished; see `_train`."""
    listeners = stages.reporter
    listeners.run_started(stages.planned())
    if (count := prepared.experiment.topology.count) > 1:
        several = processes.count()
        less = f"of {several} processes" if several > 1 else "share each batch; devices=1 takes one"
        listeners.notice([f"  {count} devices {less}"])
    if lines := warnings(prepared.plan, prepared.experiment):
        listeners.notice(lines)
    left = [stage for stage in prepared.plan.stages.values() if stage.id not in stages.done]
    if lines := initial.lines(left, prepared.beginnings):
        listeners.notice(lines)
    for stage_id, variables in prepared.given.items():  # first, so that a wrong file shows at once
        stages.evaluate_given(stage_id, variables)
    try:
        stages.train_all()
    except fit.Interrupted:
        if folder is not None:
            raise _stopped(folder) from None
        if not partial:
            raise
        return _partial(stages, listeners)
    results = stages.results()
    listeners.run_ended(results.rows)
    if stages.failed:
        raise StagesFailed(stages.failed, results)
    return results


def _stopped(workdir: str | Path) -> fit.Interrupted:
    return fit.Interrupted(f"stopped and saved in {workdir}; the same call goes on from there")


def _partial(stages: _Stages, reporter: Reporter) -> Results:
    """The results of what is finished, where the rest is lost."""
    results = stages.results()
    reporter.notice(
        [
            f"  stopped: {len(stages.done)} of {len(stages.plan.stages)} stages are finished, and "
            "their results are all that is kept, as there is no workdir"
        ]
    )
    reporter.run_ended(results.rows)
    return results


class _Stages:
    """The stages of a plan as they get done, and the folder that keeps them."""

    def __init__(
        self,
        prepared: Prepared,
        folder: Path | None,
        reporter: Reporter,
        stop: Callable[[], bool],
        store: Store | None,
    ):
        self.plan, self.dataset = prepared.plan, prepared.dataset
        self.experiment, self.beginnings = prepared.experiment, prepared.beginnings
        self.folder = None if folder is None else StageFolder(folder, prepared, store)
        self.reporter, self.stop = reporter, stop
        self.done: dict[str, StageResult] = {}
        self.failed: dict[str, str] = {}  # why
        self.population = prepared.experiment.population  # 0: as pays, where memory suffices

    def evaluate_given(self, stage_id: str, variables: Variables) -> None:
        """Adds the result of a stage whose weights are given."""
        stage = self.plan.stages[stage_id]
        with self._memory_told((stage_id,)):
            self.done[stage_id] = evaluation.evaluate_pretrained(
                stage, self.dataset, variables, self.experiment.topology
            )
        self.reporter.stage_ended(stage, self.done[stage_id].record)
        if lines := evaluation.chance_warning(stage, self.done[stage_id], self.dataset):
            self.reporter.notice(lines)

    def take_finished(self) -> None:
        """Adds the stages that the folder has finished."""
        if self.folder is not None:
            for together in self._trained():
                with self._memory_told(together):
                    self.done |= self.folder.finished(together)

    def planned(self) -> list[Planned]:
        """What is trained, for reporters."""
        guidance = guidance_of(self.plan)
        planned = []
        for together in self._trained():
            stages = tuple(self.plan.stages[stage_id] for stage_id in together)
            recipe = stages[0].recipe
            limit = recipe.train_limit * self.dataset.classes
            planned.append(
                Planned(
                    stages,
                    tuple(guidance[stage_id] for stage_id in together),
                    steps_per_epoch(limit or len(self.dataset.train.labels), recipe),
                    caches_teachers(stages, self.dataset, self.experiment.teacher_logits),
                    together[0] in self.done,
                )
            )
        return planned

    def _trained(self) -> list[Together]:
        """What the steps of a plan train, in its order; weights that are given are not trained."""
        every = dict.fromkeys(self.plan.together.values())
        return [together for together in every if not self.plan.stages[together[0]].file]

    def train_all(self) -> None:
        """Adds every stage of the plan that is not finished, several at once."""
        options = TrainOptions(
            topology=self.experiment.topology,
            teacher_logits=self.experiment.teacher_logits,
            max_nonfinite_steps=self.experiment.max_nonfinite_steps,
            should_save=config_lib.checkpoint_due(self.experiment.checkpoint_every),
            reporter=self.reporter,
            stop=self.stop,
            workers=self.experiment.workers,
        )
        while waiting := self._waiting():
            if self.stop():  # between stages there is nothing to save
                raise fit.Interrupted
            chosen = self._next_population(waiting)
            try:
                with self._memory_told(*chosen):
                    inputs = [self._inputs(x) for x in chosen]
                    results = fit.train(inputs, self.dataset, options)
            except NotFiniteError as error:
                self._fail(chosen[error.replica], str(error))
                continue
            except OutOfMemoryError as error:
                if processes.count() > 1 or self._is_asked_for(chosen):
                    raise
                self.population = len(chosen) // 2
                few = f"trains {self.population} at once instead of {len(chosen)}"
                self.reporter.notice([f"  {few}: {error}"])
                continue
            for together, own in zip(chosen, results, strict=True):
                self._keep(dict(zip(together, own, strict=True)))
        self.write_results()

    def _is_asked_for(self, chosen: list[Together]) -> bool:
        """Whether no fewer may be trained at once: the config says how many, or they were saved."""
        saved = self.folder is not None and any(self.folder.progress(x).steps() for x in chosen)
        return len(chosen) == 1 or self.experiment.population > 0 or saved

    def _waiting(self) -> list[str]:
        """The stages that are to be trained; those that a failed one teaches cannot be."""
        for stage_id in self.plan.stages:
            needed = (*self.plan.teachers[stage_id], self.plan.stages[stage_id].start)
            lost = [x for x in needed if x in self.failed]
            if lost and stage_id not in self.failed:
                self.failed[stage_id] = self.failed[lost[0]]
        return [x for x in self.plan.stages if x not in self.done and x not in self.failed]

    def _fail(self, together: Together, why: str) -> None:
        """Notes that stages could not be trained, under the labels that the table has for them."""
        labels = [label for (label, *_), x in self.plan.results.items() if x in together]
        message = f"{', '.join(dict.fromkeys(labels))}: {why}" if labels else why
        before = set(self.failed)
        self.failed |= dict.fromkeys(together, message)
        self._waiting()  # adds those that need them
        lost = [self.plan.stages[x] for x in self.failed if x not in before]
        self.reporter.stage_failed(lost, message)
        self.write_results()

    def results(self) -> Results:
        """Of all stages that are done; those that failed have a row that says so."""
        return results_of(self.plan, self.done, self.failed, self.experiment, self.dataset)

    def write_results(self) -> None:
        """Writes `results.json`, whole and current."""
        if self.folder is not None:
            self.folder.write_results(self.results().rows)

    def _keep(self, results: dict[str, StageResult]) -> None:
        """Adds the results of stages that one step trained, once all of them are safe."""
        if self.folder is not None:
            self.folder.keep(results)
        self.done |= results
        self.write_results()
        for stage_id, result in results.items():
            self.reporter.stage_ended(self.plan.stages[stage_id], result.record)

    def _next_population(self, waiting: list[str]) -> list[Together]:
        """What one step trains next, and what can be trained at once: same shape, other numbers."""

        def shape(together):
            stages = [self.plan.stages[stage_id] for stage_id in together]
            return [(s.structure, s.recipe.train_limit, bool(s.start), s.phase) for s in stages]

        def ready(together):
            needed = {
                y for x in together for y in (*self.plan.teachers[x], self.plan.stages[x].start)
            }
            return not needed & set(waiting)

        left = list(dict.fromkeys(self.plan.together[stage_id] for stage_id in waiting))
        if placed := self._as_placed(left):
            return placed
        alike = [x for x in left if shape(x) == shape(left[0]) and ready(x)]
        streamed = isinstance(self.dataset.train.images, data.Streamed)
        most = 1 if streamed else self.population
        population = alike[: self.experiment.topology.population(len(alike), most)]
        if self.folder is None:
            return population
        # Stages that were saved at steps of their own go on by themselves.
        saved = [set(self.folder.progress(together).steps()) for together in population]
        return population if not any(saved) or set.intersection(*saved) else population[:1]

    def _as_placed(self, left: list[Together]) -> list[Together]:
        """What was trained at once with the next stage when that was interrupted, if it was.

        To go on in company or alone may round otherwise.
        """
        if self.folder is None:
            return []
        ids = self.folder.progress(left[0]).newest_meta().get("placed", [])
        placed = [together for together in left if together[0] in ids]
        even = len(placed) % self.experiment.topology.count == 0 or len(ids) == 1
        if not placed or len(placed) < len(ids) or not even:
            return []
        common = set.intersection(*(set(self.folder.progress(x).steps()) for x in placed))
        return placed if common else []

    def _inputs(self, together: Together) -> ReplicaInputs:
        checkpoints = None if self.folder is None else self.folder.progress(together)
        return ReplicaInputs(tuple(map(self._stage_inputs, together)), checkpoints)

    def _stage_inputs(self, stage_id: str) -> StageInputs:
        stage = self.plan.stages[stage_id]
        plain = self.done.get(self.plan.plain[stage_id])
        return StageInputs(
            stage,
            tuple(self.done[teacher] for teacher in self.plan.teachers[stage_id]),
            plain.record["valid_accuracy"] if plain else None,
            self._start_of(stage),
        )

    def _start_of(self, stage: Stage) -> dict[str, Any]:
        """What a stage starts from: the phase before it, or weights that it begins with."""
        if stage.start:
            return self.done[stage.start].whole
        own = self.beginnings.get(stage.id)
        return {} if own is None else {"network": own.variables}

    def _memory_told(self, *chosen: Together) -> contextlib.AbstractContextManager[None]:
        """An error of memory in what computes stages, in words."""
        first = [self.plan.stages[x] for x in chosen[0]]
        cached = caches_teachers(first, self.dataset, self.experiment.teacher_logits)
        named = report.describe(*(self.plan.stages[x] for together in chosen for x in together))
        kept = "" if self.folder is None else str(self.folder.folder)
        return memory.told(named, members=len(chosen), cached=cached, kept=kept)


__all__ = ["ConfigError", "Results", "StagesFailed", "WorkdirError", "run"]
