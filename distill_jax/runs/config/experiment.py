"""The typed values that come of a config, everything checked that can be without data."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from distill_jax import graph, models
from distill_jax.methods import losses
from distill_jax.runs.config.defaults import default_config
from distill_jax.runs.config.fields import ConfigError, merge, one_of, typed, unknown, words
from distill_jax.train.dropping import Dropping
from distill_jax.train.optim import OptimOptions
from distill_jax.train.options import TEACHER_LOGITS
from distill_jax.train.recipe import Recipe
from distill_jax.train.sharding import Topology, ask_for_cpu_devices

SEEDS = "a whole number from 0 to 2**32 - 1"
PROTOCOLS = ("standard", "paper", "official")
STOCHASTIC = "+drop"  # suffix of a guidance whose last network is taught stochastically


@dataclasses.dataclass(frozen=True)
class Row:
    """One asked-for comparison: a guidance under its label.

    Args:
      label: what the table calls it.
      guidance: who teaches whom.
      stochastic: teachers of the last network are dropped at random.
      changes: recipe fields that differ from the experiment's for the networks asked for.
    """

    label: str
    guidance: graph.Guidance
    stochastic: bool = False
    changes: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A resolved config: everything typed and checked, nothing left to default."""

    name: str
    dataset: dict[str, Any]
    networks: tuple[str, ...]
    rows: tuple[Row, ...]
    students: tuple[str, ...]
    seeds: tuple[int, ...]
    recipe: dict[str, Any]
    overrides: dict[str, dict[str, Any]]
    loss: losses.LossOptions
    evolve: losses.EvolveOptions
    dropping: Dropping
    teacher_weights: dict[str, str]
    selection: str
    protocol: str
    dtype: str
    topology: Topology
    population: int
    teacher_logits: str
    may_skip: int
    checkpoint_every: str

    def recipe_of(self, network: str, **changes: Any) -> Recipe:
        """The recipe of one network, with its overrides and then `changes`."""
        values = {**self.recipe, **self.overrides.get(network, {}), **changes}
        values.pop("seed", None)
        fields = {f.name for f in dataclasses.fields(OptimOptions)}
        optim = OptimOptions(**{k: v for k, v in values.items() if k in fields})
        rest = {k: v for k, v in values.items() if k not in fields}
        return Recipe(
            **rest, loss=self.loss, evolve=self.evolve, selection=self.selection, optim=optim
        )

    def seed_of(self, network: str, seed: int) -> int:
        """The seed of one network: its override's, else the run's."""
        return self.overrides.get(network, {}).get("seed", seed)


def resolve(config: Mapping[str, Any] | ml_collections.ConfigDict) -> Experiment:
    """The experiment that a config describes.

    Raises:
      ConfigError: unknown field, value of another type or out of range, impossible row.
    """
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    values = merge(default_config().to_dict(), values, "config")
    try:
        return _resolve(values)
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(str(error)) from error


def _resolve(values: dict[str, Any]) -> Experiment:
    protocol = one_of("protocol", values["protocol"], PROTOCOLS)
    preset = losses.preset("dense", protocol)
    loss = {k: v or getattr(preset, k) for k, v in values["loss"].items()}
    dropping = dict(values["dropping"])
    survival = dropping.pop("survival")
    dropping["kind"] = dropping["kind"] or ("bernoulli" if protocol == "paper" else "fixed")
    networks = words("networks", values["networks"])
    for name in networks:
        models.check_name(name)
    students = words("students", values["students"]) or networks[-1:]
    for student in students:
        one_of("students", student, networks)
    ask_for_cpu_devices(values["devices"])  # here, where it is known to be a number
    experiment = Experiment(
        name=values["name"],
        dataset=values["dataset"],
        networks=networks,
        rows=_rows(values, networks),
        students=students,
        seeds=_seeds(values["seeds"]),
        recipe={**values["recipe"], "survival": survival},
        overrides=_overrides(values["overrides"], values["recipe"], networks),
        loss=losses.LossOptions(**loss),
        evolve=losses.EvolveOptions(**values["evolve"]),
        teacher_weights=_teacher_weights(values["teacher_weights"], networks),
        dropping=Dropping(**dropping),
        selection=values["selection"] or ("test" if protocol == "official" else "validation"),
        protocol=protocol,
        dtype=one_of("dtype", values["dtype"], tuple(models.DTYPES)),
        topology=Topology(values["parallel"], values["devices"]),
        population=_at_least("population", values["population"], 0),
        teacher_logits=one_of("teacher_logits", values["teacher_logits"], TEACHER_LOGITS),
        may_skip=_may_skip(values["nonfinite"]),
        checkpoint_every=values["checkpoint_every"],
    )
    checkpoint_due(experiment.checkpoint_every)
    for row in experiment.rows:
        for stage in graph.plan(row.guidance, students):
            experiment.recipe_of(stage.network, **dict(row.changes))
            if row.stochastic and stage.network == networks[-1]:
                experiment.dropping.check(len(stage.teachers))
    return experiment


