"""The config of an experiment: its defaults, and the typed values that come of it.

A config file starts from `default_config`; `resolve` checks everything that can be checked without
data and turns it into an `Experiment`.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from distill_jax import guidance, losses, models
from distill_jax.dropping import Dropping
from distill_jax.optim import OptimOptions
from distill_jax.parallel import Topology, ask_for_cpu_devices
from distill_jax.population import TEACHER_LOGITS
from distill_jax.recipe import Recipe

SEEDS = "a whole number from 0 to 2**32 - 1"
PROTOCOLS = ("standard", "paper", "official")
STOCHASTIC = "+drop"  # suffix of a guidance whose last network is taught stochastically


class ConfigError(ValueError):
    """A config that cannot be run; the message names the field, its value and what was expected."""


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
    guidance: guidance.Guidance
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


def default_config() -> ml_collections.ConfigDict:
    """Every field there is, with its default; a config file changes some of them."""
    return ml_collections.ConfigDict(
        {
            "name": "experiment",
            # Where images come from; see distill_jax.data.NAMES.
            "dataset": {
                "name": "digits",
                "data_dir": "",
                "valid_fraction": 0.1,
                "split_seed": 0,
                "mean": (),
                "std": (),
            },
            # The row, largest first, and what is compared in it: none, direct, chain, dense, a
            # path a>b>c, edges c<a+b;d<a+c; with +drop the last network is taught stochastically.
            "networks": ("plane6", "plane4", "plane2"),
            "guidance": ("none", "direct", "chain", "dense"),
            "students": (),  # whose results are wanted; the smallest network where empty
            "seeds": (0,),
            # standard: the field's usual loss, weights chosen on the validation split;
            # paper: the loss as the papers write it; official: as their codes compute it, and the
            # best epoch chosen on the test set as they do.
            "protocol": "standard",
            "selection": "",  # validation, test or last; by protocol where empty
            "recipe": {
                "epochs": 30,
                "batch_size": 128,
                "last_batch": "drop",
                "augment": "none",
                "train_limit": 0,
                "sync_bn": True,
                "temperature": 4.0,
                "kd_weight": 0.5,
                "optimizer": "sgd",
                "learning_rate": 0.05,
                "momentum": 0.9,
                "nesterov": False,
                "weight_decay": 1e-4,
                "schedule": "constant",
                "milestones": (0.5, 0.75),
                "decay": 0.1,
                "warmup_epochs": 0.0,
            },
            "loss": {"kl_reduction": "", "cross_entropy": "", "teachers": "sum"},
            "dropping": {"kind": "", "number": 1, "survival": 0.75, "teacher_droppable": True},
            # TESKD, for networks called evolving:NAME; see distill_jax.losses.EvolveOptions.
            "evolve": dataclasses.asdict(losses.EvolveOptions()),
            # Networks that are not trained but read, from .safetensors, .npz or .pth: FILE for the
            # largest of the row, or NAME=FILE,NAME=FILE.
            "teacher_weights": "",
            # {network: {recipe field or seed: value}}
            "overrides": {},
            # {label: {recipe field: value}}: plain training of the students, changed like that.
            "controls": {},
            # {recipe field or "survival": values}: every row once for each of them, trained at once
            # where they are numbers of the loss or the optimizer.
            "sweep": ml_collections.FieldReference({}, field_type=object),
            "dtype": "float32",
            "parallel": "jit",  # or pmap
            "devices": 1,  # 0 takes all; on a CPU as many as are asked for
            "population": 0,  # how many seeds or values train at once: 0 as pays, 1 one by one
            # Where the teachers' logits come from: graph, computed at every step; table, computed
            # once for images that never change; auto, the table where it can be and is small.
            "teacher_logits": "auto",
            "nonfinite": "halt",  # or "skip N" to pass over up to N steps that are not finite
            "checkpoint_every": "5 minutes",
        }
    )


def smoke(config: ml_collections.ConfigDict, **changes: Any) -> ml_collections.ConfigDict:
    """The config cut down to seconds: synthetic images of the right kind, one epoch, one seed."""
    shape, classes = {
        "digits": ("8x8x1", 10),
        "fashion_mnist": ("28x28x1", 10),
        "cifar100": ("32x32x3", 100),
    }.get(config.dataset.name, ("32x32x3", 10))
    config.name += "-smoke"
    config.dataset.name = f"synthetic:{shape}:{classes}:{max(128, 2 * classes)}:{max(64, classes)}"
    config.dataset.valid_fraction = 0.5
    config.seeds = (0,)
    config.recipe.update(epochs=1, batch_size=32, warmup_epochs=0.0)
    for section in (config.recipe, *config.overrides.values(), *config.controls.values()):
        if section.get("train_limit"):
            section.train_limit = 4
        if "epochs" in section:
            section.epochs = 1
    config.update(changes)
    return config


def resolve(config: Mapping[str, Any] | ml_collections.ConfigDict) -> Experiment:
    """The experiment that a config describes.

    Raises:
      ConfigError: unknown field, value of another type or out of range, impossible row.
    """
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    values = _merge(default_config().to_dict(), values, "config")
    try:
        return _resolve(values)
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(str(error)) from error


def _resolve(values: dict[str, Any]) -> Experiment:
    protocol = _one_of("protocol", values["protocol"], PROTOCOLS)
    preset = losses.preset("dense", protocol)
    loss = {k: v or getattr(preset, k) for k, v in values["loss"].items()}
    dropping = dict(values["dropping"])
    survival = dropping.pop("survival")
    dropping["kind"] = dropping["kind"] or ("bernoulli" if protocol == "paper" else "fixed")
    networks = _words("networks", values["networks"])
    for name in networks:
        models.check_name(name)
    students = _words("students", values["students"]) or networks[-1:]
    for student in students:
        _one_of("students", student, networks)
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
        dtype=_one_of("dtype", values["dtype"], tuple(models.DTYPES)),
        topology=Topology(values["parallel"], values["devices"]),
        population=_at_least("population", values["population"], 0),
        teacher_logits=_one_of("teacher_logits", values["teacher_logits"], TEACHER_LOGITS),
        may_skip=_may_skip(values["nonfinite"]),
        checkpoint_every=values["checkpoint_every"],
    )
    checkpoint_due(experiment.checkpoint_every)
    for row in experiment.rows:
        for stage in guidance.plan(row.guidance, students):
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
    specs = _words("guidance", values["guidance"])
    if not specs:
        raise ConfigError("guidance is empty: name at least one, such as 'dense'")
    rows = []
    for spec in specs:
        stochastic = spec.endswith(STOCHASTIC)
        row = Row(spec, guidance.from_spec(spec.removesuffix(STOCHASTIC), networks), stochastic)
        rows.extend(_swept(row, values))
    for label, changes in values["controls"].items():
        checked = _merge(values["recipe"], changes, f"controls.{label}", fill=False)
        rows.append(Row(f"none, {label}", guidance.none(networks), False, tuple(checked.items())))
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
            raise ConfigError(_unknown(f"sweep.{name}", name, tuple(defaults)))
        choices = tuple(choices) if isinstance(choices, (list, tuple)) else (choices,)
        fields[name] = [_typed(f"sweep.{name}", choice, defaults[name]) for choice in choices]
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
    for part in _words("teacher_weights", text):
        name, equals, file = part.partition("=")
        name, file = (name.strip(), file.strip()) if equals else (networks[0], part)
        if name not in networks:
            raise ConfigError(_unknown("teacher_weights", name, networks))
        if name in files or not file:
            raise ConfigError(f"teacher_weights names one file for each network, got {text!r}")
        files[name] = file
    return files


def _overrides(overrides, recipe, networks) -> dict[str, dict[str, Any]]:
    checked = {}
    for name, changes in overrides.items():
        if name not in networks:
            raise ConfigError(_unknown(f"overrides.{name}", name, networks))
        checked[name] = _merge({**recipe, "seed": 0}, changes, f"overrides.{name}", fill=False)
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


def _words(name: str, value: Any) -> tuple[str, ...]:
    # A tuple given on the command line as a,b arrives as one string ("a,b",).
    parts = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(part, str) for part in parts):
        raise ConfigError(f"{name} are names, got {parts}")
    return tuple(word.strip() for part in parts for word in part.split(",") if word.strip())


def _merge(defaults: Mapping, values: Mapping, where: str, fill: bool = True) -> dict[str, Any]:
    """`values`, each checked against the type of its default, and defaults for the rest."""
    merged = dict(defaults) if fill else {}
    _check_section(where, values)
    for name, value in values.items():
        if name not in defaults:
            raise ConfigError(_unknown(f"{where}.{name}", name, tuple(defaults)))
        merged[name] = _typed(f"{where}.{name}", value, defaults[name])
    return merged


def _check_section(where: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is a section with fields, got {value!r}")


def _typed(where: str, value: Any, default: Any) -> Any:
    if isinstance(default, Mapping):
        # Sections whose keys are the user's own (overrides, controls) are checked by their readers.
        _check_section(where, value)
        return _merge(default, value, where) if default else dict(value)
    if isinstance(default, tuple):
        if isinstance(value, str):
            return (value,)
        if isinstance(value, (list, tuple)):
            return tuple(value)
    elif isinstance(default, bool) or isinstance(value, bool):
        if isinstance(default, bool) and isinstance(value, bool):
            return value
    elif isinstance(default, float) and isinstance(value, (int, float)):
        return float(value)
    elif isinstance(value, type(default)):
        return value
    raise ConfigError(f"{where} is a {type(default).__name__}, got {value!r}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ConfigError(_unknown(name, value, allowed))
    return value


def _unknown(where: str, name: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(name), known, 1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{where}: unknown {name!r}{hint} There are {', '.join(known)}"
