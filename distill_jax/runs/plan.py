"""Which stages an experiment needs, each under the id of all that determines it.

Stages of different guidances that have one id are one stage, see `ids`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from distill_jax import data, graph, methods, models
from distill_jax.identity import describe, digest_json
from distill_jax.models import Network
from distill_jax.runs.config import (
    CLASSIFIER,
    LOGITS,
    Comparison,
    Experiment,
    default_config,
)
from distill_jax.runs.given import digest_of_given
from distill_jax.runs.ids import Setting, id_of, spec_of, specs_of
from distill_jax.train import optim
from distill_jax.train.checks import check_together
from distill_jax.train.reach import as_phase
from distill_jax.train.stage import Initial, Stage
from distill_jax.train.stage_methods import check_begin, check_methods, with_needs


@dataclasses.dataclass(frozen=True)
class Plan:
    """Stages in the order of training, and which of them gives which result.

    Args:
      stages: by id.
      teachers: the ids of the stages of each stage's frozen teachers.
      together: the ids of the stages that one step trains, of each: itself, or those of its cycle.
      results: (guidance, network, seed) -> id.
      plain: the id of the same network trained alone by the same recipe, by id.
      specs: what each id is the digest of.
    """

    stages: dict[str, Stage]
    teachers: dict[str, tuple[str, ...]]
    together: dict[str, tuple[str, ...]]
    results: dict[tuple[str, str, int], str]
    plain: dict[str, str]
    specs: dict[str, dict[str, Any]]


def make_plan(experiment: Experiment, dataset: data.Dataset, data_digest: str) -> Plan:
    """The stages of an experiment, each once, teachers before those whom they teach.

    Args:
      experiment: what is asked for.
      dataset: on what.
      data_digest: see `ids.digest_of`.

    Raises:
      ValueError: a network cannot be built for these images, or given weights cannot be read.
    """
    plan = Plan({}, {}, {}, {}, {}, {})
    files, initial = experiment.teacher_weights, _initial(experiment)
    setting = Setting(data_digest, experiment.topology.count)
    for seed in experiment.seeds:
        for comparison in experiment.comparisons:
            ids: dict[str, str] = {}
            taught_by = _untaught(comparison.graph, files)
            for component in graph.plan(taught_by, comparison.students):
                phases = _phases(experiment, dataset, comparison, component, seed)
                phases = [[_starting(stage, initial) for stage in own] for own in phases]
                ids |= _add(plan, phases, ids, setting)
            for student in comparison.students:
                plan.results[comparison.label, student, seed] = ids[student]
    return plan


def warnings(plan: Plan, experiment: Experiment) -> list[str]:
    """What looks wrong, a line each.

    These are frozen teachers smaller than a student, methods that are asked for and that no network
    hears, and registered networks where they do not compute in the `dtype` that was chosen.
    """
    dtype, stages = experiment.dtype, plan.stages.values()
    pairs = {
        (teacher.name, stage.network.name): (teacher, stage.network.backbone)
        for stage in stages
        for teacher in stage.teachers
        if not isinstance(teacher, models.LogitsTable)
    }
    sizes = {
        pair: [models.count_parameters(network) for network in two] for pair, two in pairs.items()
    }
    networks = {stage.network.name: stage.network for stage in stages}
    used = {name for stage in stages for name, _ in stage.methods} | {"ce"}
    unheard = set(experiment.methods) - used - set(default_config().methods)
    if not any(stage.taught_by for stage in stages):  # nor is it asked of anybody
        unheard = set()
    larger = [
        f"{teacher} ({ours:,} parameters) teaches {student} ({theirs:,}), which is larger; a row "
        "is written largest first"
        for (teacher, student), (ours, theirs) in sizes.items()
        if ours < theirs
    ]
    left_out = [
        f"no network of this run is taught by method {name!r}, which is left out"
        for name in sorted(unheard)
    ]
    types = [
        f"{name} is registered and chooses its own types: dtype {dtype} is not its"
        for name, network in networks.items()
        if network.dtype != dtype != "float32"
    ]
    return [f"  warning: {line}" for line in (*larger, *left_out, *types)]


def registered(plan: Plan, dataset: data.Dataset, source: str = "") -> dict[str, dict[str, Any]]:
    """What the names that a user registered stand for, of those that a plan uses.

    Args:
      plan: the plan.
      dataset: the names of its metrics are the user's too.
      source: the name by which the data set was loaded, if by any.

    Returns:
      {"networks", "methods", "optimizers"} and, where there are any, {"datasets", "metrics"}: name
      -> identity, its code as a digest.
    """
    networks: dict[str, Any] = {}
    named: dict[str, Any] = {}
    optimizers: dict[str, Any] = {}
    for stage in plan.stages.values():
        networks[stage.network.name] = stage.network.identity
        named |= {name: methods.identity_of(name, methods.build(name)) for name, _ in stage.methods}
        optimizer = stage.recipe.optim.optimizer
        optimizers[optimizer] = optim.identity_of(optimizer)
    tables = {"networks": networks, "methods": named, "optimizers": optimizers}
    found = {kind: of_users(identities) for kind, identities in tables.items()}
    metrics = {
        name: {"version": "", "repr": describe(metric)} for name, metric in dataset.metrics.items()
    }
    others: dict[str, Any] = {"datasets": {source: data.identity_of(source)}, "metrics": metrics}
    return found | {kind: own for kind, table in others.items() if (own := of_users(table))}


def of_users(identities: dict[str, Any]) -> dict[str, Any]:
    """Those identities that have a version, as only what was registered has; code as a digest."""
    return {
        name: {**identity, "repr": digest_json(identity["repr"])[:16]}
        for name, identity in identities.items()
        if isinstance(identity, dict) and "version" in identity
    }


def build_network(experiment: Experiment, dataset: data.Dataset, name: str) -> Network:
    """The network called `name`, for the images of a data set."""
    base, _ = graph.architecture(name)
    if experiment.teacher_weights.get(name, "").startswith(LOGITS):
        return models.logits_table(name, dataset.classes, dataset.inputs)
    network = models.build(base, dataset.classes, dataset.inputs, experiment.dtype)
    return named(network, name)


def _initial(experiment: Experiment) -> dict[str, Initial]:
    """What networks start from, by name, with the digests of what is there now."""
    files, anew = experiment.init.weights, experiment.init.anew
    if anew and not files:
        raise ValueError(
            f"init.anew is {anew!r}, and init.weights is empty: expected the file that the rest is "
            "taken from, as in init.weights=FILE, or NAME=FILE for each network"
        )
    return {
        name: Initial(file, digest_of_given(file, "init.weights"), anew == CLASSIFIER)
        for name, file in files.items()
    }


def _starting(stage: Stage, initial: Mapping[str, Initial]) -> Stage:
    """The stage with the weights that its network starts from, if any are given."""
    own = initial.get(stage.network.name)
    return stage if own is None else dataclasses.replace(stage, initial=own)


def _untaught(guidance: graph.Graph, names: Mapping[str, Any]) -> graph.Graph:
    """The graph in which nobody teaches `names`: their weights are given."""
    teachers = zip(guidance.names, guidance.teachers, strict=True)
    return graph.Graph(
        guidance.names, tuple(() if name in names else taught for name, taught in teachers)
    )


def _phases(
    experiment: Experiment,
    dataset: data.Dataset,
    comparison: Comparison,
    component: graph.Component,
    seed: int,
) -> list[list[Stage]]:
    """The phases of a component's training, the last of them its stages; of each the networks."""
    # Networks of a cycle are changed alike, as they have to agree.
    wanted = any(name in comparison.students for name in component.networks)
    changes = dict(comparison.changes) if wanted else {}
    file = experiment.teacher_weights.get(component.networks[0], "")
    phases = experiment.phases if any(component.teachers) and not file else ()
    planned: list[list[Stage]] = []
    for phase in (*phases, {}):
        stages = []
        for i, name in enumerate(component.networks):
            own = dict(changes)
            if comparison.stochastic and name == experiment.networks[-1]:
                own["dropping"] = experiment.dropping
            before = [earlier[i] for earlier in planned]
            stages.append(_stage(experiment, dataset, component, name, seed, own, phase, before))
        check_together(stages)
        planned.append(stages)
    return planned


