"""What there is of networks in training besides their arrays."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from distill_jax.data import Dataset
from distill_jax.models import Network, Variables
from distill_jax.train import evaluation, sharding
from distill_jax.train.evaluation import StageResult
from distill_jax.train.options import ReplicaInputs, StageInputs
from distill_jax.train.stage import frozen_teachers, needs_of
from distill_jax.train.stage_methods import begin_methods, init_methods
from distill_jax.train.state import TrainState
from distill_jax.train.step import init_state
from distill_jax.train.teachers import TeacherOutputs


class Progress:
    """What is known of one network while it is trained."""

    def __init__(self, inputs: StageInputs):
        self.stage, self.teachers, self.plain_accuracy, self.start = inputs
        self.name = self.stage.network.name
        self.history: list[dict[str, Any]] = []
        self.best_epoch = -1
        self.preflight: dict[str, Any] = {}

    def first_state(self, labels: np.ndarray) -> TrainState:
        """The state before the first step: fresh, or with what it starts from."""
        stage, key = self.stage, jax.random.key(self.stage.seed)
        drawn = init_methods(stage, labels, key)
        own = begin_methods(stage, drawn, self.start.get("methods", {}))
        start, averaged = self.start.get("network"), stage.recipe.ema > 0
        optimizer, hyper = stage.recipe.optim, stage.hyper
        return init_state(stage.network, optimizer, key, own, start, averaged, hyper)


class Replica:
    """A stage of a population, or those of a cycle that one step trains."""

    def __init__(self, inputs: ReplicaInputs, dataset: Dataset):
        self.networks = [Progress(one) for one in inputs.stages]
        self.checkpoints = inputs.checkpoints
        self.stages = tuple(progress.stage for progress in self.networks)
        first = self.stages[0]  # in this all of them agree
        self.seed, self.recipe = first.seed, first.recipe
        self.dataset = dataset.limited(self.recipe.train_limit, self.seed)
        self.seconds = 0.0
        self.placed: list[str] = []  # the first stage of each replica that is trained at once

    @property
    def examples(self) -> int:
        """Of its training split."""
        return len(self.dataset.train.labels)

    @property
    def teachers(self) -> dict[Network, StageResult]:
        """The results of all frozen teachers, in the order of `frozen_teachers`."""
        pairs = [
            pair for p in self.networks for pair in zip(p.stage.teachers, p.teachers, strict=True)
        ]
        results = dict(pairs)
        return {network: results[network] for network in frozen_teachers(self.stages)}

    @property
    def teacher_variables(self) -> tuple[Variables, ...]:
        """The variables of the frozen teachers."""
        return tuple(result.variables for result in self.teachers.values())

    @property
    def hyper(self) -> dict[str, Any]:
        """The numbers of the step, by network."""
        return {progress.name: progress.stage.hyper for progress in self.networks}

    @property
    def meta(self) -> dict[str, Any]:
        """What is saved beside the arrays."""
        return {
            "seconds": self.seconds,
            "placed": self.placed,
            "networks": {
                progress.name: {
                    "stage": progress.stage.id,
                    **{name: getattr(progress, name) for name in _KEPT},
                }
                for progress in self.networks
            },
        }

    def restore(self, meta: dict[str, Any]) -> None:
        """Takes what was saved beside the arrays."""
        self.seconds = meta["seconds"]
        for progress in self.networks:
            for name in _KEPT:
                setattr(progress, name, meta["networks"][progress.name][name])

    def first_state(self) -> TrainState:
        """The state before the first step."""
        return TrainState.join([p.first_state(self.dataset.train.labels) for p in self.networks])

    def teacher_cache(self, topology: sharding.Topology) -> TeacherOutputs:
        """The frozen teachers' outputs for every training image."""
        places = self.dataset.places.get("train", slice(None))
        return evaluation.frozen_outputs(
            self.teachers,
            self.dataset.train,
            self.dataset,
            topology,
            needs_of(self.stages),
            lambda result: result.logits["train"][places],
        )


_KEPT = ("history", "best_epoch", "preflight")  # of the progress of a network, with its checkpoints
