"""Whether runs end with the same bytes: two that compile for themselves, and one that goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import distill_jax
from distill_jax.train.reporter import Reporter
from experiments.benchmark import jax_steps
from experiments.gpu_row import rows
from experiments.gpu_row.job import Setting
from experiments.gpu_row.lines import Lines


class _Watch(Reporter):
    """Notes where the run goes on; ends its process in the last epoch of its second stage."""

    def __init__(self, kill: bool):
        self.kill, self.stages, self.epoch = kill, 0, 0
        self.from_step: dict[str, int] = {}

    def stage_started(self, stages, step, steps, histories):
        self.stages, self.epoch = self.stages + 1, steps
        if step:
            self.from_step[stages[0].network.name] = step

    def progress(self, step, examples_per_second):
        if self.kill and self.stages == 2 and step > self.epoch:
            os.kill(os.getpid(), signal.SIGKILL)


def config(setting: Setting, deterministic: bool) -> Any:
    """A chain with augmentation and dropped teachers, saved every few steps."""
    images, batch, first = (256, 32, ()) if setting.smoke else (4096, 128, ("plane6",))
    told = distill_jax.default_config()
    told.networks, told.teacher_logits = (*first, "plane4", "plane2"), "graph"
    told.guidance = ("dense", "dense+drop") if first else ("dense",)
    told.dataset.name = f"synthetic:32x32x3:10:{images}:256"
    told.recipe.update(epochs=2, batch_size=batch, augment="crop_flip")
    told.update(dtype="bfloat16", deterministic=deterministic, checkpoint_every="3 steps")
    return rows.changed(told, setting.changes)


def train(
    lines: Lines,
    setting: Setting,
    *,
    name: str,
    deterministic: bool,
    cache: str,
    kill: bool = False,
) -> None:
    """Trains, and appends the digests of the weights.

    Args:
      lines: where to.
      setting: of the command.
      name: of the run; "killed" and "resumed" are one.
      deterministic: the field of the config.
      cache: a name for what is compiled: runs of the same share it.
      kill: whether the process ends itself on the way.
    """
    folder = Path(setting.scratch) / "digests"
    jax_steps.set_up(str(folder / cache))
    watch = _Watch(kill)
    kept = f"{'deterministic' if deterministic else 'default'}-{name.replace('killed', 'resumed')}"
    results = distill_jax.run(
        config(setting, deterministic), workdir=folder / "runs" / kept, reporter=watch
    )
    digests = [row["state_digest"] for row in results.rows]
    lines.add(
        name=name, deterministic=deterministic, digests=digests, from_step=watch.from_step
    )  # fmt: skip
