"""What a run writes down for people and programs to read."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from distill_jax.identity import finite
from distill_jax.train.reporter import Reporter


class MetricsFile(Reporter):
    """Appends every epoch to `metrics.jsonl`, one JSON object a line."""

    def __init__(self, path: Path):
        self.path = path

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
        """One line: the stage, its network and seed, then the epoch's record."""
        about = {"stage": stage.id, "network": stage.network.name, "seed": stage.seed}
        with self.path.open("a") as file:
            file.write(json.dumps(finite({**about, **record}), allow_nan=False) + "\n")

    @staticmethod
    def _is_ahead(line: str, epochs: dict[str, int]) -> bool:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return True  # the torn last line of a killed run
        if not isinstance(row, dict):
            return True
        return row.get("epoch", 0) > epochs.get(row.get("stage", ""), math.inf)
