"""What a search needs, all of it checked before anything is trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from distill_jax import data
from distill_jax.runs.ambient import pinned
from distill_jax.runs.config import RESOLVED, ConfigError, Experiment, resolve
from distill_jax.runs.plan import warnings
from distill_jax.runs.prepare import prepare
from distill_jax.train import devices
from distill_jax.train.startup import ask_for_cpu_devices
from experiments.search import space
from experiments.search.space import Fields, Point, Space, SpaceError


@dataclasses.dataclass(frozen=True)
class Options:
    """How a space is searched.

    Args:
      trials: how many there are to be.
      at_once: how many are asked for and trained at once.
      seed: of the sampler.
      sampler: "tpe", "grid" or "random".
      pruner: "median" or "none".
      config_file: where the config comes from.
    """

    trials: int
    at_once: int = 1
    seed: int = 0
    sampler: str = "tpe"
    pruner: str = "none"
    config_file: str = ""


@dataclasses.dataclass(frozen=True)
class Search:
    """A search that can begin.

    Args:
      fields: of the config, that all trials have in common.
      space: what is searched.
      options: how; of a grid no more trials than it has points.
      about: what is recorded of it, as JSON values.
      registers: whether the config's file registers names that are used.
      notes: a line each, to be known before it begins.
    """

    fields: Fields
    space: Space
    options: Options
    about: dict[str, Any]
    registers: bool
    notes: tuple[str, ...]

    @property
    def trained_fields(self) -> Fields:
        """The fields with as many trained at once as are asked for."""
        if self.options.at_once == 1 or self.fields["population"]:
            return self.fields
        members = self.options.at_once * len(self.fields["seeds"])
        return {**self.fields, "population": members}


def prepared(config: Mapping[str, Any], text: str, options: Options) -> Search:
    """Checks everything that can be checked before anything is trained.

    Args:
      config: whose fields are searched.
      text: of the space, see `space.parse`.
      options: how.

    Raises:
      SpaceError, ConfigError, DataError: it cannot be searched.
    """
    if config["devices"] == "auto":  # by each trial's own batch, as if it were trained by itself
        ask_for_cpu_devices(min(devices.cores(), devices.MOST_ON_CPU))
    fields, left_out = space.base_of(config)
    experiment = resolve(fields)
    with pinned(experiment.dtype, experiment.precision):
        dataset = data.load(**experiment.dataset)
        _check_choosing(experiment, dataset)
        first = prepare(experiment, dataset)
    own = space.parse(text, fields, dataset)
    begun = {name: dimension.ends[0] for name, dimension in own.items()}
    experiment = resolve(space.config_of(fields, [begun]))
    notes = [left_out] if left_out else []
    notes += [line.strip() for line in warnings(first.plan, experiment)]
    if options.sampler == "grid":
        if ranges := [name for name, dimension in own.items() if not dimension.choices]:
            raise SpaceError(f"--sampler=grid needs choices, and {ranges[0]} is a range")
        points = math.prod(len(dimension.choices) for dimension in own.values())
        if points < options.trials:
            notes.append(f"the grid has {points} points, so that there are no more trials")
            options = dataclasses.replace(options, trials=points)
    if options.at_once > 1 and not space.all_swept(own, fields):
        notes.append("fields that are named by their path are trained one after the other")
        options = dataclasses.replace(options, at_once=1)
    if options.at_once > 1 and options.pruner != "none":
        notes.append("trials that are trained at once end together: none of them is pruned")
    about = {
        "name": fields["name"],
        "guidance": _named(fields, own, begun, "guidance", lambda one: one.comparisons[0].spec),
        "network": _named(fields, own, begun, "networks", lambda one: one.networks[-1]),
        "seeds": list(experiment.seeds),
        "sampler": options.sampler,
        "pruner": options.pruner,
        "config": {
            name: value for name, value in first.recorded(fields).items() if name != RESOLVED
        }
        | {"data": first.resolved["data"]},
    }
    registers = any(first.resolved["registered"].values())
    registers = registers or data.is_registered(experiment.dataset["name"])
    return Search(fields, own, options, about, registers, tuple(notes))


def _named(
    fields: Fields, own: Space, begun: Point, field: str, name: Callable[[Experiment], str]
) -> str:
    """What all trials have, or where a field is searched the names that they may have."""
    points = [{**begun, field: x} for x in own[field].choices] if field in own else [begun]
    every = [name(resolve(space.config_of(fields, [point]))) for point in points]
    return " or ".join(dict.fromkeys(every))


def _check_choosing(experiment: Experiment, dataset: data.Dataset) -> None:
    """Raises ConfigError where the validation split does not decide alone."""
    if not len(dataset.valid.labels):
        raise ConfigError(
            "the search chooses by the accuracy on the validation split, and there is none: "
            "expected dataset.valid_fraction above 0, got "
            f"{experiment.dataset['valid_fraction']}"
        )
    if experiment.selection == "test":
        raise ConfigError(
            "selection is test, so that the test set decides what the search sees: expected "
            "--config.selection=validation, or last"
        )
