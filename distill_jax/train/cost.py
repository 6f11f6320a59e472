"""What a stage will cost, from a few of its own steps on drawn weights; nothing is learned."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from distill_jax import data
from distill_jax.data import Dataset
from distill_jax.models import Network
from distill_jax.train import programs
from distill_jax.train.evaluation import StageResult
from distill_jax.train.options import ReplicaInputs, StageInputs, TrainOptions, caches_teachers
from distill_jax.train.sharding import Topology
from distill_jax.train.stage import Stage, frozen_teachers, steps_per_epoch
from distill_jax.train.trainer import Trainer

STEPS = 16  # of which as many are run as MEASURED_SECONDS take
MEASURED_SECONDS = 1.0
FORWARD_EXAMPLES = 512


class StageCost(NamedTuple):
    """The cost of stages that one step trains, without compiling.

    Args:
      step_seconds: of a step.
      seconds: of all of it: steps, evaluation, and the teachers' outputs where they are cached.
      device_bytes: of memory on each device; None where JAX does not say.
    """

    step_seconds: float
    seconds: float
    device_bytes: int | None


class Estimator:
    """Measures stages; what is alike is measured once.

    Args:
      dataset: on what they are to be trained.
      topology: on which devices.
      teacher_logits: see `TrainOptions`.
    """

    def __init__(self, dataset: Dataset, topology: Topology, teacher_logits: str):
        self.dataset, self.topology, self.teacher_logits = dataset, topology, teacher_logits
        self._steps: dict[Any, tuple[float, int | None]] = {}
        self._forward: dict[Network, float] = {}

    def cost(self, stages: Sequence[Stage]) -> StageCost:
        """The cost of stages that one step trains, themselves or those of a cycle."""
        recipe, teachers = stages[0].recipe, frozen_teachers(stages)
        cached = caches_teachers(stages, self.dataset, self.teacher_logits)
        key = (tuple(stage.structure for stage in stages), cached)
        if key not in self._steps:
            self._steps[key] = self._measured(stages, "table" if cached else "graph")
        step_seconds, own_bytes = self._steps[key]
        limited = self.dataset.limited(recipe.train_limit, stages[0].seed)
        examples = len(limited.train.labels)
        seconds = recipe.epochs * steps_per_epoch(examples, recipe) * step_seconds
        valid, test = len(self.dataset.valid.labels), len(self.dataset.test.labels)
        watched = test if recipe.selection == "test" else valid
        for stage in stages:
            seconds += (recipe.epochs * watched + 2 * test) * self._forward_seconds(stage.network)
        for teacher in teachers:
            seconds += (valid + test + cached * examples) * self._forward_seconds(teacher)
        return StageCost(step_seconds, seconds, own_bytes and own_bytes + self._data_bytes(limited))

    def _measured(self, stages: Sequence[Stage], teacher_logits: str) -> tuple[float, int | None]:
        """Seconds of a step, and what it needs of each device's memory besides the data."""
        batch_size, train = stages[0].recipe.batch_size, self.dataset.train
        few = np.resize(np.arange(len(train.labels)), STEPS * batch_size)  # over and over
        train = data.Split(data.take(train.images, few), train.labels[few])
        dataset = dataclasses.replace(self.dataset, train=train)
        inputs = []
        for stage in stages:
            own = dataclasses.replace(stage.recipe, train_limit=0)
            teachers = tuple(_drawn(network) for network in stage.teachers)
            inputs.append(StageInputs(dataclasses.replace(stage, recipe=own, start=""), teachers))
        options = TrainOptions(self.topology, teacher_logits)
        trainer = Trainer([ReplicaInputs(tuple(inputs))], dataset, options)
        trainer.loop = loop = _Loop(trainer.loop)
        dispatches = trainer.train_epoch()
        next(dispatches)  # compiles
        begun, steps, seconds = time.perf_counter(), 0, 0.0
        for size in dispatches:
            steps += size
            seconds = (time.perf_counter() - begun) / steps
            if steps * seconds > MEASURED_SECONDS:
                break
        return seconds, loop.device_bytes

    def _forward_seconds(self, network: Network) -> float:
        """Seconds that a trained network takes for one example."""
        if network not in self._forward:
            test = self.dataset.test
            few = slice(FORWARD_EXAMPLES)
            split = data.Split(data.take(test.images, few), test.labels[few])
            pairs = [(network, network.init(jax.random.key(0)))]
            for _ in range(2):  # the first compiles
                begun = time.perf_counter()
                programs.predict_logits(pairs, split, self.dataset, self.topology)
                took = time.perf_counter() - begun
            self._forward[network] = took / len(split.labels)
        return self._forward[network]

    def _data_bytes(self, dataset: Dataset) -> int:
        if isinstance(dataset.train.images, data.Streamed):
            return 0
        return sum(np.asarray(x).nbytes for x in jax.tree.leaves(tuple(dataset.train)))


class _Loop:
    """A train loop that is compiled at its first call, and knows the memory that it takes."""

    def __init__(self, loop: Callable):
        self.loop = loop
        self.compiled: Any = None
        self.device_bytes: int | None = None

    def __call__(self, *arguments: Any) -> Any:
        if not hasattr(self.loop, "lower"):  # pmap's
            return self.loop(*arguments)
        if self.compiled is None:
            self.compiled = self.loop.lower(*arguments).compile()
            if analysis := self.compiled.memory_analysis():
                data_bytes = sum(x.nbytes for x in jax.tree.leaves(arguments[3]))
                self.device_bytes = (
                    analysis.argument_size_in_bytes
                    + analysis.output_size_in_bytes
                    - analysis.alias_size_in_bytes
                    + analysis.temp_size_in_bytes
                    - data_bytes
                )
        return self.compiled(*arguments)


def _drawn(network: Network) -> StageResult:
    """A teacher with fresh weights."""
    return StageResult(network.init(jax.random.key(0)), [], {})
