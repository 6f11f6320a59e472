"""From a config to an `Experiment`: everything is checked that can be without data."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from distill_jax import graph, identity, methods, models, processes
from distill_jax.methods import TESKD, LossOptions
from distill_jax.refusals import refuses
from distill_jax.runs.ambient import PRECISIONS
from distill_jax.runs.config.defaults import default_config
from distill_jax.runs.config.experiment import (
    CLASSIFIER,
    LOGITS,
    LOSSES,
    Comparison,
    Experiment,
    Init,
)
from distill_jax.runs.config.fields import AUTO, ConfigError, merge, one_of, typed, unknown, words
from distill_jax.train import devices
from distill_jax.train.dropping import Dropping
from distill_jax.train.options import TEACHER_LOGITS
from distill_jax.train.sharding import Topology
from distill_jax.train.stage import Recipe
from distill_jax.train.startup import (
    ask_for_cpu_devices,
    ask_for_fast_convolutions,
    ask_for_graphs,
    ask_for_same_bytes,
    check_backend,
    start_cudnn,
)

SEEDS = "a whole number from 0 to 2**32 - 1"
PROTOCOLS = ("standard", "paper", "official")
STOCHASTIC = "+drop"  # suffix of a guidance whose last network is taught stochastically


@refuses(ConfigError)
def resolve(config: Mapping[str, Any] | ml_collections.ConfigDict) -> Experiment:
    """The experiment that a config describes.

    Raises:
      ConfigError: unknown field, value of another type or out of range, impossible row.
    """
    values = fields_of(config)
    try:
        return _resolve(values)
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(str(error)) from error


def fields_of(config: Mapping[str, Any] | ml_collections.ConfigDict) -> dict[str, Any]:
    """Every field of a config with its value, the default's where it is not there.

    Raises:
      ConfigError: unknown field, or value of another type.
    """
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    return merge(default_config().to_dict(), values, "config")


def _resolve(values: dict[str, Any]) -> Experiment:
    protocol = one_of("protocol", values["protocol"], PROTOCOLS)
    loss = {k: v or getattr(LOSSES[protocol], k) for k, v in values["loss"].items()}
    dropping = dict(values["dropping"])
    survival = dropping.pop("survival")
    dropping["kind"] = dropping["kind"] or ("bernoulli" if protocol == "paper" else "fixed")
    if dropping["teacher_droppable"] is None:  # the paper drops assistants alone
        dropping["teacher_droppable"] = protocol != "paper"
    networks = words("networks", values["networks"])
    files = _files("teacher_weights", values["teacher_weights"], networks)
    for name in networks:
        if not files.get(name, "").startswith(LOGITS):
            models.check_name(graph.architecture(name)[0])
    students = words("students", values["students"])
    for student in students:
        one_of("students", student, networks)
    try:
        identity.plain(values["dataset"]["options"])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"dataset.options are plain values, as of JSON: {error}") from error
    experiment = Experiment(
        name=values["name"],
        dataset=values["dataset"],
        networks=networks,
        comparisons=_comparisons(values, networks, students),
        students=students or networks[-1:],
        seeds=_seeds(values["seeds"]),
        recipe={**values["recipe"], "survival": survival},
        overrides=_overrides(values["overrides"], values["recipe"], networks),
        methods=_method_weights("config.methods", values["methods"]),
        method_options=_method_options("config.method_options", values["method_options"]),
        phases=_phases(values["phases"], values["recipe"]),
        loss=LossOptions(**loss),
        evolve=TESKD(**values["evolve"]),
        teacher_weights=files,
        init=_init(values["init"], networks, files),
        dropping=Dropping(**dropping),
        selection=values["selection"] or ("test" if protocol == "official" else "validation"),
        protocol=protocol,
        dtype=one_of("dtype", values["dtype"], tuple(models.DTYPES)),
        precision=one_of("precision", values["precision"], PRECISIONS),
        deterministic=values["deterministic"],
        topology=Topology(values["parallel"]),
        population=_at_least("population", values["population"], 0),
        workers=_at_least("workers", values["workers"], 0),
        teacher_logits=one_of("teacher_logits", values["teacher_logits"], TEACHER_LOGITS),
        max_nonfinite_steps=_max_nonfinite_steps(values["nonfinite"]),
        checkpoint_every=values["checkpoint_every"],
        tensorboard=values["tensorboard"],
    )
    checkpoint_due(experiment.checkpoint_every)
    _check_swept(experiment)
    recipes = _checked_recipes(experiment)
    topology = Topology(values["parallel"], _devices(values, experiment, recipes))
    return dataclasses.replace(experiment, topology=topology)


def _devices(values: dict[str, Any], experiment: Experiment, recipes: list[Recipe]) -> int:
    """How many devices there are to be; starts JAX, with all that has to be asked for before."""
    asked, several = values["devices"], jax.distributed.is_initialized()
    if asked == AUTO and _has_registered(experiment):
        asked = 1  # of somebody's code it is not known that it sees the whole batch
    if asked == AUTO and several:
        asked = 0
    on_cpu = devices.devices_for(recipes, "cpu", devices.cores()) if asked == AUTO else asked
    if not several:  # else a process has those that it was started with
        ask_for_cpu_devices(on_cpu)
    ask_for_graphs()
    ask_for_fast_convolutions()
    if values["deterministic"]:
        ask_for_same_bytes()
    check_backend()
    start_cudnn()
    if asked == 1 and processes.count() > 1:
        raise ConfigError(
            f"config.devices is {values['devices']!r}, which is 1 here, of {processes.count()} "
            "processes: expected the number of all their devices, or 0"
        )
    return devices.here(recipes) if asked == AUTO else asked


def _named_methods(experiment: Experiment) -> set[str]:
    """The methods that a network may have in some phase."""
    sections = (*experiment.overrides.values(), *experiment.phases)
    return {*experiment.methods, *(name for own in sections for name in own.get("methods", ()))}


def _check_swept(experiment: Experiment) -> None:
    """Raises ConfigError where a sweep compares values that nothing reads."""
    compared = (x.changes for x in experiment.comparisons if not x.control)
    swept, named = {name for own in compared for name, _ in own}, _named_methods(experiment)
    if "survival" in swept and (kind := experiment.dropping.kind) != "bernoulli":
        raise ConfigError(
            f"sweep.survival makes no difference where dropping.kind is {kind!r}: expected "
            "'bernoulli'"
        )
    if "kd" in named or any(map(methods.is_registered, named)):
        return
    for name in ("temperature", "kd_weight"):
        if name in swept:
            raise ConfigError(
                f"sweep.{name} is of kd, and the methods are {', '.join(sorted(named))}: expected "
                "kd among them; numbers of other methods stand in method_options"
            )


def _has_registered(experiment: Experiment) -> bool:
    """Whether networks or methods are a user's own."""
    named = _named_methods(experiment)
    networks = (graph.architecture(models.backbone_name(x))[0] for x in experiment.networks)
    return any(map(models.is_registered, networks)) or any(map(methods.is_registered, named))


