"""Trains the stages of a plan in order, each exactly once, and gathers their results."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from distill_jax import data
from distill_jax.models import Variables, deploy
from distill_jax.runs import config as config_lib
from distill_jax.runs.ambient import pinned
from distill_jax.runs.checkpoint import Checkpoints, Damaged, recover, restore, save, write_json
from distill_jax.runs.config import ConfigError, Experiment
from distill_jax.runs.given import folder_name, load_given, preprocessing_of
from distill_jax.runs.plan import Plan, digest_of, make_plan, registered, warnings
from distill_jax.runs.records import MetricsFile
from distill_jax.runs.results import Results, StagesFailed, results_of
from distill_jax.runs.store import Store
from distill_jax.runs.workdir import WorkdirError, folder_of, opened
from distill_jax.train import evaluation, fit
from distill_jax.train.checks import check
from distill_jax.train.evaluation import StageResult
from distill_jax.train.options import ReplicaInputs, StageInputs, TrainOptions, caches_teachers
from distill_jax.train.reporter import Reporter, Several
from distill_jax.train.stage_methods import method_shapes
from distill_jax.train.trainer import NotFiniteError

log = logging.getLogger("distill_jax")
Together = tuple[str, ...]  # the ids of the stages that one step trains


def run(
    config: Mapping[str, Any],
    *,
    workdir: str | Path | None = None,
    dataset: data.Dataset | None = None,
    reporter: Reporter | None = None,
    stop: Callable[[], bool] | None = None,
    store: str | Path | None = None,
) -> Results:
    """Trains what a config asks for and has not been trained yet.

    Args:
      config: a ConfigDict, or a dict of the fields that differ from `config.default_config`.
      workdir: where stages, metrics and results are kept; None writes nothing.
      dataset: used in place of the config's.
      reporter: told of progress; None says nothing.
      stop: asked now and then; where it says true the run saves and ends. None never does.
      store: a folder in which working directories find stages that another has trained, by their
        ids, and leave their own.

    Raises:
      ConfigError, data.DataError, WorkdirError: before anything is compiled.
      CheckpointError: something cannot be written, or what was is of another training.
      fit.Interrupted: `stop` said so.
      StagesFailed: a stage's numbers were not finite; the others are trained, their results in it.
    """
    experiment = config_lib.resolve(config)
    with pinned(experiment.dtype):
        return _run(experiment, workdir, dataset, reporter, stop or _never, store)


def _run(
    experiment: Experiment,
    workdir: str | Path | None,
    dataset: data.Dataset | None,
    reporter: Reporter | None,
    stop: Callable[[], bool],
    store: str | Path | None,
) -> Results:
    """`run`, of a resolved config."""
    if store is not None and workdir is None:
        raise WorkdirError(f"a store ({store}) is of working directories: expected one besides")
    shared = None if store is None else Store(folder_of(store))
    source = "" if dataset is not None else experiment.dataset["name"]
    if dataset is None:
        dataset = data.load(**experiment.dataset)
    else:
        data.check(dataset)
    try:
        data_digest = digest_of(dataset)
        plan = make_plan(experiment, dataset, data_digest)
        # All of them, before the first is compiled: training itself checks no stage again.
        for stage in plan.stages.values():
            check(stage, dataset, experiment.topology)
        for together in plan.together.values():
            one_step = [plan.stages[stage_id] for stage_id in together]
            caches_teachers(one_step, dataset, experiment.teacher_logits)
        given = {
            stage_id: load_given(stage, dataset)
            for stage_id, stage in plan.stages.items()
            if stage.file
        }
        config_json = _as_json(experiment, data_digest, registered(plan, dataset, source))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with opened(workdir, config_json) as folder:
        reporters = [reporter] if reporter else []
        if folder is not None:
            reporters.append(MetricsFile(folder / "metrics.jsonl"))
        listeners = Several(*reporters)
        if lines := warnings(plan, experiment.dtype):
            listeners.notice(lines)
        stages = _Stages(plan, dataset, experiment, folder, listeners, stop, shared)
        for stage_id, variables in given.items():  # first, so that a wrong file shows at once
            stages.evaluate_given(stage_id, variables)
        stages.train_all()
        results = stages.results()
    if stages.failed:
        raise StagesFailed(stages.failed, results)
    return results


def _never() -> bool:
    return False


class _Stages:
    """The stages of a plan as they get done, and the folder that keeps them."""

    def __init__(
        self,
        plan: Plan,
        dataset: data.Dataset,
        experiment: Experiment,
        folder: Path | None,
        reporter: Reporter,
        stop: Callable[[], bool],
        store: Store | None = None,
    ):
        self.store = store
        self.plan, self.dataset, self.experiment = plan, dataset, experiment
        self.folder, self.reporter, self.stop = folder, reporter, stop
        self.done: dict[str, StageResult] = {}
        self.failed: dict[str, str] = {}  # why

    def evaluate_given(self, stage_id: str, variables: Variables) -> None:
        """Adds the result of a stage whose weights are given."""
        stage = self.plan.stages[stage_id]
        self.done[stage_id] = evaluation.evaluate_pretrained(
            stage, self.dataset, variables, self.experiment.topology
        )
        self.reporter.stage_ended(stage, self.done[stage_id].record)
        if lines := evaluation.chance_warning(stage, self.done[stage_id], self.dataset):
            self.reporter.notice(lines)

    def train_all(self) -> None:
        """Adds every stage of the plan: found finished, or trained, several at once."""
        if self.folder is not None:
            for together in dict.fromkeys(self.plan.together.values()):
                if together[0] not in self.done:
                    self._take_finished(together)
        options = TrainOptions(
            topology=self.experiment.topology,
            teacher_logits=self.experiment.teacher_logits,
            max_nonfinite_steps=self.experiment.max_nonfinite_steps,
            should_save=config_lib.checkpoint_due(self.experiment.checkpoint_every),
            reporter=self.reporter,
            stop=self.stop,
        )
        while waiting := self._waiting():
            if self.stop():  # between stages there is nothing to save
                raise fit.Interrupted
            chosen = self._next_population(waiting)
            try:
                results = fit.train([self._inputs(x) for x in chosen], self.dataset, options)
            except NotFiniteError as error:
                self._fail(chosen[error.replica], str(error))
                continue
            for together, own in zip(chosen, results, strict=True):
                self._keep(dict(zip(together, own, strict=True)))
        self.write_results()

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
        self.failed |= dict.fromkeys(together, message)
        self.reporter.notice([f"  failed: {message}"])
        self.write_results()

    def results(self) -> Results:
        """Of all stages that are done; those that failed have a row that says so."""
        return results_of(self.plan, self.done, self.failed, self.experiment)

    def write_results(self) -> None:
        """Writes `results.json`, whole and current."""
        if self.folder is not None:
            write_json(self.folder / "results.json", self.results().rows)

    def _keep(self, results: dict[str, StageResult]) -> None:
        """Adds the results of stages that one step trained, once all of them are safe."""
        if self.folder is not None:
            for stage_id, result in results.items():
                self._save(stage_id, result)
            self._tidy(results)
            self._share(results)
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
        most = 1 if streamed else self.experiment.population
        population = alike[: self.experiment.topology.population(len(alike), most)]
        if self.folder is None:
            return population
        # Stages that were saved at steps of their own go on by themselves.
        saved = [set(self._progress(together).steps()) for together in population]
        return population if not any(saved) or set.intersection(*saved) else population[:1]

    def _as_placed(self, left: list[Together]) -> list[Together]:
        """What was trained at once with the next stage when that was interrupted, if it was.

        To go on in company or alone may round otherwise.
        """
        if self.folder is None:
            return []
        ids = self._progress(left[0]).newest_meta().get("placed", [])
        placed = [together for together in left if together[0] in ids]
        even = len(placed) % self.experiment.topology.count == 0 or len(ids) == 1
        if not placed or len(placed) < len(ids) or not even:
            return []
        common = set.intersection(*(set(self._progress(x).steps()) for x in placed))
        return placed if common else []

    def _inputs(self, together: Together) -> ReplicaInputs:
        checkpoints = self._progress(together) if self.folder is not None else None
        return ReplicaInputs(tuple(map(self._stage_inputs, together)), checkpoints)

    def _stage_inputs(self, stage_id: str) -> StageInputs:
        stage = self.plan.stages[stage_id]
        plain = self.done.get(self.plan.plain[stage_id])
        return StageInputs(
            stage,
            tuple(self.done[teacher] for teacher in self.plan.teachers[stage_id]),
            plain.record["valid_accuracy"] if plain else None,
            self.done[stage.start].whole if stage.start else {},
        )

    # ------------------------------------------------------------------------------- in the folder
    def _place(self, stage_id: str) -> Path:
        assert self.folder is not None
        name = folder_name(self.plan.stages[stage_id].network.name, stage_id)
        return self.folder / "stages" / name

    def _progress(self, together: Together) -> Checkpoints:
        """The checkpoints of stages that one step trains: one save for all, whole or not at all."""
        specs = {stage_id: self.plan.specs[stage_id] for stage_id in together}
        about = specs[together[0]] if len(together) == 1 else specs
        return Checkpoints(self._place(together[0]) / "progress", about)

    def _take_finished(self, together: Together) -> None:
        """Adds stages that are finished; none of a cycle where one is not."""
        results = {}
        for stage_id in together:
            if self.store is not None:
                self.store.fetch(self._place(stage_id))
            if (result := self._finished(stage_id)) is None:
                return
            results[stage_id] = result
        self.done |= results
        self._tidy(results)
        self._share(results)

    def _share(self, stage_ids: Iterable[str]) -> None:
        if self.store is not None:
            for stage_id in stage_ids:
                self.store.keep(self._place(stage_id))

    def _finished(self, stage_id: str) -> StageResult | None:
        """The result of a finished stage; None where it is not finished or, loudly, damaged."""
        place = self._place(stage_id)
        recover(place / "weights")
        if not (place / "weights").exists() and not (place / "result.json").exists():
            return None
        stage = self.plan.stages[stage_id]
        template: Any = stage.network.backbone.shapes
        if stage.phase:
            examples = len(self.dataset.limited(stage.recipe.train_limit, stage.seed).train.labels)
            template = {"network": stage.network.shapes, "methods": method_shapes(stage, examples)}
        try:
            arrays, found = restore(place / "weights", template, self.plan.specs[stage_id])
            whole = arrays if stage.phase else {}
            variables = deploy(stage.network, arrays["network"]) if stage.phase else arrays
            result = StageResult(variables, found["history"], found["record"], whole)
        except (Damaged, KeyError) as error:
            log.warning("%s was finished and is damaged: %s; it is trained again", place, error)
            if self.store is not None:
                self.store.distrust(place)
            return None
        return evaluation.with_metrics(stage, result, self.dataset, self.experiment.topology)

    def _save(self, stage_id: str, result: StageResult) -> None:
        place = self._place(stage_id)
        place.mkdir(parents=True, exist_ok=True)
        # In one save, so that the weights and what is known of them cannot part.
        meta = {
            "record": result.record,
            "history": result.history,
            "preprocessing": preprocessing_of(self.dataset),
        }
        arrays = result.whole or result.variables
        save(place / "weights", arrays, {"about": self.plan.specs[stage_id], **meta})

    def _tidy(self, results: dict[str, StageResult]) -> None:
        """Follows the saves of finished stages, done again where a kill came between."""
        # For people to read: a run reads what was saved with the weights.
        for stage_id, result in results.items():
            found = {"record": result.record, "history": result.history}
            write_json(self._place(stage_id) / "result.json", found)
        self._progress(tuple(results)).remove()


def _as_json(
    experiment: Experiment, data_digest: str, registered: dict[str, Any]
) -> dict[str, Any]:
    values = {**dataclasses.asdict(experiment), "data": data_digest, "registered": registered}
    for one, source in zip(values["comparisons"], experiment.comparisons, strict=True):
        one["graph"] = dict(zip(source.graph.names, source.graph.teachers, strict=True))
    return values


__all__ = ["ConfigError", "Results", "StagesFailed", "WorkdirError", "run"]
