"""The moving parts of stages in training: of one, or of a population that is trained at once."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import data
from distill_jax.data import Dataset
from distill_jax.identity import digest
from distill_jax.models import Variables
from distill_jax.train import metrics, optim, preflight, programs, scoring, sharding
from distill_jax.train.options import Asked, Means, check_table
from distill_jax.train.recipe import steps_per_epoch
from distill_jax.train.scoring import Trained
from distill_jax.train.step import NOT_FINITE, Resident, init_state, is_halted

# How long the machine works before it looks up: signals, saves, progress. Each time costs: on a CPU
# the step's memory is asked for anew, 0.2 s for ResNet-56, whose steps take 0.8 s.
DISPATCH_SECONDS = 2.0


class NotFiniteError(FloatingPointError):
    """More steps were not finite than may be skipped; the state before the last is saved."""


class Member:
    """What there is of one stage besides its arrays."""

    def __init__(self, asked: Asked, dataset: Dataset):
        self.job, self.teachers, self.checkpoints, self.plain_accuracy = asked
        self.dataset = dataset.limited(self.job.recipe.train_limit, self.job.seed)
        self.history: list[dict[str, Any]] = []
        self.best_epoch, self.seconds = -1, 0.0
        self.preflight: dict[str, Any] = {}

    @property
    def frozen(self) -> tuple[Variables, ...]:
        """The variables of the teachers."""
        return tuple(teacher.variables for teacher in self.teachers)

    @property
    def meta(self) -> dict[str, Any]:
        """What is saved beside the arrays."""
        names = ("history", "best_epoch", "seconds", "preflight")
        return {"address": self.job.address, **{name: getattr(self, name) for name in names}}

    def restore(self, meta: dict[str, Any]) -> None:
        """Takes what was saved beside the arrays."""
        for name in ("history", "best_epoch", "seconds", "preflight"):
            setattr(self, name, meta[name])

    def table(self, topology: sharding.Topology) -> np.ndarray:
        """(N, K, C) logits of the teachers for every training image."""
        said = scoring.what_teachers_say(self.job, self.teachers, "train", self.dataset, topology)
        return said.swapaxes(0, 1)


class _Chunk(NamedTuple):
    """Some steps of an epoch, from its step `start` on, with the examples that they need."""

    start: int
    steps: int
    data: Resident
    order: np.ndarray  # (S, B), or (members, S, B)


class Group:
    """Stages in training: one, or several whose arrays then have a leading axis of members.

    The members of a population have network, teachers' networks, structure of the recipe and size
    of the training set in common, and nothing else to do with each other: each has checkpoints and
    results of its own.
    """

    def __init__(self, asked: Sequence[Asked], dataset: Dataset, means: Means):
        self.members = [Member(one, dataset) for one in asked]
        self.alone = len(asked) == 1
        self.dataset, self.means, self.topology = dataset, means, means.topology
        job = self.members[0].job
        self.recipe, self.network = job.recipe, job.network
        self.steps = steps_per_epoch(len(self.members[0].dataset.train.labels), self.recipe)
        self.streamed = isinstance(dataset.train.images, data.Streamed)
        table = check_table(job, dataset, means.teacher_logits)
        self.data = None if self.streamed else self._resident(table)
        self.watched = "test" if self.recipe.selection == "test" else "valid"
        self.split = programs.place(getattr(dataset, self.watched), self.topology)
        frozen = [
            () if table else programs.prepare(job.teachers, m.frozen, self.topology)
            for m in self.members
        ]
        self.frozen = frozen[0] if self.alone else self.topology.spread(frozen)
        keys = [jax.random.key(m.job.seed) for m in self.members]
        self.key = self._together(keys)
        self.hyper = self._together([m.job.recipe.hyper for m in self.members])
        program = programs.train_program(
            self.network,
            job.teachers,
            self.recipe.structure,
            self.steps,
            dataset.mean,
            dataset.std,
            self.topology,
            may_skip=means.may_skip,
            shared_data=None if self.alone else not self.recipe.train_limit,
        )
        self.loop = program.loop
        states = [init_state(self.network, self.recipe.optim, key) for key in keys]
        self.state = self._together(states)
        self.best = [self.topology.replicate(state.variables) for state in states]
        # On one device the loop's step is the body: told the same, it is traced but once. Elsewhere
        # no teacher need be traced for it.
        alike = self.alone and self.topology.count == 1
        told = (states[0], (), self.recipe.hyper, keys[0])
        self.zeros = programs.zero_sums(
            program.body,
            *((self.state, self.frozen, self.hyper, self.key) if alike else told),
            batch_size=self.recipe.batch_size,
            image_shape=dataset.image_shape,
            table=(len(job.teachers), dataset.classes) if table or not alike else None,
            where=self.topology.replicated if alike else None,
        )
        self.sums = self._together([self.zeros for _ in states])

    def _resident(self, table: bool) -> Resident:
        """The training images in place, beside the teachers' logits where there is a table."""
        logits = [m.table(self.topology) if table else None for m in self.members]
        if self.recipe.train_limit and not self.alone:  # to each its own images
            return self._together(
                [Resident(*m.dataset.train, x) for m, x in zip(self.members, logits, strict=True)]
            )
        images = self.topology.place(Resident(*self.members[0].dataset.train))
        return images._replace(teacher_logits=self._together(logits))

    # ---------------------------------------------------------------- one member, and all of them
    def _together(self, trees: list[Any]) -> Any:
        return self.topology.replicate(trees[0]) if self.alone else self.topology.spread(trees)

    def _of(self, i: int, tree: Any) -> Any:
        return tree if self.alone else self.topology.member(i, tree)

    def _variables(self, i: int) -> Variables:
        """The weights of a member where they can be evaluated; a copy, as the state is donated."""
        return self.topology.replicate(self._of(i, self.state.variables))

    @property
    def step(self) -> int:
        """Steps done."""
        return int(np.min(jax.device_get(self.state.step)))

    @property
    def epochs_done(self) -> int:
        """Epochs trained and measured."""
        return len(self.members[0].history)

    # ------------------------------------------------------------------------- saved and restored
    def _arrays(self, i: int) -> dict[str, Any]:
        state, sums = self._of(i, (self.state, self.sums))
        return {"state": state, "sums": sums, "best": self.best[i]}

    def save(self) -> None:
        """A checkpoint of each member in its own place, as if it were trained alone."""
        for i, member in enumerate(self.members):
            if member.checkpoints is not None:
                arrays = self._arrays(i)
                member.checkpoints.save(int(arrays["state"].step), arrays, member.meta)

    def restore(self) -> None:
        """Goes to the newest checkpoint that all members have; stays where it is without one."""
        places = [m.checkpoints for m in self.members if m.checkpoints is not None]
        if len(places) < len(self.members):
            return
        among = set.intersection(*(set(place.steps()) for place in places))
        while among:
            found = [place.restore(self._arrays(i), among) for i, place in enumerate(places)]
            saved = [one for one in found if one is not None]
            steps = {int(arrays["state"].step) for arrays, _ in saved}
            if len(steps) == 1:
                arrays = [arrays for arrays, _ in saved]
                self.state = self._together([x["state"] for x in arrays])
                self.sums = self._together([x["sums"] for x in arrays])
                self.best = [self.topology.replicate(x["best"]) for x in arrays]
                for member, (_, meta) in zip(self.members, saved, strict=True):
                    member.restore(meta)
                return
            among = {step for step in among if step <= min(steps)}

    # ------------------------------------------------------------------------------------ training
    def look_before(self) -> None:
        """Looks at each member's teachers and loss before the first step."""
        for i, m in enumerate(self.members):
            fresh = self._variables(i)
            found = scoring.look_before(
                m.job, m.teachers, fresh, m.dataset, self.topology, m.plain_accuracy
            )
            m.preflight = preflight.as_json(found)
            self.means.reporter.notice(found.lines())

    def train_epoch(self) -> Iterator[int]:
        """Trains what is left of the epoch that the history has not seen, and measures it.

        Yields:
          The number of steps of each dispatch, after it.
        """
        epoch, images, seconds, size = self.epochs_done, 0, 0.0, 1
        first = epoch * self.steps
        for orders in self._orders(epoch):
            idle = time.perf_counter()
            for chunk in self._chunks(orders, epoch, skip=self.step - first):
                begin, end = first + chunk.start, first + chunk.start + chunk.steps
                waited = time.perf_counter() - idle
                while (step := self.step) < end:
                    size = min(size, end - step)
                    took = self._dispatch(chunk, step - begin, step - begin + size)
                    images += size * orders.shape[0] * orders.shape[2]
                    seconds, waited, spent = seconds + waited + took, 0.0, waited + took
                    for member in self.members:
                        member.seconds += spent
                    self.means.reporter.progress(self.step, images / seconds)
                    yield size
                    size = _next_size(size, took)
                idle = time.perf_counter()
            first += orders.shape[1]
        self._end_epoch(images / seconds if seconds else 0.0)

    def _orders(self, epoch: int) -> list[np.ndarray]:
        """Who sees which examples when, (members, S, B); a smaller last batch apart."""
        orders = [
            data.epoch_order(
                len(m.dataset.train.labels),
                self.recipe.batch_size,
                seed=m.job.seed,
                epoch=epoch,
                last_batch=self.recipe.last_batch,
            )
            for m in self.members
        ]
        whole = np.stack([order for order, _ in orders])
        rest = np.stack([order[None] for _, order in orders])
        return [whole, rest] if rest.size else [whole]

    def _chunks(self, orders: np.ndarray, epoch: int, skip: int) -> Iterator[_Chunk]:
        """The steps of `orders`, from the chunk that holds step `skip` on."""
        if self.streamed:
            split = data.at_epoch(self.dataset.train, self.members[0].job.seed, epoch)
            for chunk in data.chunks(split, orders[0], skip=skip):
                placed = self.topology.place(Resident(chunk.images, chunk.labels))
                yield _Chunk(chunk.start, chunk.steps, placed, chunk.order)
        elif self.data is not None and skip < orders.shape[1]:
            yield _Chunk(0, orders.shape[1], self.data, orders[0] if self.alone else orders)

    def _dispatch(self, chunk: _Chunk, start: int, stop: int) -> float:
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
        jax.block_until_ready(self.sums)
        took = time.perf_counter() - begun
        self._check_finite()
        return took

    def _check_finite(self) -> None:
        """Raises NotFiniteError where a member has halted; what was before that step is saved."""
        may_skip = self.means.may_skip
        halted = np.atleast_1d(jax.device_get(is_halted(self.state, may_skip)))
        if not halted.any():
            return
        i = int(np.argmax(halted))
        counts, step = jax.device_get(self._of(i, (self.sums, self.state.step)))
        # Whoever goes on from there meets the step again.
        self.state = self.state.replace(skipped=jnp.minimum(self.state.skipped, may_skip))
        self.save()
        job = self.members[i].job
        causes = [
            name.removeprefix(NOT_FINITE)
            for name, (count, _) in counts.items()
            if name.startswith(NOT_FINITE) and count
        ]
        raise NotFiniteError(
            f"{job.network.name}, seed {job.seed}: step {step + 1} of "
            f"{self.steps * self.recipe.epochs} is not finite in {', '.join(causes)}"
            + (f", after {may_skip} such steps were skipped" if may_skip else "")
            + "; its update was not made, and the state before it is kept. A smaller learning "
            "rate helps, or nonfinite='skip N' to pass over up to N such steps"
        )

    def _end_epoch(self, images_per_second: float) -> None:
        """Measures the epoch just trained; keeps the weights that are the best so far."""
        recipe, epoch = self.recipe, self.epochs_done
        for i, member in enumerate(self.members):
            begun = time.perf_counter()
            schedule = optim.schedule(member.job.recipe.optim, recipe.epochs, self.steps)
            rate = schedule(self.step - 1)
            record = {"epoch": epoch + 1, "step": self.step, "learning_rate": float(rate)}
            trained = metrics.compute(self._of(i, self.sums))
            record |= {f"train_{k}": v for k, v in trained.items() if NOT_FINITE not in k}
            variables = self._variables(i)
            if len(self.split.labels):
                found = programs.evaluate(
                    self.network, variables, self.split, self.dataset, self.topology
                )
                record |= {f"{self.watched}_{name}": value for name, value in found.items()}
            if self._is_best(member, record):
                member.best_epoch, self.best[i] = epoch, variables
            member.history.append({**record, "images_per_second": round(images_per_second, 1)})
            member.seconds += time.perf_counter() - begun
            self.means.reporter.epoch_ended(member.job, member.history[-1])
        self.sums = self._together([self.zeros for _ in self.members])

    def _is_best(self, member: Member, record: dict[str, Any]) -> bool:
        if self.recipe.selection == "last":
            return True
        accuracy, loss = (record.get(f"{self.watched}_{x}", math.nan) for x in ("accuracy", "loss"))
        best = -1.0
        if member.best_epoch >= 0:
            best = member.history[member.best_epoch][f"{self.watched}_accuracy"]
        # The later of equals; and never one whose logits are not finite.
        return math.isfinite(loss) and accuracy >= best

    def finish(self) -> list[Trained]:
        """Scores the test set with each member's weights."""
        return [self._finish(i, member) for i, member in enumerate(self.members)]

    def _finish(self, i: int, member: Member) -> Trained:
        if member.best_epoch < 0:
            raise NotFiniteError(
                f"{self.network.name}: no epoch gave a number to select by; the last was "
                f"{member.history[-1]}"
            )
        state = self._of(i, self.state)
        best, newest = self.best[i], member.best_epoch + 1 == self.epochs_done
        last = best if newest else state.variables
        deployed, scored = scoring.score(
            member.job, member.teachers, best, last, self.dataset, self.topology
        )
        record = {
            **scored,
            "valid_accuracy": member.history[member.best_epoch].get("valid_accuracy"),
            "best_epoch": member.best_epoch + 1,
            "epochs": self.recipe.epochs,
            "seconds": round(member.seconds, 2),
            "skipped_steps": int(state.skipped),
            "state_digest": digest({"best": best, "last": state}),
            "preflight": member.preflight,
        }
        return Trained(deployed, member.history, record)


def _next_size(steps: int, seconds: float) -> int:
    """How many steps to dispatch next, so that it lasts about DISPATCH_SECONDS."""
    if seconds < DISPATCH_SECONDS / 2:
        return 2 * steps
    return max(1, int(steps * DISPATCH_SECONDS / seconds))
