"""Where a run keeps its stages: finished ones, and the checkpoints of those in training."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax

from distill_jax import processes
from distill_jax.models import deploy
from distill_jax.report.summary import metrics_of
from distill_jax.runs.checkpoint import Checkpoints, Damaged, recover, restore, save, write_json
from distill_jax.runs.folder import PROGRESS, stage_place
from distill_jax.runs.given import RESULTS, WEIGHTS, preprocessing_of
from distill_jax.runs.prepare import Prepared
from distill_jax.runs.store import Store
from distill_jax.train import evaluation
from distill_jax.train.evaluation import StageResult
from distill_jax.train.stage_methods import method_shapes

log = logging.getLogger("distill_jax")
Together = tuple[str, ...]  # the ids of the stages that one step trains


class StageFolder:
    """The stages of a run in its working directory.

    Args:
      folder: the working directory.
      prepared: what is trained.
      store: what other working directories have trained; None without one.
    """

    def __init__(self, folder: Path, prepared: Prepared, store: Store | None):
        self.folder, self.store = folder, store
        self.plan, self.dataset = prepared.plan, prepared.dataset
        self.topology = prepared.experiment.topology
        measured = prepared.resolved["registered"].get("metrics", {})
        self.metrics = {name: identity["repr"] for name, identity in measured.items()}

    def place(self, stage_id: str) -> Path:
        """The folder of a stage."""
        return stage_place(self.folder, self.plan.stages[stage_id].network.name, stage_id)

    def progress(self, together: Together) -> SharedCheckpoints:
        """The checkpoints of stages that one step trains: one save for all, whole or not at all."""
        specs = {stage_id: self.plan.specs[stage_id] for stage_id in together}
        about = specs[together[0]] if len(together) == 1 else specs
        return SharedCheckpoints(Checkpoints(self.place(together[0]) / PROGRESS, about))

    def finished(self, together: Together) -> dict[str, StageResult]:
        """The results of stages that are finished; none of a cycle where one is not."""
        results = {}
        for stage_id, result in processes.of_first(lambda: self._read(together)).items():
            stage = self.plan.stages[stage_id]
            results[stage_id] = evaluation.with_metrics(stage, result, self.dataset, self.topology)
        if results:
            processes.of_first(lambda: self._tidy(results))
        return results

    def keep(self, results: Mapping[str, StageResult]) -> None:
        """Saves the results of stages that one step trained."""
        processes.of_first(lambda: self._keep(results))

    def _keep(self, results: Mapping[str, StageResult]) -> None:
        for stage_id, result in results.items():
            place = self.place(stage_id)
            place.mkdir(parents=True, exist_ok=True)
            # In one save, so that the weights and what is known of them cannot part.
            meta = {
                "record": result.record,
                "history": result.history,
                "preprocessing": preprocessing_of(self.dataset),
                "devices": self.topology.count,
                "metrics": self.metrics,
            }
            arrays = result.whole or result.variables
            save(place / WEIGHTS, arrays, {"about": self.plan.specs[stage_id], **meta})
        self._tidy(results)

    def write_results(self, rows: list[dict[str, Any]]) -> None:
        """Writes `results.json`, whole and current."""
        processes.of_first(lambda: write_json(self.folder / RESULTS, rows))

    def _read(self, together: Together) -> dict[str, StageResult]:
        """As `finished`, without metrics that were not asked for then."""
        results = {}
        for stage_id in together:
            if self.store is not None:
                self.store.fetch(self.place(stage_id))
            if (result := self._finished(stage_id)) is None:
                return {}
            results[stage_id] = result
        return results

    def _finished(self, stage_id: str) -> StageResult | None:
        """The result of a finished stage; None where it is not finished or, loudly, damaged."""
        place = self.place(stage_id)
        recover(place / WEIGHTS)
        if not (place / WEIGHTS).exists() and not (place / "result.json").exists():
            return None
        stage = self.plan.stages[stage_id]
        template: Any = stage.network.backbone.shapes
        if stage.phase:
            labels = self.dataset.limited(stage.recipe.train_limit, stage.seed).train.labels
            template = {"network": stage.network.shapes, "methods": method_shapes(stage, labels)}
        try:
            arrays, found = restore(place / WEIGHTS, template, self.plan.specs[stage_id])
            whole = arrays if stage.phase else {}
            variables = deploy(stage.network, arrays["network"]) if stage.phase else arrays
            result = StageResult(variables, found["history"], found["record"], whole)
            return self._with_own_metrics(result, found.get("metrics", {}))
        except (Damaged, KeyError) as error:
            log.warning("%s was finished and is damaged: %s; it is trained again", place, error)
            if self.store is not None:
                self.store.distrust(place)
            return None

    def _with_own_metrics(self, result: StageResult, then: Mapping[str, str]) -> StageResult:
        """The result without metrics that the data set has not, or that were others by that name.

        Args:
          result: of a finished stage, of another working directory perhaps.
          then: a digest of each metric's code, by name; empty where an earlier version saved it.
        """
        names = metrics_of(result.record)
        others = [x for x in names if self.metrics.get(x) != then.get(x, self.metrics.get(x, ""))]
        gone = {f"{part}_{name}" for part in ("valid", "test") for name in others}

        def without(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in values.items() if name not in gone}

        history = [without(epoch) for epoch in result.history] if gone else result.history
        return dataclasses.replace(result, history=history, record=without(result.record))

    def _tidy(self, results: Mapping[str, StageResult]) -> None:
        """Follows the saves of finished stages, done again where a kill came between."""
        # For people to read: a run reads what was saved with the weights.
        for stage_id, result in results.items():
            found = {"record": result.record, "history": result.history}
            write_json(self.place(stage_id) / "result.json", found)
        self.progress(tuple(results)).checkpoints.remove()
        if self.store is not None:
            for stage_id in results:
                self.store.keep(self.place(stage_id))


class SharedCheckpoints:
    """Checkpoints that the first of several processes writes and reads; the others hear of it.

    Args:
      checkpoints: they.
    """

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints

    def steps(self) -> list[int]:
        """The steps that have a finished checkpoint, oldest first."""
        return processes.of_first(self.checkpoints.steps)

    def newest_meta(self) -> dict[str, Any]:
        """What was saved beside the arrays of the newest checkpoint; {} where none can be read."""
        return processes.of_first(self.checkpoints.newest_meta)

    def save(self, step: int, arrays: Any, meta: dict[str, Any]) -> None:
        """Writes the checkpoint of `step`, then lets go of those too many."""
        if processes.count() > 1:
            arrays = jax.device_get(arrays)  # global arrays, whole on each process
        processes.of_first(lambda: self.checkpoints.save(step, arrays, meta))

    def restore(
        self, template: Any, among: Collection[int] | None = None
    ) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that can be believed; see `Checkpoints.restore`."""
        template = jax.eval_shape(lambda tree: tree, template)
        return processes.of_first(lambda: self.checkpoints.restore(template, among))
