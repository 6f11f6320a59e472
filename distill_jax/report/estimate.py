"""How far a run is: which of its stages it trains, and about how long the others take."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from distill_jax import models
from distill_jax.train.reporter import Planned
from distill_jax.train.stage import frozen_teachers

# Before that an estimate is worth little.
FIRST_SECONDS = 10.0
# How much more work than any that was timed may be foretold from that: small steps, and those of
# recurrent networks, take far longer than their FLOPs would.
FARTHEST = 30.0
BACKWARD = 2.0  # forward passes that one backward pass is worth


class Estimate:
    """The stages of a run, counted and timed; told what a `Reporter` is.

    Without `run_started` nothing is known of other stages, and nothing is said of them.

    Args:
      clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.planned: list[Planned] = []
        self.numbers: dict[str, int] = {}
        self.settled: set[str] = set()  # the ids of stages that are done, or cannot be
        self.current: list[Planned] = []
        self.step, self.since = 0, 0.0
        self.first = True  # whether the stages of now have not been timed yet
        self.speeds: dict[Hashable, tuple[float, float]] = {}  # steps and seconds
        self.starts: dict[Hashable, float] = {}  # seconds until the first steps were done
        self.begun = clock()

    def run_started(self, planned: list[Planned]) -> None:
        """Takes note of all stages; those that are done have the first numbers."""
        self.planned, self.begun = planned, self.clock()
        done = [stage.id for group in planned if group.done for stage in group.stages]
        self.settled = set(done)
        self.numbers = {stage_id: i for i, stage_id in enumerate(done, 1)}

    def stage_started(self, stages: list[Any], step: int) -> None:
        """Stages are numbered in the order in which they are trained first."""
        for stage in stages:
            self.numbers.setdefault(stage.id, len(self.numbers) + 1)
        ids = {stage.id for stage in stages}
        self.current = [group for group in self.planned if group.stages[0].id in ids]
        self.step, self.since, self.first = step, self.clock(), True

    def progress(self, step: int) -> None:
        """Times the steps since the last time; the first ones are compiled and time the start."""
        now, key = self.clock(), _key(self.current[0]) if self.current else None
        if self.first:
            self.starts.setdefault(key, now - self.since)
        else:
            steps, seconds = self.speeds.get(key, (0.0, 0.0))
            done = (step - self.step) * len(self.current)
            self.speeds[key] = steps + done, seconds + now - self.since
        self.step, self.since, self.first = step, now, False

    def settle(self, stages: Iterable[Any]) -> None:
        """Stages are done, or cannot be."""
        self.settled |= {stage.id for stage in stages}

    def place(self, stages: Iterable[Any]) -> str:
        """Which stages of how many, such as "stage 3 of 10: "; "" where that is not known."""
        numbers = sorted(self.numbers[s.id] for s in stages if s.id in self.numbers)
        if not numbers or not self.planned:
            return ""
        total = sum(len(group.stages) for group in self.planned)
        return f"stage{'s' * (len(numbers) > 1)} {_ranges(numbers)} of {total}: "

    def seconds_left(self) -> float | None:
        """Of the whole run, by the speed measured so far; None while that does not tell.

        Stages of a kind that was not trained yet take a start like those of the others, their first
        step in it, and the time that their FLOPs take by the others' speed. Where these are more
        than `FARTHEST` times those of all others, nothing is said.
        """
        if not self.starts or self.clock() - self.begun < FIRST_SECONDS:
            return None
        measured = {key: speed for key, speed in self.speeds.items() if all(speed)}
        left = 0.0
        for key, groups in self._waiting().items():
            steps = [self._steps_left(group) for group in groups]
            if key in measured:
                done, seconds = measured[key]
                left += sum(steps) * seconds / done
                continue
            if key not in self.starts:
                left += sum(self.starts.values()) / len(self.starts)
            # The first step of each is in its start.
            more = sum(n - (n == _steps(group)) for n, group in zip(steps, groups, strict=True))
            if more:
                if _work(groups[0]) > FARTHEST * max(self._works(measured).values(), default=0.0):
                    return None
                left += more * _work(groups[0]) * self._seconds_per_work(measured)
        return left

    def _waiting(self) -> dict[Hashable, list[Planned]]:
        """What is not settled, by kind."""
        waiting: dict[Hashable, list[Planned]] = {}
        for group in self.planned:
            if not self.settled.issuperset(stage.id for stage in group.stages):
                waiting.setdefault(_key(group), []).append(group)
        return waiting

    def _steps_left(self, group: Planned) -> int:
        return max(0, _steps(group) - (self.step if group in self.current else 0))

    def _works(self, measured: Iterable[Hashable]) -> dict[Hashable, float]:
        """The FLOPs of a step of each kind."""
        kinds = {_key(group): group for group in self.planned}
        return {key: _work(kinds[key]) for key in measured}

    def _seconds_per_work(self, measured: dict[Hashable, tuple[float, float]]) -> float:
        works = self._works(measured)
        work = sum(steps * works[key] for key, (steps, _) in measured.items())
        return sum(seconds for _, seconds in measured.values()) / work

    def words(self) -> str:
        """The time left, such as "about 12 min left of the run"; "" while it is not known."""
        seconds = self.seconds_left()
        return "" if seconds is None else f"about {duration(seconds)} left of the run"


def _key(group: Planned) -> Hashable:
    """Equal for what takes the same time: one program, as many steps of an epoch."""
    return tuple(stage.structure for stage in group.stages), group.steps, group.cached


def _steps(group: Planned) -> int:
    return group.steps * group.stages[0].recipe.epochs


def _work(group: Planned) -> float:
    """The FLOPs of a step, about: passes through the students and through frozen teachers."""
    students = sum((1 + BACKWARD) * models.count_flops(stage.network) for stage in group.stages)
    teachers = 0.0 if group.cached else sum(map(models.count_flops, frozen_teachers(group.stages)))
    return group.stages[0].recipe.batch_size * (students + teachers)


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as text: 3-7, or 1, 3-4."""
    runs = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    parts = [[number for _, number in run] for _, run in runs]
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else f"{p[0]}" for p in parts)


def duration(seconds: float) -> str:
    """A time, about: 40 s, 12 min, 3 h 20 min, 30 h, 5 days."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, days = minutes / 60, minutes / 60 / 24
    if hours < 10:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours:.0f} h" if hours < 48 else f"{days:.0f} days"
