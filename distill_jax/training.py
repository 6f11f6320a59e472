"""One stage: a network trained under its frozen teachers, from first step to best weights."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import data, fidelity, metrics, models, optim, parallel, preflight, programs
from distill_jax.checkpoint import Checkpoints, digest
from distill_jax.models import Variables
from distill_jax.recipe import Job, check, steps_per_epoch
from distill_jax.report import Reporter
from distill_jax.step import init_state

DISPATCH_SECONDS = 0.5  # how long the machine works before it looks up: signals, saves, progress


class Interrupted(Exception):
    """Training was asked to stop; what it had is saved where there is a place for it."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a stage gives: the selected weights, its history (one dict an epoch) and its record.

    Of an evolving network only the backbone's weights stay, those of `Network.backbone`.
    """

    variables: Variables
    history: list[dict[str, Any]]
    record: dict[str, Any]


class _Stage:
    """The moving parts of a stage in training; saved and restored as one."""

    def __init__(self, job, dataset, frozen, topology, reporter):
        recipe, key = job.recipe, jax.random.key(job.seed)
        self.job, self.topology, self.reporter = job, topology, reporter
        self.dataset = dataset.limited(recipe.train_limit, job.seed)
        self.steps = steps_per_epoch(len(self.dataset.train.labels), recipe)
        self.splits = {
            name: split if isinstance(split.images, data.Streamed) else topology.replicate(split)
            for name in ("train", "valid", "test")
            for split in (getattr(self.dataset, name),)
        }
        self.on_host = tuple(frozen)
        self.frozen, self.key = topology.replicate((self.on_host, key))
        self.loop, body = programs.train_program(
            job.network,
            job.teachers,
            recipe.structure,
            self.steps,
            dataset.mean,
            dataset.std,
            topology,
        )
        self.state = topology.replicate(init_state(job.network, recipe.optim, key))
        self.best = topology.replicate(self.state.variables)
        self.sums = topology.replicate(self._zero_sums(body))
        self.history = []
        self.best_epoch, self.seconds, self.found = -1, 0.0, None

    def _zero_sums(self, body):
        rows = np.zeros(self.job.recipe.batch_size, np.int32)
        one = np.zeros((1, *self.dataset.image_shape), np.uint8), np.zeros(1, np.int32)
        batch = parallel.Topology().batch(None, *one, rows, rows > 0)
        arguments = (self.state, self.frozen, batch, self.job.recipe.hyper, self.key)
        return metrics.zeros_like(jax.eval_shape(body, *arguments)[1])

    # ------------------------------------------------------------------------- saved and restored
    @property
    def step(self):
        return int(self.state.step)

    @property
    def arrays(self):
        return {"state": self.state, "sums": self.sums, "best": self.best}

    @property
    def meta(self):
        return {
            "address": self.job.address,
            "history": self.history,
            "best_epoch": self.best_epoch,
            "seconds": self.seconds,
            "preflight": self.found,
        }

    def restore(self, arrays, meta):
        arrays = self.topology.replicate(arrays)
        self.state, self.sums, self.best = arrays["state"], arrays["sums"], arrays["best"]
        self.history, self.best_epoch = meta["history"], meta["best_epoch"]
        self.seconds, self.found = meta["seconds"], meta["preflight"]

    # ------------------------------------------------------------------------------------ training
    def train_epoch(self, saver):
        """Trains what is left of the epoch that the history has not seen, dispatch by dispatch."""
        recipe, epoch = self.job.recipe, len(self.history)
        whole, rest = data.epoch_order(
            len(self.dataset.train.labels),
            recipe.batch_size,
            seed=self.job.seed,
            epoch=epoch,
            last_batch=recipe.last_batch,
        )
        split = data.at_epoch(self.splits["train"], self.job.seed, epoch)
        first, images, seconds, size = epoch * self.steps, 0, 0.0, 1
        for order in (whole, rest[None]) if rest.size else (whole,):
            idle = time.perf_counter()
            for chunk in data.chunks(split, order, skip=self.step - first):
                resident = self.topology.place((chunk.images, chunk.labels))
                begin, end = first + chunk.start, first + chunk.start + chunk.steps
                waited = time.perf_counter() - idle
                while (step := self.step) < end:
                    size = min(size, end - step)
                    took = self._dispatch(resident, chunk.order, step - begin, step - begin + size)
                    images, seconds = images + size * order.shape[1], seconds + waited + took
                    self.seconds, waited = self.seconds + waited + took, 0.0
                    self.reporter.progress(self.step, images / seconds)
                    saver.after(size)
                    size = _next_size(size, took)
                idle = time.perf_counter()
            first += len(order)
        self._end_epoch(images / seconds if seconds else 0.0)

    def _dispatch(self, resident, order, start, stop):
        begun = time.perf_counter()
        self.state, self.sums = self.loop(
            self.state,
            self.sums,
            self.frozen,
            *resident,
            order,
            np.int32(start),
            np.int32(stop),
            self.job.recipe.hyper,
            self.key,
        )
        jax.block_until_ready(self.sums)
        return time.perf_counter() - begun

    def _end_epoch(self, images_per_second):
        """Measures the epoch just trained and keeps its weights where they are the best so far."""
        begun, recipe, epoch = time.perf_counter(), self.job.recipe, len(self.history)
        rate = optim.schedule(recipe.optim, recipe.epochs, self.steps)(self.step - 1)
        record = {"epoch": epoch + 1, "step": self.step, "learning_rate": float(rate)}
        record |= {f"train_{name}": value for name, value in metrics.compute(self.sums).items()}
        watched = "test" if recipe.selection == "test" else "valid"
        if len(self.splits[watched].labels):
            found = self._evaluate(self.state.variables, watched)
            record |= {f"{watched}_{name}": value for name, value in found.items()}
        value = record.get(f"{watched}_accuracy", math.nan)
        best = self.history[self.best_epoch][f"{watched}_accuracy"] if self.best_epoch >= 0 else -1
        if recipe.selection == "last" or value >= best:  # the later of equals; NaN is never
            self.best_epoch = epoch
            self.best = self.topology.replicate(self.state.variables)
        self.sums = self.topology.replicate(metrics.zeros_like(self.sums))
        self.history.append({**record, "images_per_second": round(images_per_second, 1)})
        self.seconds += time.perf_counter() - begun
        self.reporter.epoch_ended(self.job.address, self.history[-1])

    def _evaluate(self, variables, name):
        return programs.evaluate(
            self.job.network, variables, self.splits[name], self.dataset, self.topology
        )

    def preflight(self, plain_accuracy) -> preflight.Preflight:
        """Looks at the teachers and at the loss before the first step."""
        job, dataset = self.job, self.dataset
        split = dataset.valid if len(dataset.valid.labels) else dataset.train
        logits = [
            programs.predict(network, variables, split, dataset)
            for network, variables in zip(job.teachers, self.on_host, strict=True)
        ]
        some = slice(0, programs.EVAL_BATCH)
        program = programs.outputs_program(job.network, dataset.mean, dataset.std)
        outputs = program(jax.device_get(self.state.variables), np.asarray(split.images[some]))
        taught = jnp.stack([x[some] for x in logits]) if logits else outputs.logits[None][:0]
        teachers = preflight.look_at_teachers(
            tuple(network.name for network in job.teachers), logits, split.labels
        )
        terms = preflight.look_at_terms(
            programs.objective_of(job.network, job.recipe),
            outputs,
            jnp.asarray(split.labels[some]),
            taught,
            job.recipe.hyper,
        )
        warnings = preflight.worry(teachers, terms, plain_accuracy)
        where = "validation" if split is dataset.valid else "training images"
        return preflight.Preflight(teachers, terms, warnings, where)

    def _fidelity(self, best):
        """Agreement with each teacher, KL from it, and calibration, on the test split."""
        job, dataset = self.job, self.dataset
        own = programs.predict(job.network.backbone, best, dataset.test, dataset)
        found = {"ece": fidelity.expected_calibration_error(own, dataset.test.labels)}
        found |= {"agreement": {}, "kl": {}}
        for network, variables in zip(job.teachers, self.on_host, strict=True):
            theirs = programs.predict(network, variables, dataset.test, dataset)
            found["agreement"][network.name] = fidelity.agreement(own, theirs)
            found["kl"][network.name] = fidelity.kl(theirs, own)
        return found

    def finish(self) -> Trained:
        """Scores the test set, once."""
        if self.best_epoch < 0:
            raise FloatingPointError(
                f"{self.job.network.name}: no epoch gave a number to select by; the last was "
                f"{self.history[-1]}"
            )
        deployed = models.deploy(self.job.network, jax.device_get(self.best))
        scored = self._evaluate(self.best, "test")
        record = {
            "parameters": sum(x.size for x in jax.tree.leaves(deployed["params"])),
            "valid_accuracy": self.history[self.best_epoch].get("valid_accuracy"),
            **{f"test_{name}": value for name, value in scored.items() if "accuracy" in name},
            "last_test_accuracy": self._evaluate(self.state.variables, "test")["accuracy"],
            "best_epoch": self.best_epoch + 1,
            "epochs": self.job.recipe.epochs,
            "seconds": round(self.seconds, 2),
            "state_digest": digest({"best": self.best, "last": self.state}),
            **self._fidelity(deployed),
            "preflight": self.found,
        }
        return Trained(deployed, self.history, record)


def adopt(job: Job, dataset: data.Dataset, variables: Variables) -> Trained:
    """A network that comes with its weights: evaluated once, trained never."""
    valid = (
        programs.evaluate(job.network, variables, dataset.valid, dataset)
        if len(dataset.valid.labels)
        else {}
    )
    scored = programs.evaluate(job.network, variables, dataset.test, dataset)
    logits = programs.predict(job.network, variables, dataset.test, dataset)
    record = {
        "parameters": sum(x.size for x in jax.tree.leaves(variables["params"])),
        "valid_accuracy": valid.get("accuracy"),
        "test_accuracy": scored["accuracy"],
        "last_test_accuracy": scored["accuracy"],
        "best_epoch": 0,
        "epochs": 0,
        "seconds": 0.0,
        "state_digest": digest(variables),
        "ece": fidelity.expected_calibration_error(logits, dataset.test.labels),
    }
    return Trained(variables, [], record)


def train(
    job: Job,
    dataset: data.Dataset,
    frozen: tuple[Variables, ...] = (),
    *,
    topology: parallel.Topology = parallel.Topology(),
    checkpoints: Checkpoints | None = None,
    due: Callable[[int, float, float], bool] = lambda steps, epochs, seconds: False,
    reporter: Reporter = Reporter(),
    stop: Callable[[], bool] = lambda: False,
    plain_accuracy: float | None = None,
) -> Trained:
    """Trains one stage, or goes on where its newest checkpoint is.

    Args:
      job: what to train.
      dataset: on what.
      frozen: the variables of `job.teachers`.
      topology: on which devices.
      checkpoints: where to save and restore; None saves nothing.
      due: whether to save, asked after every dispatch with the steps, epochs and seconds since the
        last save.
      reporter: told of progress.
      stop: asked after every dispatch.
      plain_accuracy: validation accuracy of the same network trained alone, where known; a teacher
        below it is warned of.

    Raises:
      ValueError: the stage cannot be trained, see `check`.
      Interrupted: `stop` said so; the state is saved first.
    """
    check(job, dataset, topology)
    stage = _Stage(job, dataset, frozen, topology, reporter)
    if checkpoints is not None and (saved := checkpoints.restore(stage.arrays)):
        stage.restore(*saved)
    reporter.stage_started(job, stage.step, stage.steps, stage.history)
    if not stage.step:
        stage.found = preflight.as_json(found := stage.preflight(plain_accuracy))
        reporter.preflight(found.lines())
    saver = _Saver(stage, checkpoints, due, stop)
    while len(stage.history) < job.recipe.epochs:
        stage.train_epoch(saver)
    return stage.finish()


def _next_size(steps: int, seconds: float) -> int:
    """How many steps to dispatch next, so that it lasts about DISPATCH_SECONDS."""
    if seconds < DISPATCH_SECONDS / 2:
        return 2 * steps
    return max(1, int(steps * DISPATCH_SECONDS / seconds))


class _Saver:
    """Saves a stage when it is due, and when training is asked to stop."""

    def __init__(self, stage, checkpoints, due, stop):
        self.stage, self.checkpoints, self.due, self.stop = stage, checkpoints, due, stop
        self.steps, self.since = 0, time.monotonic()

    def after(self, steps: int) -> None:
        """Told of steps just done."""
        self.steps += steps
        seconds, stopped = time.monotonic() - self.since, self.stop()
        due = self.due(self.steps, self.steps / self.stage.steps, seconds)
        if self.checkpoints is not None and (due or stopped):
            self.checkpoints.save(self.stage.step, self.stage.arrays, self.stage.meta)
            self.steps, self.since = 0, time.monotonic()
        if stopped:
            raise Interrupted