def _stage(
    experiment: Experiment,
    dataset: data.Dataset,
    component: graph.Component,
    name: str,
    seed: int,
    changes: dict[str, Any],
    phase: dict[str, Any],
    before: list[Stage],
) -> Stage:
    """One network of a component in one phase of its training; the last phase is {}.

    It follows the phases `before`.
    """

    def build(name):
        return build_network(experiment, dataset, name)

    network = build(name)
    # A network with branches teaches as what is left of it, under the name that the graph gives it.
    teachers = tuple(named(build(x).backbone, x) for x in component.frozen(name))
    # A phase ends with its last weights: what it is good for shows in the next one alone.
    selection = {"selection": "last"} if phase else {}
    # Weights that are swept are the experiment's: a phase with methods of its own keeps theirs.
    swept = {k: v for k, v in changes.items() if "methods" in phase and _is_weight(k)}
    values = {k: v for k, v in {**changes, **phase, **selection}.items() if k not in swept}
    live = component.live(name)
    met = {name for earlier in before for name, _ in earlier.methods}
    frozen = component.frozen(name)
    chosen = experiment.methods_of(network, frozen, live, values, met, phase=bool(phase))
    stage = Stage(
        network=network,
        teachers=teachers,
        recipe=experiment.recipe_of(name, **values),
        seed=experiment.seed_of(name, seed),
        methods=tuple((m, method) for m, method, _ in chosen),
        weights=tuple(weight for *_, weight in chosen),
        file=experiment.teacher_weights.get(name, ""),
        live=tuple(build(x) for x in live),
    )
    labels = dataset.limited(stage.recipe.train_limit, stage.seed).train.labels
    stage = with_needs(stage, labels)
    if phase or before:  # what follows traces the methods
        check_methods(stage, labels)
    if phase:
        stage = as_phase(stage, labels)
    if before:
        check_begin(before[-1], stage, labels)
    return stage


