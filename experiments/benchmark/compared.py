"""The rows of the benchmark, and what is asked of their ratios."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.benchmark.cases import Case, Row
from experiments.benchmark.measure import Measured

# No commas: --only takes these names.
OURS = "jax"
MANY = "jax on {} devices"
ALONE_ON_MANY = "jax student alone on {} devices"
DROP, TABLE, ALONE = "jax with one dropped", "jax with a logit table", "jax student alone"
BACKBONE = "jax backbone alone"
AUTHORS = "torch as the authors"
EAGER, COMPILED = "torch no_grad channels_last fused", "torch.compile of that"
TORCH_ALONE = "torch student alone"
PEAK = "matrix product"


class Target(NamedTuple):
    """What is asked of a ratio: the best of `over` to the best of `under`.

    `limit` is what it must reach where `at_least`, else what it must not exceed; None only asks
    for the ratio. `of` is "seconds" of a step or "step_bytes", the peak of memory while stepping.
    """

    what: str
    over: tuple[str, ...]
    under: tuple[str, ...]
    limit: float | None
    at_least: bool = False
    of: str = "seconds"


class Ratio(NamedTuple):
    """The median of paired rounds' ratios, and their quartiles."""

    median: float
    low: float
    high: float


class Verdict(NamedTuple):
    """A target, between which rows it was measured, and whether it is met."""

    target: Target
    over: str
    under: str
    ratio: Ratio
    met: bool | None


def rows(
    row: Row, *, peer: str, devices: int, dtype: str, batch: int, matrix: int, parallel: str = "jit"
):
    """The cases to measure, by name.

    Args:
      row: teachers and student.
      peer: "torch" or "none".
      devices: of the row on several devices; 1 leaves it out.
      dtype: of the computation.
      batch: examples of a step.
      matrix: the size of the matrices whose product gives the machine's peak.
      parallel: how several devices are run, "jit" or "pmap".
    """
    teachers, student = row
    whole = Case("jax", "recomputing", student, teachers, batch, dtype)
    alone = dataclasses.replace(whole, variant="alone", teachers=())
    found = {OURS: whole if teachers else alone}
    many: dict[str, Any] = {"devices": devices, "parallel": parallel}
    if devices > 1:
        found[MANY.format(devices)] = dataclasses.replace(found[OURS], **many)
    if teachers:
        found |= {
            DROP: dataclasses.replace(whole, variant="dropping"),
            TABLE: dataclasses.replace(whole, variant="table"),
            ALONE: alone,
        }
        if devices > 1:
            found[ALONE_ON_MANY.format(devices)] = dataclasses.replace(alone, **many)
    else:
        found[BACKBONE] = dataclasses.replace(alone, student=student.removeprefix("evolving:"))
    if peer == "torch":
        for name, variant in ((AUTHORS, "authors"), (EAGER, "eager"), (COMPILED, "compiled")):
            found[name] = dataclasses.replace(found[OURS], framework="torch", variant=variant)
        single = found[ALONE if teachers else BACKBONE]
        found[TORCH_ALONE] = dataclasses.replace(single, framework="torch", variant="eager")
    found[PEAK] = Case("matmul", "square", str(matrix), dtype=dtype)
    return found


def targets(chain: str, devices: int) -> list[Target]:
    """What is asked on two CPU cores."""
    ours, best = (OURS, MANY.format(devices)), (EAGER, COMPILED)
    if chain == "teskd":
        return [
            Target("an evolving step to one of its backbone", (OURS,), (BACKBONE,), None),
            Target("the same in torch", (EAGER,), (TORCH_ALONE,), None),
            Target("an evolving step to the best torch's", ours, best, None),
        ]
    student = ALONE, ALONE_ON_MANY.format(devices)
    level = 1.1 if chain == "resnet" else 1.0
    return [
        Target("3 times faster than the authors' way", (AUTHORS,), ours, 3.0, at_least=True),
        Target(f"within {level} of the best torch", ours, best, level),
        Target("student alone within 1.2 of torch's", student, (TORCH_ALONE,), 1.2),
        Target("table step at most 0.2 of the recomputing", (TABLE,), (OURS,), 0.2),
        Target("one dropped at most 0.85 of none dropped", (DROP,), (OURS,), 0.85),
        Target("memory at most 1.2 of the best torch's", (OURS,), best, 1.2, of="step_bytes"),
    ]


def ratio(over: Measured, under: Measured) -> Ratio:
    """Of the seconds of a step, round by round."""
    paired = [a / b for a, b in zip(over.seconds, under.seconds, strict=True)]
    if len(paired) < 2:
        return Ratio(*paired * 3)
    low, middle, high = statistics.quantiles(paired, n=4, method="inclusive")
    return Ratio(middle, low, high)


def judge(target: Target, found: Mapping[str, Measured]) -> Verdict | None:
    """Whether a target is met; None where a side of it was not measured."""
    sides = []
    for names in (target.over, target.under):
        there = [name for name in names if name in found and not found[name].missing]
        if not there:
            return None
        sides.append(min(there, key=lambda name: _size(found[name], target.of)))
    over, under = (found[name] for name in sides)
    if target.of == "seconds":
        value = ratio(over, under)
    else:
        value = Ratio(*[_size(over, target.of) / _size(under, target.of)] * 3)
    return Verdict(target, sides[0], sides[1], value, _met(target, value.median))


def _met(target: Target, value: float) -> bool | None:
    if target.limit is None:
        return None
    return value >= target.limit if target.at_least else value <= target.limit


def _size(measured: Measured, of: str) -> float:
    return statistics.median(measured.seconds) if of == "seconds" else measured.step_bytes


def operations(found: Mapping[str, Measured]) -> dict[str, float]:
    """Floating-point operations of each row's step; 0 where no row of ours does the same work."""
    known = {m.case.work: m.flops for m in found.values() if m.flops}
    return {name: known.get(m.case.work, 0.0) for name, m in found.items()}


def fidelity(found: Mapping[str, Measured]) -> dict[str, float]:
    """The largest relative difference of a row's first two losses to ours of the same problem.

    Ours is the first row that has them; every later one is compared, of whatever framework.
    """
    ours: dict[tuple[Any, ...], list[float]] = {}
    differences = {}
    for name, measured in found.items():
        losses, problem = measured.losses, measured.case.problem
        if not losses or measured.case.framework == "matmul":
            continue
        if problem in ours:
            pairs = zip(losses, ours[problem], strict=True)
            differences[name] = max(abs(a - b) / abs(b) for a, b in pairs)
        elif measured.case.framework == "jax":
            ours[problem] = losses
    return differences
