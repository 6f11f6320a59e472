"""What a run writes down for people and programs to read."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from distill_jax import report
from distill_jax.identity import finite
from distill_jax.runs.plan import Plan
from distill_jax.train import memory
from distill_jax.train.reporter import Reporter


class MetricsFile(Reporter):
    """Appends every epoch to `metrics.jsonl`, one JSON object a line."""

    def __init__(self, path: Path):
        self.path = path
        self.guidance: dict[str, tuple[str, ...]] = {}

    def run_started(self, planned):
        """Takes note of which guidances use a stage."""
        pairs = [pair for x in planned for pair in zip(x.stages, x.guidance, strict=True)]
        self.guidance = {stage.id: labels for stage, labels in pairs}

    def stage_started(self, stages, step, steps, histories):
        """Drops what an interrupted run wrote of these stages after their last checkpoint."""
        if not self.path.exists():
            return
        epochs = {stage.id: len(history) for stage, history in zip(stages, histories, strict=True)}
        # Bytes that are no text make a line that is no JSON, which is dropped.
        lines = self.path.read_text(errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if not self._is_ahead(line, epochs)]
        if kept != lines:
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(kept))
            os.replace(temporary, self.path)

    def epoch_ended(self, stage, record):
        """One line: the stage, its network, teachers, guidances, seed; its record; memory."""
        about = {
            **report.stage_fields(stage),
            "guidance": list(self.guidance.get(stage.id, ())),
        }
        with self.path.open("a") as file:
            file.write(
                json.dumps(finite({**about, **record, **memory.peak()}), allow_nan=False) + "\n"
            )

    @staticmethod
    def _is_ahead(line: str, epochs: dict[str, int]) -> bool:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return True  # the torn last line of a killed run
        if not isinstance(row, dict):
            return True
        return row.get("epoch", 0) > epochs.get(row.get("stage", ""), math.inf)


def guidance_of(plan: Plan) -> dict[str, tuple[str, ...]]:
    """The labels of the guidances that use a stage, as a result or for one, by the stage's id."""
    labels: dict[str, dict[str, None]] = {stage_id: {} for stage_id in plan.stages}
    for (label, *_), result in plan.results.items():
        left = [result]
        while left:
            stage_id = left.pop()
            if stage_id and label not in labels[stage_id]:
                labels[stage_id][label] = None
                left += plan.together[stage_id]
                left += (*plan.teachers[stage_id], plan.stages[stage_id].start)
    return {stage_id: tuple(own) for stage_id, own in labels.items()}
