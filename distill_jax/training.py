"""One stage: a network trained under its frozen teachers, from first step to best weights."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import data, fidelity, metrics, models, optim, parallel, preflight
from distill_jax.checkpoint import Checkpoints, digest
from distill_jax.dropping import Dropping
from distill_jax.losses import EvolveOptions, LossOptions
from distill_jax.models import Network, Variables
from distill_jax.report import Reporter
from distill_jax.step import (
    Hyper,
    Objective,
    draw_from,
    evolving_objective,
    init_state,
    make_eval_step,
    make_predict_step,
    make_train_step,
    multi_teacher_objective,
)

SELECTIONS = ("validation", "test", "last")
EVAL_BATCH = 256
DISPATCH_SECONDS = 0.5  # how long the machine works before it looks up: signals, saves, progress


class Interrupted(Exception):
    """Training was asked to stop; what it had is saved where there is a place for it."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one network is trained.

    Args:
      epochs: passes over the training split.
      batch_size: examples of a step, over all devices.
      last_batch: "drop" the partial batch of an epoch, or "keep" it as a smaller one.
      augment: a name in `data.AUGMENT`.
      train_limit: training images per class, chosen by the stage's seed; 0 takes all.
      selection: weights are those of the best epoch on "validation" (the later of equals), of the
        best on "test" (as the papers' codes do; biased upwards), or of the "last" epoch.
      sync_bn: BatchNorm sees the whole batch over all devices.
      temperature: T > 0.
      kd_weight: λ in [0, 1].
      survival: probability that a source survives "bernoulli" dropping.
      loss: how the terms are counted.
      evolve: how an evolving network and its branches teach each other.
      dropping: which teachers are dropped.
      optim: the optimizer and its schedule.

    Raises:
      ValueError: a value out of its range, naming it.
    """

    epochs: int = 1
    batch_size: int = 128
    last_batch: str = "drop"
    augment: str = "none"
    train_limit: int = 0
    selection: str = "validation"
    sync_bn: bool = True
    temperature: float = 1.0
    kd_weight: float = 0.0
    survival: float = 1.0
    loss: LossOptions = LossOptions()
    evolve: EvolveOptions = EvolveOptions()
    dropping: Dropping = Dropping()
    optim: optim.OptimOptions = optim.OptimOptions()

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("train_limit", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {least} or more, got {getattr(self, name)}")
        for name, allowed in (
            ("last_batch", ("drop", "keep")),
            ("augment", tuple(data.AUGMENT)),
            ("selection", SELECTIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {allowed}, got {getattr(self, name)!r}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature is a number above 0, got {self.temperature}")
        for name in ("kd_weight", "survival"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is between 0 and 1, got {getattr(self, name)}")

    @property
    def hyper(self) -> Hyper:
        """The numbers that the step takes as arguments."""
        optimizer = self.optim
        numbers = (
            optimizer.learning_rate,
            optimizer.weight_decay,
            self.temperature,
            self.kd_weight,
            self.survival,
        )
        return Hyper(*(jnp.asarray(number, jnp.float32) for number in numbers))

    @property
    def structure(self) -> Recipe:
        """The rest, which decides what is compiled: the recipe with every number of `hyper` set."""
        unit = dataclasses.replace(self.optim, learning_rate=1.0, weight_decay=0.0)
        return dataclasses.replace(
            self, optim=unit, temperature=1.0, kd_weight=0.0, survival=1.0, train_limit=0
        )


@dataclasses.dataclass(frozen=True)
class Job:
    """A stage ready to be trained: the network, its teachers' networks, its recipe and its seed."""

    network: Network
    teachers: tuple[Network, ...]
    recipe: Recipe
    seed: int
    address: str = ""
    weights: str = ""  # the file that they are read from, where it is not trained


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a stage gives: the selected weights, its history (one dict an epoch) and its record.

    Of an evolving network only the backbone's weights stay, those of `Network.backbone`.
    """

    variables: Variables
    history: list[dict[str, Any]]
    record: dict[str, Any]


def steps_per_epoch(examples: int, recipe: Recipe) -> int:
    """Steps of one epoch over `examples`.

    Raises:
      ValueError: a batch larger than the training split.
    """
    if recipe.batch_size > examples:
        raise ValueError(f"batch_size {recipe.batch_size} is larger than the {examples} examples")
    partial = recipe.last_batch == "keep" and examples % recipe.batch_size > 0
    return examples // recipe.batch_size + partial


def check(job: Job, dataset: data.Dataset, topology: parallel.Topology) -> None:
    """Raises ValueError where the stage cannot be trained; nothing is compiled yet."""
    recipe = job.recipe
    if job.weights and job.network.branches:
        raise ValueError(
            f"weights are read for {job.network.backbone.name}, not {job.network.name}"
        )
    if job.network.branches and len(recipe.evolve.branch_weights) not in (0, job.network.branches):
        raise ValueError(
            f"{job.network.name} has {job.network.branches} branches, branch_weights gives "
            f"{recipe.evolve.branch_weights}"
        )
    examples = len(dataset.limited(recipe.train_limit, job.seed).train.labels)
    steps_per_epoch(examples, recipe)
    topology.check_batch(recipe.batch_size)
    if recipe.last_batch == "keep":
        topology.check_batch(examples % recipe.batch_size)
    if topology.mode == "jit" and topology.count > 1 and not recipe.sync_bn:
        raise ValueError("sync_bn=False needs parallel='pmap': one program sees the whole batch")
    if recipe.selection == "validation" and not len(dataset.valid.labels):
        raise ValueError(
            "selection 'validation' needs a validation split, and valid_fraction is 0; choose "
            "selection 'last', or 'test' as the papers do"
        )
    if not len(dataset.test.labels):
        raise ValueError("the test split is empty")
    if job.teachers:
        recipe.dropping.check(len(job.teachers))
    for network in (job.network, *job.teachers):
        if (network.classes, network.image_shape) != (dataset.classes, dataset.image_shape):
            raise ValueError(
                f"{network.name} takes {network.image_shape} images of {network.classes} classes, "
                f"{dataset.name} has {dataset.image_shape} and {dataset.classes}"
            )


def objective_of(network: models.Network, recipe: Recipe) -> Objective:
    """What a network minimises: its teachers' loss, or TESKD's where it carries branches."""
    if network.branches:
        return evolving_objective(recipe.evolve, recipe.loss)
    return multi_teacher_objective(recipe.loss)


@functools.lru_cache(maxsize=32)
def _train_program(network, teachers, structure, steps, mean, std, topology):
    """The compiled train loop and, with its step for shapes alone, its empty metrics."""
    augment = data.AUGMENT[structure.augment]

    def step(axis_name):
        return make_train_step(
            network=network,
            teachers=teachers,
            optimizer=structure.optim,
            schedule=optim.schedule(structure.optim, structure.epochs, steps),
            objective=objective_of(network, structure),
            prepare=lambda keys, images: data.normalise(augment(keys, images), mean, std),
            draw_keep=draw_from(structure.dropping, len(teachers)),
            axis_name=axis_name,
            sync_bn=structure.sync_bn,
        )

    return parallel.train_loop(step(topology.axis_name), topology), step(None)


@functools.lru_cache(maxsize=32)
def _eval_program(network, mean, std, topology):
    step = make_eval_step(
        network=network,
        prepare=lambda images: data.normalise(images, mean, std),
        axis_name=topology.axis_name,
    )
    return parallel.eval_loop(step, topology)


def evaluate(
    network: Network,
    variables: Variables,
    split: data.Split,
    dataset: data.Dataset,
    topology: parallel.Topology = parallel.Topology(),
) -> dict[str, float]:
    """Accuracy and cross-entropy over a whole split, every example counted once.

    Args:
      network: the network.
      variables: its variables.
      split: images and labels.
      dataset: gives the normalisation.
      topology: where to run it.
    """
    program = _eval_program(network, dataset.mean, dataset.std, topology)
    batch = -(-min(EVAL_BATCH, len(split.labels)) // topology.count) * topology.count
    order, mask = data.eval_order(len(split.labels), batch)
    return metrics.compute(program(variables, split.images, split.labels, order, mask))


@functools.lru_cache(maxsize=32)
def _predict_program(network, mean, std):
    return parallel.predict_loop(
        make_predict_step(network=network, prepare=lambda images: data.normalise(images, mean, std))
    )


def predict(
    network: Network, variables: Variables, split: data.Split, dataset: data.Dataset
) -> np.ndarray:
    """The (N, C) float32 logits of a whole split; `dataset` gives the normalisation."""
    n = len(split.labels)
    order, mask = data.eval_order(n, min(EVAL_BATCH, n))
    program = _predict_program(network, dataset.mean, dataset.std)
    logits = program(variables, split.images, split.labels, order, mask)
    return np.asarray(logits).reshape(-1, network.classes)[:n]


@functools.lru_cache(maxsize=32)
def _outputs_program(network, mean, std):
    # By the batch's own statistics: an untrained network has no others.
    return jax.jit(
        lambda variables, images: network.apply(
            variables, data.normalise(images, mean, std), train=True
        )[0]
    )


class _Stage:
    """The moving parts of a stage in training; saved and restored as one."""

    def __init__(self, job, dataset, frozen, topology, reporter):
        recipe, key = job.recipe, jax.random.key(job.seed)
        self.job, self.topology, self.reporter = job, topology, reporter
        self.dataset = dataset.limited(recipe.train_limit, job.seed)
        self.steps = steps_per_epoch(len(self.dataset.train.labels), recipe)
        self.splits = {
            name: topology.replicate(getattr(self.dataset, name))
            for name in ("train", "valid", "test")
        }
        self.on_host = tuple(frozen)
        self.frozen, self.key = topology.replicate((self.on_host, key))
        self.loop, body = _train_program(
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
        batch = parallel.Topology().batch(None, *self.dataset.train, rows, rows > 0)
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
        first, images, seconds, size = epoch * self.steps, 0, 0.0, 1
        for order in (whole, rest[None]) if rest.size else (whole,):
            while (done := self.step - first) < len(order):
                size = min(size, len(order) - done)
                took = self._dispatch(order, done, done + size)
                images, seconds = images + size * order.shape[1], seconds + took
                self.seconds += took
                self.reporter.progress(self.step, images / seconds)
                saver.after(size)
                size = (
                    size * 2
                    if took < DISPATCH_SECONDS / 2
                    else max(1, int(size * DISPATCH_SECONDS / took))
                )
            first += len(order)
        self._end_epoch(images / seconds if seconds else 0.0)

    def _dispatch(self, order, start, stop):
        begun = time.perf_counter()
        self.state, self.sums = self.loop(
            self.state,
            self.sums,
            self.frozen,
            *self.splits["train"],
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
        return evaluate(self.job.network, variables, self.splits[name], self.dataset, self.topology)

    def preflight(self, plain_accuracy) -> preflight.Preflight:
        """Looks at the teachers and at the loss before the first step."""
        job, dataset = self.job, self.dataset
        split = dataset.valid if len(dataset.valid.labels) else dataset.train
        logits = [
            predict(network, variables, split, dataset)
            for network, variables in zip(job.teachers, self.on_host, strict=True)
        ]
        some = slice(0, EVAL_BATCH)
        program = _outputs_program(job.network, dataset.mean, dataset.std)
        outputs = program(jax.device_get(self.state.variables), split.images[some])
        taught = jnp.stack([x[some] for x in logits]) if logits else outputs.logits[None][:0]
        teachers = preflight.look_at_teachers(
            tuple(network.name for network in job.teachers), logits, split.labels
        )
        terms = preflight.look_at_terms(
            objective_of(job.network, job.recipe),
            outputs,
            jnp.asarray(split.labels[some]),
            taught,
            job.recipe.hyper,
        )
        return preflight.Preflight(
            teachers, terms, preflight.worry(teachers, terms, plain_accuracy)
        )

    def _fidelity(self, best):
        """Agreement with each teacher, KL from it, and calibration, on the test split."""
        job, dataset = self.job, self.dataset
        own = predict(job.network.backbone, best, dataset.test, dataset)
        found = {"ece": fidelity.expected_calibration_error(own, dataset.test.labels)}
        found |= {"agreement": {}, "kl": {}}
        for network, variables in zip(job.teachers, self.on_host, strict=True):
            theirs = predict(network, variables, dataset.test, dataset)
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
        evaluate(job.network, variables, dataset.valid, dataset)
        if len(dataset.valid.labels)
        else {}
    )
    scored = evaluate(job.network, variables, dataset.test, dataset)
    logits = predict(job.network, variables, dataset.test, dataset)
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
