"""Trains a whole row once, and says where its time went."""

from __future__ import annotations

import time
from typing import Any

import jax
from absl import logging as absl_logging

import distill_jax
from configs import dgkd_plain
from distill_jax import data
from distill_jax.train.reporter import Reporter
from experiments.benchmark import jax_steps

Request = dict[str, Any]  # smoke, networks, dataset, data_dir, seeds, epochs


class Timeline(Reporter):
    """Seconds by part of a run, without those of compilation, which are a part of their own."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.stages: list[dict[str, Any]] = []
        self.since, self.compiled, self.steps = time.monotonic(), 0.0, 0

    def mark(self, part: str) -> None:
        """What passed since the last mark belongs to `part`."""
        now, compiled = time.monotonic(), jax_steps.compiled_seconds()
        passed = now - self.since - (compiled - self.compiled)
        self.parts[part] = self.parts.get(part, 0.0) + passed
        self.since, self.compiled = now, compiled

    def stage_started(self, stages, step, steps, histories):
        self.steps = steps
        self.mark("set-up")

    def notice(self, lines):
        self.mark("look at teachers and loss")

    def progress(self, step, images_per_second):
        self.mark("training")

    def epoch_ended(self, stage, record):
        self.mark("evaluation")

    def stage_ended(self, stage, record):
        self.mark("end of stage")
        self.stages.append(
            {
                "network": stage.network.name,
                "teachers": [teacher.name for teacher in stage.teachers],
                "batch": stage.recipe.batch_size,
                "steps": stage.recipe.epochs * self.steps,
                "seed": stage.seed,
                "test_accuracy": record["test_accuracy"],
            }
        )


def configured(request: Request) -> Any:
    """The published row in half precision."""
    config = dgkd_plain.get_config("smoke" if request["smoke"] else "")
    config.guidance, config.dtype = ("dense",), "bfloat16"
    config.networks = tuple(request["networks"])
    config.seeds = tuple(request["seeds"]) or config.seeds
    if not request["smoke"]:
        config.dataset.data_dir = request["data_dir"]
        config.dataset.name = request["dataset"]
    if request["epochs"]:
        config.recipe.epochs = request["epochs"]
    return config


def train(request: Request) -> dict[str, Any]:
    """Trains the row by each seed and says how long what took; without seeds only loads data."""
    jax_steps.set_up("")
    absl_logging.set_verbosity(absl_logging.WARNING)  # JAX tells of every platform it looks for
    config, timeline = configured(request), Timeline()
    dataset = data.load(**config.dataset.to_dict())
    timeline.mark("data")
    if not request["seeds"]:
        return {"parts": timeline.parts}
    results = distill_jax.run(config, dataset=dataset, reporter=timeline)
    timeline.mark("end of stage")
    return {
        "parts": {**timeline.parts, "compilation": timeline.compiled},
        "stages": timeline.stages,
        "test_accuracy": [row["test_accuracy"] for row in results.rows],
        "device": jax_steps.described(jax.devices()[0]),
    }