def _checked_recipes(experiment: Experiment) -> list[Recipe]:
    """The recipe of every network in every phase, and teachers that can be dropped as asked."""
    recipes = []
    for comparison in experiment.comparisons:
        for component in graph.plan(comparison.graph, comparison.students):
            for name, phase in itertools.product(component.networks, ({}, *experiment.phases)):
                changes = {**dict(comparison.changes), **phase}
                recipes.append(experiment.recipe_of(name, **changes))
            if comparison.stochastic and experiment.networks[-1] in component.networks:
                frozen = component.frozen(experiment.networks[-1])
                kept = {**experiment.recipe, **dict(comparison.changes)}["survival"]
                experiment.dropping.check(len(frozen), kept)
    return recipes


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


def _max_nonfinite_steps(text: str) -> int:
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


def _comparisons(
    values: dict[str, Any], networks: tuple[str, ...], students: tuple[str, ...]
) -> tuple[Comparison, ...]:
    specs = _guidances(values["guidance"], networks)
    if not specs:
        raise ConfigError("guidance is empty: name at least one, such as 'dense'")
    comparisons = []
    for spec in specs:
        stochastic = spec.endswith(STOCHASTIC)
        taught_by = graph.from_spec(spec.removesuffix(STOCHASTIC), networks)
        # The smallest network's component comes last.
        wanted = students or graph.plan(taught_by)[-1].networks
        comparisons.extend(_swept(Comparison(spec, spec, taught_by, wanted, stochastic), values))
    for label, changes in values["controls"].items():
        checked = merge(values["recipe"], changes, f"controls.{label}", fill=False)
        comparisons.append(
            Comparison(
                label=f"none, {label}",
                spec="none",
                graph=graph.none(networks),
                students=students or networks[-1:],
                changes=tuple(checked.items()),
                control=True,
            )
        )
    labels = [comparison.label for comparison in comparisons]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"guidance is named twice: {', '.join(labels)}")
    return tuple(comparisons)


