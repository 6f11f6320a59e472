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
from distill_jax.models import LogitsTable, Network
from distill_jax.train import inference
from distill_jax.train.evaluation import StageResult
from distill_jax.train.options import ReplicaInputs, StageInputs, TrainOptions, caches_teachers
from distill_jax.train.sharding import Topology
from distill_jax.train.stage import Stage, frozen_teachers, steps_per_epoch
from distill_jax.train.trainer import Trainer

MEASURED_SECONDS = 1.0
FEW_STEPS = 16  # of images that are decoded for it, or asked about
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
        steps = Steps(stages, self.dataset, TrainOptions(self.topology, teacher_logits))
        return steps.seconds(), steps.device_bytes

    def _forward_seconds(self, network: Network) -> float:
        """Seconds that a trained network takes for one example."""
        if isinstance(network, LogitsTable):
            return 0.0
        if network not in self._forward:
            test = self.dataset.test
            few = slice(FORWARD_EXAMPLES)
            split = data.Split(data.take(test.images, few), test.labels[few])
            pairs = [(network, network.init(jax.random.key(0)))]
            for _ in range(2):  # the first compiles
                begun = time.perf_counter()
                inference.predict_logits(pairs, split, self.dataset, self.topology)
                took = time.perf_counter() - begun
            self._forward[network] = took / len(split.labels)
        return self._forward[network]

    def _data_bytes(self, dataset: Dataset) -> int:
        if isinstance(dataset.train.images, data.Streamed):
            return 0
        return sum(np.asarray(x).nbytes for x in jax.tree.leaves(tuple(dataset.train)))


class Steps:
    """Steps of stages that one step trains, on drawn weights, to be timed; the first compiles.

    Args:
      stages: they.
      dataset: on what; of a streamed one, and where teachers' outputs are cached, the first images.
      options: on which devices.
    """

    def __init__(self, stages: Sequence[Stage], dataset: Dataset, options: TrainOptions):
        recipes = [stage.recipe for stage in stages]
        train = dataset.train
        cached = caches_teachers(stages, dataset, options.teacher_logits)
        if cached or isinstance(train.images, data.Streamed):
            few = np.resize(np.arange(len(train.labels)), FEW_STEPS * recipes[0].batch_size)
            train = data.Split(data.take(train.images, few), train.labels[few])
            dataset = dataclasses.replace(dataset, train=train, places={})
            recipes = [dataclasses.replace(recipe, train_limit=0) for recipe in recipes]
        inputs = tuple(
            StageInputs(
                dataclasses.replace(stage, recipe=recipe, start=""),
                tuple(_drawn(network, dataset) for network in stage.teachers),
            )
            for stage, recipe in zip(stages, recipes, strict=True)
        )
        self.trainer = Trainer([ReplicaInputs(inputs)], dataset, options)
        self.trainer.loop = self._loop = _Loop(self.trainer.loop)
        self._dispatches = self.trainer.train_epoch()
        next(self._dispatches)

    @property
    def device_bytes(self) -> int | None:
        """Of memory on each device besides the data; None where JAX does not say."""
        return self._loop.device_bytes

    def seconds(self, least: float = MEASURED_SECONDS) -> float:
        """Seconds of a step, over steps that take `least` seconds together or an epoch's end."""
        steps, took = 0, 0.0
        while not steps:
            begun = time.perf_counter()
            for size in self._dispatches:
                steps, took = steps + size, time.perf_counter() - begun
                if took > least:
                    return took / steps
            self._dispatches = self.trainer.train_epoch()
        return took / steps


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


def _drawn(network: Network, dataset: Dataset) -> StageResult:
    """A teacher with fresh weights, or with zeros in the place of a file of logits."""
    if isinstance(network, LogitsTable):
        zeros = np.zeros((len(dataset.train.labels), network.classes), np.float32)
        return StageResult({"params": {}}, [], {}, logits={"train": zeros})
    return StageResult(network.init(jax.random.key(0)), [], {})
