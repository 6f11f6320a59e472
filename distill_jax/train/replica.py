"""What there is of one stage of a population besides its arrays in training."""

from __future__ import annotations

from typing import Any

import jax

from distill_jax.data import Dataset
from distill_jax.models import Variables
from distill_jax.train import programs, sharding
from distill_jax.train.options import StageInputs
from distill_jax.train.stage import init_methods
from distill_jax.train.state import TrainState
from distill_jax.train.step import init_state
from distill_jax.train.teachers import TeacherOutputs


class Replica:
    """What there is of one stage besides its arrays in training."""

    def __init__(self, inputs: StageInputs, dataset: Dataset):
        self.stage, self.teachers, self.checkpoints, self.plain_accuracy, self.start = inputs
        self.dataset = dataset.limited(self.stage.recipe.train_limit, self.stage.seed)
        self.history: list[dict[str, Any]] = []
        self.best_epoch, self.seconds = -1, 0.0
        self.preflight: dict[str, Any] = {}

    @property
    def teacher_variables(self) -> tuple[Variables, ...]:
        """The variables of the teachers."""
        return tuple(teacher.variables for teacher in self.teachers)

    @property
    def meta(self) -> dict[str, Any]:
        """What is saved beside the arrays."""
        names = ("history", "best_epoch", "seconds", "preflight")
        return {"stage": self.stage.id, **{name: getattr(self, name) for name in names}}

    def restore(self, meta: dict[str, Any]) -> None:
        """Takes what was saved beside the arrays."""
        for name in ("history", "best_epoch", "seconds", "preflight"):
            setattr(self, name, meta[name])

    def first_state(self) -> TrainState:
        """The state before the first step: fresh, or what the phase before it left."""
        stage, key = self.stage, jax.random.key(self.stage.seed)
        own = init_methods(stage, len(self.dataset.train.labels), key)
        kept = self.start.get("methods", {})
        own |= {name: kept[name] for name in own if _alike(own[name], kept.get(name))}
        return init_state(stage.network, stage.recipe.optim, key, own, self.start.get("network"))

    def teacher_cache(self, topology: sharding.Topology) -> TeacherOutputs:
        """The teachers' outputs for every training image."""
        pairs = list(zip(self.stage.teachers, self.teacher_variables, strict=True))
        train = self.dataset.train
        return programs.teacher_outputs(pairs, train, self.dataset, topology, self.stage.needs)


def _alike(ours: Variables, theirs: Variables | None) -> bool:
    """Whether two trees have the same names, shapes and types."""
    return theirs is not None and jax.eval_shape(lambda: ours) == jax.eval_shape(lambda: theirs)
