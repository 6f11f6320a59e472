"""The config of each method, what its training gave, and what a step of it takes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections

import distill_jax
from distill_jax.runs.config import resolve
from distill_jax.runs.prepare import prepare
from distill_jax.train.cost import Steps
from distill_jax.train.options import TrainOptions
from distill_jax.train.stage_methods import method_shapes
from experiments.compare.settings import PLAIN, SETTINGS

CONFIG = Path(__file__).parents[2] / "configs" / "compare_cifar100.py"


def config_of(method: str, given: argparse.Namespace) -> ml_collections.ConfigDict:
    """The config that trains the student of a pair by one method.

    Raises:
      ValueError: no such pair, or fields that the config refuses.
    """
    config = distill_jax.load_config(f"{CONFIG}:{given.pair}")
    setting = SETTINGS[method].of_pair(given.pair)
    config.name = f"{config.name}_{method}"
    config.dataset.update(name=given.dataset, data_dir=given.data_dir)
    config.seeds = tuple(range(given.seeds))
    config.recipe.update(epochs=given.epochs, batch_size=given.batch_size)
    config.recipe.update(train_limit=given.train_limit, augment=given.augment)
    if given.devices:
        config.devices = given.devices
    if method == PLAIN:
        config.guidance, config.students = (PLAIN,), config.networks
        return config
    config.guidance = ("direct",)
    setting.apply(config)
    return config


def adapter_parameters(config: ml_collections.ConfigDict) -> int:
    """How many parameters the student's methods train beside it, all phases together.

    Everything is checked on the way, and nothing compiled.

    Raises:
      ValueError: the networks cannot be trained so.
    """
    prepared = prepare(resolve(config))
    seed = config.seeds[0]
    own = [
        stage
        for stage in prepared.plan.stages.values()
        if stage.teachers and stage.seed == seed and stage.network.name == config.networks[-1]
    ]
    labels = prepared.dataset.train.labels
    shapes = [x for stage in own for x in method_shapes(stage, labels).values()]
    params = jax.tree.leaves([variables.get("params", {}) for variables in shapes])
    return sum(leaf.size for leaf in params)


def step_seconds(configs: Mapping[str, ml_collections.ConfigDict], rounds: int) -> dict[str, float]:
    """Seconds of the student's step by each method: the least of `rounds`, measured in turns.

    Side by side, as a machine is not as fast at one time as at another. Weights are drawn: what a
    step takes does not depend on them.
    """
    steps, dataset = {}, None
    for name, config in configs.items():
        prepared = prepare(resolve(config), dataset)
        experiment, dataset = prepared.experiment, prepared.dataset
        options = TrainOptions(experiment.topology, experiment.teacher_logits)
        *_, stage = (
            stage
            for stage in prepared.plan.stages.values()
            if stage.network.name == config.networks[-1]
        )
        steps[name] = Steps([stage], dataset, options)
    turns = [{name: own.seconds() for name, own in steps.items()} for _ in range(rounds)]
    return {name: min(turn[name] for turn in turns) for name in steps if turns}


class Trained(NamedTuple):
    """What training by one method gave.

    Args:
      method: its name.
      pair: TEACHER:STUDENT.
      accuracies: of the student on the test set, by seed.
      adapters: parameters that are trained beside the student.
      teacher_accuracy: where it was asked for.
    """

    method: str
    pair: str
    accuracies: dict[int, float]
    adapters: int
    teacher_accuracy: float | None

    @classmethod
    def of(cls, method: str, pair: str, results: distill_jax.Results, adapters: int) -> Trained:
        """Of the results of a run."""
        teacher, _, student = pair.partition(":")
        rows = {
            name: [r for r in results.rows if r["network"] == name] for name in (teacher, student)
        }
        return cls(
            method=method,
            pair=pair,
            accuracies={row["seed"]: row["test_accuracy"] for row in rows[student]},
            adapters=adapters,
            teacher_accuracy=rows[teacher][0]["test_accuracy"] if rows[teacher] else None,
        )