@functools.lru_cache(maxsize=128)  # networks from outside are equal to themselves alone
def named(network: Network, name: str) -> Network:
    """The network under another name; itself where that is its own."""
    return network if network.name == name else dataclasses.replace(network, name=name)


def _is_weight(name: str) -> bool:
    return name.startswith("methods.")


def _add(
    plan: Plan,
    phases: list[list[Stage]],
    ids: Mapping[str, str],
    setting: Setting,
) -> dict[str, str]:
    """Adds the phases of a component's training to the plan.

    Args:
      plan: to be added to.
      phases: see `_phases`.
      ids: of the stages of the component's frozen teachers, by network.
      setting: what they have in common with all others.

    Returns:
      The ids of the last phase by network.
    """
    own: dict[str, str] = {}
    for stages in phases:
        stages = [dataclasses.replace(x, start=own.get(x.network.name, "")) for x in stages]
        specs = specs_of(stages, ids, setting)
        own = {stage.network.name: id_of(spec) for stage, spec in zip(stages, specs, strict=True)}
        for stage, spec in zip(stages, specs, strict=True):
            stage_id = own[stage.network.name]
            plan.specs[stage_id] = spec
            plan.stages[stage_id] = dataclasses.replace(stage, id=stage_id)
            plan.teachers[stage_id] = tuple(ids[teacher.name] for teacher in stage.teachers)
            plan.together[stage_id] = tuple(own.values())
            plan.plain[stage_id] = id_of(spec_of(_alone(stage), (), setting))
    return own


def _alone(stage: Stage) -> Stage:
    """The same network without teachers, by the same recipe."""
    # Untaught, the cross-entropy is balanced against nothing, but for methods without teachers.
    heard = any(method.taught for _, method in stage.methods)
    own = [
        ((name, methods.CrossEntropy()), 1.0)
        if heard and isinstance(method, methods.CrossEntropy)
        else ((name, method), weight)
        for (name, method), weight in zip(stage.methods, stage.weights, strict=True)
        if not method.taught
    ]
    if not own:  # a method of its teachers counted the labels
        own = [(("ce", methods.CrossEntropy()), 1.0)]
    return dataclasses.replace(
        stage,
        teachers=(),
        live=(),
        methods=tuple(pair for pair, _ in own),
        weights=tuple(weight for _, weight in own),
        start="",
        phase=False,
    )
