"""What the page knows of a run: its rows and stages, each value of the type that it should have."""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from distill_jax.report.summary import Row, trainings

_ROW = {"guidance": str, "network": str, "seed": int, "teachers": list, "graph": str}
_ROW |= {"changes": dict, "control": bool, "backbone": str, "protocol": str, "selection": str}
_STAGE = {"stage": str, "network": str, "teachers": list, "seed": int, "guidance": list}
_STAGE |= {"epochs": int}
_MEASURED = ("parameters", "test_accuracy", "last_test_accuracy")


class RecordError(ValueError):
    """A record that is not what a run writes."""


@dataclasses.dataclass(frozen=True)
class StageRecord:
    """A stage, however far it is.

    Args:
      id: its own.
      network: whose it is.
      seed: of its weights, order and draws.
      guidance: the labels that use it.
      edges: by teacher the methods by which it teaches; no methods where they were not recorded.
      live: the teachers that are trained with it.
      methods: the names of all terms' methods, those of nobody's edges too.
      phase: whether it only prepares another stage.
      epochs: that were asked for; 0 of given weights.
      record: of a finished one; empty of any other, and of given weights that are no result.
      history: one dict an epoch.
      memory: the most bytes in use up to its last epoch, and whose: "device" or "process".
    """

    id: str
    network: str
    seed: int
    guidance: tuple[str, ...]
    edges: dict[str, tuple[str, ...]]
    live: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    phase: bool = False
    epochs: int = 0
    record: dict[str, Any] = dataclasses.field(default_factory=dict)
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    memory: tuple[float, str] | None = None

    @property
    def given(self) -> bool:
        """Whether its weights were given, so that there is nothing to train."""
        return not self.epochs


@dataclasses.dataclass(frozen=True)
class Latency:
    """How long networks take for one example.

    Args:
      device: on which it was measured; "" where it was not.
      seconds: by network.
      why: what is to be known of those that are missing.
    """

    device: str = ""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    why: str = "not measured"


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run as its folder has it.

    Args:
      name: of the folder.
      rows: of `results.json`.
      stages: in the order of training.
      networks: the row, largest first.
      started: how the newest run was started, see `runs.provenance`, and as "earlier" the others.
      config: its fields.
      at_work: whether it is being trained.
      latency: of its networks.
    """

    name: str
    rows: list[Row]
    stages: list[StageRecord]
    networks: tuple[str, ...]
    started: dict[str, Any]
    config: dict[str, Any]
    at_work: bool = False
    latency: Latency = Latency()

    def __post_init__(self) -> None:
        earlier = self.started.get("earlier", [])
        check({"earlier": earlier}, {"earlier": list}, "run.json")
        for one in earlier:
            check(one, {}, "run.json, earlier")
        for row in self.rows:
            check(row, _ROW, "results.json")
            if row.get("failed"):
                kinds = {"failed": str, "failed_stages": list}
                check({"failed_stages": [], **row}, kinds, "results.json")
                continue
            _check_measured(row)
            for name in ("test_accuracy", "last_test_accuracy"):
                if row[name] is None:
                    raise RecordError(f"results.json has {name}=None: expected a number")
            for name in ("valid_accuracy", *(x for x in row if x.startswith("test_"))):
                number({name: None, **row}, name)

    @property
    def trained(self) -> list[Row]:
        """The rows with accuracies; of seeds under which one and the same network stands one."""
        return trainings([row for row in self.rows if not row.get("failed")])

    @property
    def labels(self) -> list[str]:
        """The guidances, those of the rows first."""
        rows = (row["guidance"] for row in self.rows)
        return list(dict.fromkeys((*rows, *(x for stage in self.stages for x in stage.guidance))))

    @property
    def lost(self) -> set[str]:
        """The ids of the stages that could not be trained, those that only teach among them."""
        failed = [row for row in self.rows if row.get("failed")]
        own = ((row.get("stage"), *row.get("failed_stages", [])) for row in failed)
        return {str(stage) for stages in own for stage in stages}

    @property
    def groups(self) -> list[Group]:
        """The stages, those together that differ in their seeds alone."""
        groups: dict[Any, list[StageRecord]] = {}
        earlier = collections.Counter[Any]()  # phases of one seed follow one another
        for stage in self.stages:
            key = stage.network, stage.guidance, tuple(stage.edges.items()), stage.phase
            groups.setdefault((*key, earlier[key, stage.seed]), []).append(stage)
            earlier[key, stage.seed] += 1
        return [Group(tuple(own), n) for (*_, n), own in groups.items()]


@dataclasses.dataclass(frozen=True)
class Group:
    """Stages that differ in their seeds alone.

    Args:
      stages: they.
      earlier: how many phases of this kind go before.
    """

    stages: tuple[StageRecord, ...]
    earlier: int = 0

    @property
    def network(self) -> str:
        """Whose they are."""
        return self.stages[0].network

    @property
    def guidance(self) -> tuple[str, ...]:
        """The labels that use them."""
        return self.stages[0].guidance

    @property
    def label(self) -> str:
        """Their guidances in a line."""
        number = f" {self.earlier + 1}" if self.earlier else ""
        between = "; " if any("," in label for label in self.guidance) else ", "
        return between.join(self.guidance) + (f" (phase{number})" if self.stages[0].phase else "")

    @property
    def done(self) -> list[StageRecord]:
        """Those that are finished."""
        return [stage for stage in self.stages if stage.record]

    @property
    def accuracies(self) -> list[float]:
        """On the test set, of each that is finished."""
        return [number(stage.record, "test_accuracy") for stage in self.done]

    def curves(self, name: str) -> list[list[tuple[float, float]]]:
        """(epoch, value) of what each seed's epochs have under a name, where they have it."""
        return [
            [(number(x, "epoch"), number(x, name)) for x in stage.history if name in x]
            for stage in self.stages
        ]

    def names(self, prefix: str) -> list[str]:
        """What their epochs have, of the names with a prefix."""
        records = (x for stage in self.stages for x in stage.history[:1])
        return list(dict.fromkeys(k for x in records for k in x if k.startswith(prefix)))


