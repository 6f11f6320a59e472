"""Networks in training, with their arrays: a stage, a cycle's, or a population at once."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import data, processes
from distill_jax.data import Dataset
from distill_jax.identity import digest
from distill_jax.models import Variables
from distill_jax.train import evaluation, inference, metrics, optim, preflight, programs
from distill_jax.train.evaluation import StageResult
from distill_jax.train.feed import Chunk, Feed
from distill_jax.train.guard import is_halted
from distill_jax.train.options import ReplicaInputs, TrainOptions, cache_shapes, caches_teachers
from distill_jax.train.replica import Progress, Replica
from distill_jax.train.stage import Stage, frozen_teachers, steps_per_epoch
from distill_jax.train.state import DeviceDataset, TrainState
from distill_jax.train.step import draw_from, kept_shares
from distill_jax.train.terms import needs_variables

# How long the machine works before it looks up: signals, saves, progress. Each time costs: on a CPU
# the step's memory is asked for anew.
DISPATCH_SECONDS = 2.0


class NotFiniteError(FloatingPointError):
    """More steps were not finite than may be skipped; the state before the last is saved.

    Args:
      message: which, and in what.
      replica: the place among those trained at once.
    """

    def __init__(self, message: str, replica: int = 0):
        super().__init__(message)
        self.replica = replica


class Trainer:
    """Networks in training: a replica, or several whose arrays then have a leading axis for them.

    A replica is a stage, or those of a cycle, which one step trains. The replicas of a population
    have networks, teachers' networks, methods, structure of the recipes and size of the training
    set in common, and nothing else to do with each other: each has checkpoints and results of its
    own.
    """

    def __init__(self, inputs: Sequence[ReplicaInputs], dataset: Dataset, options: TrainOptions):
        self.replicas = [Replica(one, dataset) for one in inputs]
        for replica in self.replicas:
            replica.placed = [other.stages[0].id for other in self.replicas]
        self.alone = len(inputs) == 1
        self.dataset, self.options, self.topology = dataset, options, options.topology
        self.stages, self.recipe = self.replicas[0].stages, self.replicas[0].recipe
        self.steps = steps_per_epoch(self.replicas[0].examples, self.recipe)
        self.cached = caches_teachers(self.stages, dataset, options.teacher_logits)
        streamed = isinstance(dataset.train.images, data.Streamed)
        held = None if streamed else self._device_dataset()
        self.feed = Feed(self.replicas, self.topology, held, options.workers)
        self.eval_split = "test" if self.recipe.selection == "test" else "valid"
        self.split = inference.device_put(
            getattr(dataset, self.eval_split), self.topology, dataset.classes
        )
        self.frozen = self._frozen_variables()
        keys = [jax.random.key(replica.seed) for replica in self.replicas]
        self.key = self._together(keys)
        self.hyper = self._together([replica.hyper for replica in self.replicas])
        program = programs.train_program(
            self.stages,
            self.steps,
            dataset,
            self.topology,
            max_nonfinite_steps=options.max_nonfinite_steps,
            shared_data=None if self.alone else not self.recipe.train_limit,
            own_data=self.feed.own_data,
        )
        self.loop = program.loop
        self.dispatch_size = 1  # steps of the next dispatch, from one epoch to the next
        states = [replica.first_state() for replica in self.replicas]
        processes.check_same(lambda: {"first state": digest(states)})
        self.state = self._together(states)
        self.best = [
            {p.name: self.topology.replicate(state.deployed(p.name)) for p in replica.networks}
            for replica, state in zip(self.replicas, states, strict=True)
        ]
        self.zeros = self._zero_sums(program.body, states[0], keys[0])
        self.sums = self._together([self.zeros for _ in states])

    def _device_dataset(self) -> DeviceDataset:
        """The training images in place, beside the teachers' outputs where these are cached."""
        caches = [r.teacher_cache(self.topology) if self.cached else None for r in self.replicas]
        if self.recipe.train_limit and not self.alone:  # to each its own images
            each = [
                self.topology.hold(DeviceDataset(*replica.dataset.train, cache))
                for replica, cache in zip(self.replicas, caches, strict=True)
            ]
            return self._together(each)
        held = self.topology.hold(DeviceDataset(*self.replicas[0].dataset.train))
        images = self.topology.device_put(held)
        return images._replace(teachers=self._together(caches))

    def _frozen_variables(self) -> Any:
        """The teachers' variables as the step takes them, where it runs teachers at all."""
        if self.cached and not self._needs_variables:
            frozen: list[Any] = [()] * len(self.replicas)
        else:
            networks = frozen_teachers(self.stages)
            frozen = [
                programs.freeze_teachers(networks, replica.teacher_variables, self.topology)
                for replica in self.replicas
            ]
        return frozen[0] if self.alone else self.topology.stack(frozen)

    @property
    def _needs_variables(self) -> bool:
        return any(needs_variables(stage.methods) for stage in self.stages)

    def _zero_sums(self, body: Any, state: TrainState, key: Any) -> dict[str, metrics.StepMetrics]:
        """Where the sums of metrics start.

        On one device the loop's step is the body: given the same, it is traced but once. Elsewhere
        no teacher need be traced for it: their outputs are given as if cached.
        """
        replica = self.replicas[0]
        alike = self.alone and self.topology.count == 1
        given: tuple[Any, ...]
        if alike:
            cached = self.feed.held.teachers if self.feed.held is not None else None
            given = (self.state, self.frozen, self.hyper, self.key)
        else:
            cached = cache_shapes(self.stages, replica.examples)
            teachers = replica.teacher_variables if self._needs_variables else ()
            given = (state, teachers, replica.hyper, key)
        return programs.zero_sums(
            body,
            *given,
            batch_size=self.recipe.batch_size,
            spec=self.dataset.spec,
            cached=cached,
            partners=self.feed.needs_partners,
            where=self.topology.replicated if alike else None,
        )

    # ---------------------------------------------------------------- one replica, and all of them
    def _together(self, trees: list[Any]) -> Any:
        return self.topology.replicate(trees[0]) if self.alone else self.topology.stack(trees)

    def _of(self, i: int, tree: Any) -> Any:
        return tree if self.alone else self.topology.member(i, tree)

    def _variables(self, i: int, network: str) -> Variables:
        """What is evaluated of a network, where it can be; a copy, as the state is donated."""
        return self.topology.replicate(self._of(i, self.state).deployed(network))

    @property
    def step(self) -> int:
        """Steps done."""
        return int(np.min(self.topology.fetch(self.state.step)))

    @property
    def epochs_done(self) -> int:
        """Epochs trained and measured."""
        return len(self.replicas[0].networks[0].history)

    # ------------------------------------------------------------------------- saved and restored
    def _arrays(self, i: int) -> dict[str, Any]:
        state, sums = self._of(i, (self.state, self.sums))
        return {"state": state, "sums": sums, "best": self.best[i]}

    def save(self) -> None:
        """A checkpoint of each replica in its own place, as if it were trained alone."""
        for i, replica in enumerate(self.replicas):
            if replica.checkpoints is not None:
                arrays = self._arrays(i)
                replica.checkpoints.save(int(arrays["state"].step), arrays, replica.meta)

    def restore(self) -> None:
        """Goes to the newest checkpoint that all replicas have; stays where it is without one."""
        places = [r.checkpoints for r in self.replicas if r.checkpoints is not None]
        if len(places) < len(self.replicas):
            return
        among = set.intersection(*(set(place.steps()) for place in places))
        while among:
            restored = [place.restore(self._arrays(i), among) for i, place in enumerate(places)]
            saved = [one for one in restored if one is not None]
            steps = {int(arrays["state"].step) for arrays, _ in saved}
            if len(steps) == 1:
                arrays = [arrays for arrays, _ in saved]
                self.state = self._together([x["state"] for x in arrays])
                self.sums = self._together([x["sums"] for x in arrays])
                self.best = [self.topology.replicate(x["best"]) for x in arrays]
                for replica, (_, meta) in zip(self.replicas, saved, strict=True):
                    replica.restore(meta)
                return
            among = {step for step in among if step <= min(steps)}

    # ------------------------------------------------------------------------------------ training
    def preflight(self) -> None:
        """Evaluates each network's teachers and its loss before the first step."""
        for i, replica in enumerate(self.replicas):
            reports = evaluation.run_preflight(
                replica.stages,
                replica.teachers,
                self._of(i, self.state),
                replica.dataset,
                self.topology,
                [progress.plain_accuracy for progress in replica.networks],
            )
            for progress, report in zip(replica.networks, reports, strict=True):
                progress.preflight = preflight.as_json(report)
                self.options.reporter.notice(report.lines())

    def train_epoch(self) -> Iterator[int]:
        """Trains what is left of the epoch that the history has not seen, and measures it.

        Yields:
          The number of steps of each dispatch, after it.
        """
        epoch, images, seconds = self.epochs_done, 0, 0.0
        first, step = epoch * self.steps, self.step
        for orders in self.feed.orders(epoch):
            replicas, steps, batch_size = orders.rows.shape
            idle = time.perf_counter()
            for chunk in self.feed.chunks(orders, epoch, first, step):
                begin, end = first + chunk.start, first + chunk.start + chunk.steps
                waited = time.perf_counter() - idle
                while step < end:
                    size = min(self.dispatch_size, end - step)
                    took, step = self._dispatch(chunk, step - begin, step - begin + size)
                    images += size * replicas * batch_size
                    seconds, waited, spent = seconds + waited + took, 0.0, waited + took
                    for replica in self.replicas:
                        replica.seconds += spent
                    self.options.reporter.progress(step, images / seconds)
                    self.dispatch_size = _next_size(self.dispatch_size, size, took)
                    yield size
                idle = time.perf_counter()
            first += steps
        self._end_epoch(images / seconds if seconds else 0.0)

    def _dispatch(self, chunk: Chunk, start: int, stop: int) -> tuple[float, int]:
        """Trains from step `start` of a chunk to `stop`; how long that took, and the step then."""
        begun = time.perf_counter()
        self.state, self.sums = self.loop(
            self.state,
            self.sums,
            self.frozen,
            chunk.data,
            chunk.order,
            np.int32(start),
            np.int32(stop),
            self.hyper,
            self.key,
        )
        # Waits for all of it, and is all that comes back to the host.
        step, skipped = self.topology.fetch((self.state.step, self.state.skipped))
        took = processes.largest(time.perf_counter() - begun)  # decides on the next dispatch
        self._check_finite(skipped)
        return took, int(np.min(step))

    def _check_finite(self, skipped: np.ndarray) -> None:
        """Raises NotFiniteError where a replica halted; what was before that step is saved."""
        allowed = self.options.max_nonfinite_steps
        halted = np.atleast_1d(is_halted(skipped, allowed))
        if not halted.any():
            return
        i = int(np.argmax(halted))
        sums, step = jax.device_get(self._of(i, (self.sums, self.state.step)))
        # Whoever goes on from there meets the step again.
        self.state = self.state.replace(skipped=jnp.minimum(self.state.skipped, allowed))
        self.save()
        causes = [
            f"{cause} of {network}" if len(sums) > 1 else cause
            for network, own in sums.items()
            for cause, (count, _) in own.nonfinite.items()
            if count
        ]
        names = ", ".join(stage.network.name for stage in self.stages)
        raise NotFiniteError(
            f"{names}, seed {self.replicas[i].seed}: step {step + 1} of "
            f"{self.steps * self.recipe.epochs} is not finite in {', '.join(causes)}"
            + (f", after {allowed} such steps were skipped" if allowed else "")
            + "; its update was not made, and the state before it is kept. A smaller learning "
            "rate helps, or nonfinite='skip N' to pass over up to N such steps",
            replica=i,
        )

    def _end_epoch(self, images_per_second: float) -> None:
        """Evaluates the epoch just trained; keeps the weights that are the best so far."""
        begun, each = time.perf_counter(), range(len(self.replicas))
        variables = [
            {progress.name: self._variables(i, progress.name) for progress in replica.networks}
            for i, replica in enumerate(self.replicas)
        ]
        evaluated = self._evaluated(variables)
        sums = [self._of(i, self.sums) for i in each]
        for i, replica in enumerate(self.replicas):
            for progress in replica.networks:
                name = progress.name
                record = self._measured(progress, sums[i][name], evaluated[i][name])
                if self._is_best(progress, record):
                    progress.best_epoch = len(progress.history)
                    self.best[i][name] = variables[i][name]
                progress.history.append(
                    {**record, "images_per_second": round(images_per_second, 1)}
                )
                self.options.reporter.epoch_ended(progress.stage, progress.history[-1])
        for replica in self.replicas:
            replica.seconds += time.perf_counter() - begun
        self.sums = self._together([self.zeros for _ in self.replicas])

    def _evaluated(
        self, variables: list[dict[str, Variables]]
    ) -> list[dict[str, dict[str, float]]]:
        """What each network of each replica gives on the split that is watched, of all at once."""
        if not len(self.split.labels):
            return [dict.fromkeys(own, {}) for own in variables]
        pairs = [
            (progress.stage.network, own[progress.name])
            for replica, own in zip(self.replicas, variables, strict=True)
            for progress in replica.networks
        ]
        found = iter(inference.evaluate(pairs, self.split, self.dataset, self.topology))
        return [{p.name: next(found) for p in replica.networks} for replica in self.replicas]

    def _measured(
        self, progress: Progress, sums: metrics.StepMetrics, evaluated: dict[str, float]
    ) -> dict[str, Any]:
        """The record of a network's epoch."""
        epoch, recipe = len(progress.history), progress.stage.recipe
        rate = optim.schedule(recipe.optim, recipe.epochs, self.steps)(self.step - 1)
        record = {"epoch": epoch + 1, "step": self.step, "learning_rate": float(rate)}
        record |= {f"train_{name}": value for name, value in metrics.record(sums).items()}
        record |= self._kept(progress.stage)
        record |= {f"{self.eval_split}_{name}": value for name, value in evaluated.items()}
        self._warn_of_first(progress, record)
        return record

    def _kept(self, stage: Stage) -> dict[str, float]:
        """How often each teacher was kept in the epoch just trained; empty where none is dropped.

        Drawn again: a sum for each would change the programs and the checkpoints.
        """
        draw = draw_from(stage.recipe.dropping, len(stage.teachers))
        if draw is None:
            return {}
        steps = range(self.step - self.steps, self.step)
        shares = np.asarray(kept_shares(draw, jax.random.key(stage.seed), steps, stage.hyper))
        names = (network.name for network in stage.teachers)
        return {f"train_kept_{name}": float(x) for name, x in zip(names, shares, strict=True)}

    def _warn_of_first(self, progress: Progress, record: dict[str, Any]) -> None:
        if progress.stage.phase:  # the labels may count for nothing in it
            return
        loss = record.get(f"{self.eval_split}_loss", record.get("train_ce", 0.0))
        rate = progress.stage.recipe.optim.learning_rate
        warning = preflight.first_epoch_warning(loss, self.dataset.classes, rate)
        if record["epoch"] == 1 and warning:
            self.options.reporter.notice([f"  warning: {progress.name}: {warning}"])

    def _is_best(self, progress: Progress, record: dict[str, Any]) -> bool:
        if self.recipe.selection == "last":
            return True
        name = f"{self.eval_split}_{self.dataset.select_by}"
        value, loss = (record.get(x, math.nan) for x in (name, f"{self.eval_split}_loss"))
        best = -math.inf
        if progress.best_epoch >= 0:
            best = progress.history[progress.best_epoch][name]
        # The later of equals; and never one whose logits are not finite.
        return math.isfinite(loss) and value >= best

    def finish(self) -> list[list[StageResult]]:
        """Scores the test set with each network's weights; of each replica by network."""
        return [
            [self._finish(i, progress) for progress in replica.networks]
            for i, replica in enumerate(self.replicas)
        ]

    def _finish(self, i: int, progress: Progress) -> StageResult:
        name, epochs = progress.name, len(progress.history)
        if progress.best_epoch < 0:
            raise NotFiniteError(
                f"{name}, seed {self.replicas[i].seed}: no epoch gave a number to select by; the "
                f"last was {progress.history[-1]}",
                replica=i,
            )
        state, best = self._of(i, self.state), self.best[i][name]
        last = best if progress.best_epoch + 1 == epochs else state.deployed(name)
        deployed, scored = evaluation.score(
            progress.stage, progress.teachers, best, last, self.dataset, self.topology
        )
        record = {
            **scored,
            **evaluation.valid_metrics(progress.history[progress.best_epoch], self.dataset),
            "best_epoch": progress.best_epoch + 1,
            "epochs": self.recipe.epochs,
            "seconds": round(self.replicas[i].seconds, 2),
            "trained_on": f"{self.topology.kind}, jax {jax.__version__}",
            "skipped_steps": int(state.skipped),
            "state_digest": digest({"best": best, "last": state.only(name)}),
            "preflight": progress.preflight,
        }
        whole = {}
        if progress.stage.phase:
            whole = jax.device_get({"network": best, "methods": state.method_variables(name)})
        return StageResult(deployed, progress.history, record, whole)


def _next_size(size: int, steps: int, seconds: float) -> int:
    """How many steps to dispatch next, so that it lasts about DISPATCH_SECONDS.

    Args:
      size: as many were to be dispatched.
      steps: as many were, at the end of an epoch fewer.
      seconds: that they took.
    """
    if seconds < DISPATCH_SECONDS / 2:
        return max(size, 2 * steps)
    return max(1, int(steps * DISPATCH_SECONDS / seconds))