def _guidances(value: tuple[Any, ...], networks: tuple[str, ...]) -> tuple[str, ...]:
    """The guidances as text; one that is given as a matrix is named by its edges."""
    specs: list[str] = []
    for entry in (value,) if value and all(map(_is_row, value)) else value:
        if isinstance(entry, (list, tuple, np.ndarray)):
            specs.append(graph.custom(networks, entry).edges)
        else:
            specs.extend(words("guidance", (entry,)))
    return tuple(specs)


def _is_row(entry: Any) -> bool:
    """Whether an entry is a row of a matrix, which then stands alone and not in a tuple."""
    sequences = list, tuple, np.ndarray
    return isinstance(entry, sequences) and not any(isinstance(x, (str, *sequences)) for x in entry)


def _swept(comparison: Comparison, values: dict[str, Any]) -> list[Comparison]:
    """The comparison once for each combination of the swept values that matter to it."""
    swept = {}  # by label: several entries may come to the same
    entries = values["sweep"] if isinstance(values["sweep"], tuple) else (values["sweep"],)
    for entry in entries or ({},):
        fields = {}
        for name, choices in _sweep(values, entry).items():
            if any(comparison.graph.teachers) or not _concerns_teachers(name, values["methods"]):
                fields[name] = choices
        if not comparison.stochastic:
            fields.pop("survival", None)
        for combination in itertools.product(*fields.values()):
            changes = tuple(zip(fields, combination, strict=True))
            label = "".join(f", {name}={value}" for name, value in changes)
            label = comparison.label + label
            swept[label] = dataclasses.replace(comparison, label=label, changes=changes)
    return list(swept.values())


def swept_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a sweep may name, of a config's fields: recipe fields, "survival", "methods.NAME"."""
    weights = {f"methods.{name}": 1.0 for name in values["methods"]}
    return {**values["recipe"], "survival": values["dropping"]["survival"], **weights}