def stage_record(planned: Any, result: Any, epochs: list[dict[str, Any]]) -> StageRecord:
    """A stage from what a run writes of it.

    Args:
      planned: of `run.json`.
      result: of its `result.json`; None where it is not finished.
      epochs: its lines of `metrics.jsonl`.

    Raises:
      RecordError: something in it is of another kind than a run writes.
    """
    check(planned, _STAGE, "run.json")
    record, history = {}, epochs
    if result is not None:
        check(result, {"record": dict, "history": list}, "result.json")
        record, history = result["record"], result["history"]
        _check_measured(record)
    for epoch in history:
        check(epoch, {"epoch": int}, "an epoch")
        for name in epoch:
            if name.startswith(("train_", "valid_", "test_")):
                number(epoch, name)
    edges = {name: planned.get("edges", {}).get(name, []) for name in planned["teachers"]}
    check(edges, dict.fromkeys(edges, list), "the edges of a stage")
    peaks = [
        (number(line, f"{where}_peak_bytes"), where)
        for line in epochs
        for where in ("device", "process")
        if f"{where}_peak_bytes" in line
    ]
    return StageRecord(
        planned["stage"],
        planned["network"],
        planned["seed"],
        tuple(planned["guidance"]),
        {teacher: tuple(methods) for teacher, methods in edges.items()},
        tuple(planned.get("live", ())),
        tuple(planned.get("methods", ())),
        bool(planned.get("phase")),
        planned["epochs"],
        record,
        history,
        max(peaks, default=None),
    )


def number(values: Mapping[str, Any], name: str) -> float:
    """A number of a record; NaN where it is null, as what is not finite is written.

    Raises:
      RecordError: it is not there, or is none.
    """
    value = values.get(name, "")
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecordError(f"{name} is {value!r}: expected a number")
    return float(value)


def mean(values: Iterable[float]) -> float:
    """The mean; NaN of none."""
    own = list(values)
    return statistics.fmean(own) if own else math.nan


def spread(values: Iterable[float]) -> float | None:
    """The standard deviation of a sample; None of fewer than two."""
    own = list(values)
    return statistics.stdev(own) if len(own) > 1 else None


def percent(values: list[float]) -> str:
    """Shares as text: 93.84 ± 0.55 %."""
    deviation = spread(values)
    return f"{100 * mean(values):.2f}" + (
        " %" if deviation is None else f" ± {100 * deviation:.2f} %"
    )


def _check_measured(record: Mapping[str, Any]) -> None:
    """Raises RecordError for numbers of a finished stage that are none."""
    for name in (*_MEASURED, *(x for x in ("seconds", "ece") if x in record)):
        number(record, name)
    tables = {name: record.get(name, {}) for name in ("agreement", "kl", "reliability")}
    check(tables, dict.fromkeys(tables, dict), "a stage")
    for name in ("agreement", "kl"):
        for teacher in tables[name]:
            number(tables[name], teacher)
    if bins := tables["reliability"]:
        check(bins, dict.fromkeys(("count", "right", "confidence"), list), "reliability")
        for values in zip(bins["count"], bins["right"], bins["confidence"], strict=False):
            for value in values:
                number({"a bin": value}, "a bin")
        if len({len(values) for values in bins.values()}) != 1:
            raise RecordError("reliability has lists of several lengths: expected one")


def check(value: Any, fields: Mapping[str, type], where: str) -> None:
    """Raises RecordError where a value is no object, or a field of it of another type."""
    if not isinstance(value, dict):
        raise RecordError(f"{where} has {value!r}: expected an object")
    for name, kind in fields.items():
        if not isinstance(value.get(name), kind):
            raise RecordError(
                f"{where} has {name}={value.get(name)!r}: expected {_KINDS.get(kind, kind)}"
            )


_KINDS = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}
_KINDS |= {bool: "true or false"}