def checkpoint_due(every: str) -> Callable[[int, float, float], bool]:
    """Whether to save, from text such as "500 steps", "2 epochs" or "5 minutes".

    Returns:
      (steps, epochs, seconds since the last save) -> bool.

    Raises:
      ConfigError: the text is not a number above 0 and one of these units.
    """
    number, _, unit = every.strip().partition(" ")
    units = {"step": (0, 1), "epoch": (1, 1), "minute": (2, 60), "second": (2, 1)}
    try:
        position, scale = units[unit.strip().removesuffix("s")]
        limit = float(number) * scale
    except (KeyError, ValueError):
        limit = 0.0
    if not limit > 0:
        raise ConfigError(
            f"checkpoint_every is a number above 0 of steps, epochs, minutes or seconds, such as "
            f"'5 minutes', got {every!r}"
        )
    return lambda *since: since[position] >= limit


def _may_skip(text: str) -> int:
    word, _, number = text.strip().partition(" ")
    if word == "halt" and not number:
        return 0
    if word == "skip" and number.strip().isdecimal():
        return int(number)
    raise ConfigError(f"nonfinite is 'halt' or 'skip N', such as 'skip 10', got {text!r}")


def _at_least(name: str, value: int, low: int) -> int:
    if value < low:
        raise ConfigError(f"{name} is {low} or more, got {value}")
    return value


def _rows(values: dict[str, Any], networks: tuple[str, ...]) -> tuple[Row, ...]:
    specs = words("guidance", values["guidance"])
    if not specs:
        raise ConfigError("guidance is empty: name at least one, such as 'dense'")
    rows = []
    for spec in specs:
        stochastic = spec.endswith(STOCHASTIC)
        row = Row(spec, graph.from_spec(spec.removesuffix(STOCHASTIC), networks), stochastic)
        rows.extend(_swept(row, values))
    for label, changes in values["controls"].items():
        checked = merge(values["recipe"], changes, f"controls.{label}", fill=False)
        rows.append(Row(f"none, {label}", graph.none(networks), False, tuple(checked.items())))
    labels = [row.label for row in rows]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"guidance is named twice: {', '.join(labels)}")
    return tuple(rows)


def _swept(row: Row, values: dict[str, Any]) -> list[Row]:
    """The row once for each combination of the swept values that make a difference to it."""
    defaults = {**values["recipe"], "survival": values["dropping"]["survival"]}
    fields = {}
    for name, choices in values["sweep"].items():
        if name not in defaults:
            raise ConfigError(unknown(f"sweep.{name}", name, tuple(defaults)))
        choices = tuple(choices) if isinstance(choices, (list, tuple)) else (choices,)
        fields[name] = [typed(f"sweep.{name}", choice, defaults[name]) for choice in choices]
        if not choices or len(set(choices)) < len(choices):
            raise ConfigError(f"sweep.{name} is one value or more, all different, got {choices}")
    taught = any(row.guidance.teachers)
    for name in ("temperature", "kd_weight", "survival"):
        if not taught or (name == "survival" and not row.stochastic):
            fields.pop(name, None)
    rows = []
    for combination in itertools.product(*fields.values()):
        changes = tuple(zip(fields, combination, strict=True))
        label = "".join(f", {name}={value}" for name, value in changes)
        rows.append(dataclasses.replace(row, label=row.label + label, changes=changes))
    return rows


def _teacher_weights(text: str, networks: tuple[str, ...]) -> dict[str, str]:
    files: dict[str, str] = {}
    for part in words("teacher_weights", text):
        name, equals, file = part.partition("=")
        name, file = (name.strip(), file.strip()) if equals else (networks[0], part)
        if name not in networks:
            raise ConfigError(unknown("teacher_weights", name, networks))
        if name in files or not file:
            raise ConfigError(f"teacher_weights names one file for each network, got {text!r}")
        files[name] = file
    return files


def _overrides(overrides, recipe, networks) -> dict[str, dict[str, Any]]:
    checked = {}
    for name, changes in overrides.items():
        if name not in networks:
            raise ConfigError(unknown(f"overrides.{name}", name, networks))
        checked[name] = merge({**recipe, "seed": 0}, changes, f"overrides.{name}", fill=False)
        if not _is_seed(checked[name].get("seed", 0)):
            raise ConfigError(f"overrides.{name}.seed is {SEEDS}, got {changes['seed']}")
    return checked


def _seeds(value: Any) -> tuple[int, ...]:
    seeds = tuple(value)
    if not seeds or len(set(seeds)) < len(seeds) or not all(map(_is_seed, seeds)):
        raise ConfigError(f"seeds are one or more, all different, each {SEEDS}, got {seeds}")
    return seeds


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32