def _sweep(values: dict[str, Any], entry: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The fields that an entry sweeps, with their values."""
    defaults = swept_fields(values)
    fields = {}
    for name, choices in entry.items():
        if name not in defaults:
            raise ConfigError(unknown(f"sweep.{name}", name, tuple(defaults)))
        choices = tuple(choices) if isinstance(choices, (list, tuple)) else (choices,)
        fields[name] = [typed(f"sweep.{name}", choice, defaults[name]) for choice in choices]
        if name.startswith("methods."):
            fields[name] = [_weight(f"sweep.{name}", choice) for choice in choices]
        if not choices or len(set(map(repr, fields[name]))) < len(choices):
            raise ConfigError(f"sweep.{name} is one value or more, all different, got {choices}")
    return fields


def _concerns_teachers(field: str, named: Collection[str]) -> bool:
    """Whether a swept field makes no difference, by these methods, where nobody teaches."""
    name = field.removeprefix("methods.")
    if name == "ce":  # it is weighed against them, see `Experiment.methods_of`
        return any(methods.build(other).taught for other in named if other != "ce")
    if name != field:
        return methods.build(name).taught
    return field in ("temperature", "kd_weight", "survival")


def _method_weights(where: str, weights: Mapping[str, Any]) -> dict[str, float]:
    checked = {}
    for name, weight in weights.items():
        methods.check_name(name)
        checked[name] = _weight(f"{where}.{name}", weight)
    return checked


def _weight(where: str, weight: Any) -> float:
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not (number and math.isfinite(weight)):
        raise ConfigError(f"{where} is a weight, a finite number, got {weight!r}")
    return float(weight)


def _method_options(where: str, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    for name, values in options.items():
        methods.check_name(name)
        if name in methods.ELSEWHERE:
            raise ConfigError(
                f"{where}.{name}: what {name!r} takes stands in {methods.ELSEWHERE[name]}"
            )
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}.{name} is a section with fields, got {values!r}")
        methods.build(name, values)
    return {
        name: {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()}
        for name, values in options.items()
    }


def _with_methods(where: str, changes: Any, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of recipe fields, methods and their options, checked."""
    defaults = {**recipe, "seed": 0, "methods": {}, "method_options": {}}
    checked = merge(defaults, changes, where, fill=False)
    if "methods" in checked:
        checked["methods"] = _method_weights(f"{where}.methods", checked["methods"])
    if "method_options" in checked:
        options = _method_options(f"{where}.method_options", checked["method_options"])
        checked["method_options"] = options
    return checked


def _phases(phases: tuple[Any, ...], recipe: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    checked = tuple(_with_methods(f"phases[{i}]", x, recipe) for i, x in enumerate(phases))
    for i, phase in enumerate(checked):
        if not phase or "seed" in phase:
            raise ConfigError(
                f"phases[{i}] is a dict of recipe fields and methods that differ, got {phases[i]!r}"
            )
    return checked


def _init(values: Mapping[str, str], networks: tuple[str, ...], given: Mapping[str, str]) -> Init:
    files = _files("init.weights", values["weights"], networks)
    for name, file in files.items():
        if name in given:
            raise ConfigError(
                f"{name} stands in teacher_weights, which are not trained, and in init.weights, "
                "which are: expected one of both"
            )
        if file.startswith(LOGITS):
            raise ConfigError(f"init.weights names logits for {name}, {file}: expected weights")
    if (anew := values["anew"]) not in ("", CLASSIFIER):
        raise ConfigError(f"init.anew is {anew!r}: expected {CLASSIFIER!r}, or '' for nothing")
    return Init(files, anew)


def _files(field: str, text: str, networks: tuple[str, ...]) -> dict[str, str]:
    """The files that a field names for networks, by network."""
    files: dict[str, str] = {}
    # Commas and equals signs may be in a file's name: what stands before one is a network's.
    names = "|".join(map(re.escape, networks))
    for part in filter(None, re.split(rf",\s*(?=(?:{names})\s*=)", text.strip())):
        name, equals, file = part.partition("=")
        name, file = (name.strip(), file.strip()) if equals else (networks[0], part)
        if equals and name not in networks and Path(part).expanduser().exists():
            name, file = networks[0], part
        if name not in networks:
            raise ConfigError(unknown(field, name, networks))
        if name in files or not file:
            raise ConfigError(f"{field} names one file for each network, got {text!r}")
        files[name] = file
    return files


def _overrides(
    overrides: Mapping[str, Any], recipe: Mapping[str, Any], networks: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    checked = {}
    for name, changes in overrides.items():
        if name not in networks:
            raise ConfigError(unknown(f"overrides.{name}", name, networks))
        checked[name] = _with_methods(f"overrides.{name}", changes, recipe)
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
