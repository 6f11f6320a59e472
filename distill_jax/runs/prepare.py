"""From a resolved config to a plan that can be trained: everything is checked, nothing compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from distill_jax import data
from distill_jax.identity import plain
from distill_jax.models import Variables
from distill_jax.runs.config import RESOLVED, ConfigError, Experiment
from distill_jax.runs.given import load_given
from distill_jax.runs.ids import digest_of
from distill_jax.runs.initial import Beginning, load_initial
from distill_jax.runs.inputs import describe_inputs
from distill_jax.runs.plan import Plan, make_plan, registered
from distill_jax.train.checks import check
from distill_jax.train.options import caches_teachers


class Prepared(NamedTuple):
    """What is trained, on what.

    Args:
      experiment: what is asked for.
      dataset: the data.
      plan: the stages.
      given: the weights of stages that are not trained, by id.
      resolved: what the config comes to, as JSON values.
      beginnings: what stages begin with that do not start from fresh weights, by id.
    """

    experiment: Experiment
    dataset: data.Dataset
    plan: Plan
    given: dict[str, Variables]
    resolved: dict[str, Any]
    beginnings: dict[str, Beginning] = {}

    @property
    def shared(self) -> dict[str, Any]:
        """What the config comes to, in which several processes have to agree."""
        return plain({**self.resolved, "dataset": {**self.resolved["dataset"], "data_dir": ""}})

    def recorded(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """What the working directory keeps of a config: its fields, and what they come to."""
        return {**_as_json(fields), RESOLVED: self.resolved}


def prepare(experiment: Experiment, dataset: data.Dataset | None = None) -> Prepared:
    """Loads the data, makes the plan, and checks all of its stages.

    Args:
      experiment: what is asked for.
      dataset: used in place of the config's.

    Raises:
      ConfigError, data.DataError: it cannot be trained.
    """
    source = "" if dataset is not None else experiment.dataset["name"]
    if dataset is None:
        dataset = data.load(**experiment.dataset)
    else:
        data.check(dataset)
    if experiment.workers and isinstance(dataset.train.images, data.Streamed):
        data.check_grain(experiment.workers)
    try:
        data_digest = digest_of(dataset)
        plan = make_plan(experiment, dataset, data_digest)
        # All of them, before the first is compiled: training itself checks no stage again.
        for stage in plan.stages.values():
            check(stage, dataset, experiment.topology)
        for together in plan.together.values():
            one_step = [plan.stages[stage_id] for stage_id in together]
            caches_teachers(one_step, dataset, experiment.teacher_logits)
        given = {
            stage_id: load_given(stage, dataset)
            for stage_id, stage in plan.stages.items()
            if stage.file
        }
        beginnings = load_initial(plan.stages.values(), dataset)
        names = registered(plan, dataset, source)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    resolved = {
        **_resolved(experiment),
        **describe_inputs(dataset),
        "data": data_digest,
        **({} if source else {"given": dataset.name}),
        "registered": names,
    }
    return Prepared(experiment, dataset, plan, given, resolved, beginnings)


def _resolved(experiment: Experiment) -> dict[str, Any]:
    values = dataclasses.asdict(experiment)
    for one, source in zip(values["comparisons"], experiment.comparisons, strict=True):
        one["graph"] = dict(zip(source.graph.names, source.graph.teachers, strict=True))
    # A rate that is a family's where none is given, and the same rate given, are one experiment.
    values["learning_rates"] = {
        name: experiment.recipe_of(name).optim.learning_rate for name in experiment.networks
    }
    for section in (values["recipe"], *values["overrides"].values()):
        section.pop("learning_rate", None)
    return values


def _as_json(value: Any) -> Any:
    """A config's value as JSON has it: a matrix of teachers may be an array."""
    if isinstance(value, Mapping):
        return {str(name): _as_json(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(own) for own in value]
    return value.tolist() if hasattr(value, "tolist") else value
