"""Which stages an experiment needs, each under the id of all that determines it.

An id is a digest of content, that of the stage's teachers included: stages of different guidances
or of earlier runs that agree in all of it are one stage.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from distill_jax import data, graph, methods, models
from distill_jax.identity import changed_fields, describe, digest_json
from distill_jax.methods.registry import EdgeMethod
from distill_jax.models import Network
from distill_jax.runs.ambient import changed_settings
from distill_jax.runs.config import CLASSIFIER, LOGITS, Comparison, Experiment
from distill_jax.runs.given import digest_of_given
from distill_jax.train import optim
from distill_jax.train.checks import check_together
from distill_jax.train.reach import as_phase
from distill_jax.train.stage import Initial, Recipe, Stage
from distill_jax.train.stage_methods import check_begin, check_methods, with_needs

FORMAT = 2  # of the ids: raised when the same values come to mean another training


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
      data_digest: see `digest_of`.

    Raises:
      ValueError: a network cannot be built for these images, or given weights cannot be read.
    """
    plan = Plan({}, {}, {}, {}, {}, {})
    files, initial = experiment.teacher_weights, _initial(experiment)
    for seed in experiment.seeds:
        for comparison in experiment.comparisons:
            ids: dict[str, str] = {}
            taught_by = _untaught(comparison.graph, files)
            for component in graph.plan(taught_by, comparison.students):
                phases = _phases(experiment, dataset, comparison, component, seed)
                phases = [[_starting(stage, initial) for stage in own] for own in phases]
                ids |= _add(plan, phases, data_digest, ids, experiment.topology.count)
            for student in comparison.students:
                plan.results[comparison.label, student, seed] = ids[student]
    return plan


def warnings(plan: Plan, dtype: str) -> list[str]:
    """What looks wrong, a line each.

    These are frozen teachers smaller than a student, and registered networks where they do not
    compute in the `dtype` that was chosen.
    """
    pairs = {
        (teacher.name, stage.network.name): (teacher, stage.network.backbone)
        for stage in plan.stages.values()
        for teacher in stage.teachers
        if not isinstance(teacher, models.LogitsTable)
    }
    sizes = {
        pair: [models.count_parameters(network) for network in two] for pair, two in pairs.items()
    }
    networks = {stage.network.name: stage.network for stage in plan.stages.values()}
    return [
        f"  warning: {teacher} ({ours:,} parameters) teaches {student} ({theirs:,}), which is "
        "larger; a row is written largest first"
        for (teacher, student), (ours, theirs) in sizes.items()
        if ours < theirs
    ] + [
        f"  warning: {name} is registered and chooses its own types: dtype {dtype} is not its"
        for name, network in networks.items()
        if network.dtype != dtype != "float32"
    ]


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
    data_digest: str,
    ids: Mapping[str, str],
    devices: int,
) -> dict[str, str]:
    """Adds the phases of a component's training to the plan.

    Args:
      plan: to be added to.
      phases: see `_phases`.
      data_digest: of the data set.
      ids: of the stages of the component's frozen teachers, by network.
      devices: that share a batch.

    Returns:
      The ids of the last phase by network.
    """
    own: dict[str, str] = {}
    for stages in phases:
        stages = [dataclasses.replace(x, start=own.get(x.network.name, "")) for x in stages]
        specs = _specs(stages, data_digest, ids, devices)
        own = {stage.network.name: _id(spec) for stage, spec in zip(stages, specs, strict=True)}
        for stage, spec in zip(stages, specs, strict=True):
            stage_id = own[stage.network.name]
            plan.specs[stage_id] = spec
            plan.stages[stage_id] = dataclasses.replace(stage, id=stage_id)
            plan.teachers[stage_id] = tuple(ids[teacher.name] for teacher in stage.teachers)
            plan.together[stage_id] = tuple(own.values())
            plan.plain[stage_id] = _id(_spec(_alone(stage), data_digest, (), devices))
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


def _specs(
    stages: list[Stage], data_digest: str, ids: Mapping[str, str], devices: int
) -> list[dict[str, Any]]:
    """What determines each of the stages that one step trains, see `_spec`.

    In a cycle that is also whom each of them hears live, by the digests of what they are without.
    """
    teachers = [_in_order(s, [ids[teacher.name] for teacher in s.teachers]) for s in stages]
    pairs = zip(stages, teachers, strict=True)
    specs = [_spec(stage, data_digest, given, devices) for stage, given in pairs]
    alone = {s.network.name: _id(spec) for s, spec in zip(stages, specs, strict=True)}
    live = [_in_order(stage, [alone[peer.name] for peer in stage.live]) for stage in stages]
    if not any(live):
        return specs
    cycle = sorted(zip(alone.values(), live, strict=True))
    return [
        {**spec, "live": heard, "cycle": cycle} for spec, heard in zip(specs, live, strict=True)
    ]


def _in_order(stage: Stage, ids: list[str]) -> tuple[str, ...]:
    """The ids of a stage's teachers in their order where it matters, else sorted.

    It matters to who is dropped, to draws for each teacher, and to a user's method that tells them
    apart; a sum over them is the same but for rounding.
    """
    draws = any(type(method).init is not methods.Method.init for _, method in stage.methods)
    told = any(
        methods.is_registered(name) and not isinstance(method, EdgeMethod)
        for name, method in stage.methods
    )
    return tuple(ids if draws or told or stage.recipe.dropping.kind != "none" else sorted(ids))


def _spec(
    stage: Stage, data_digest: str, teachers: tuple[str, ...], devices: int
) -> dict[str, Any]:
    """All that determines a stage, as JSON values; its id is their digest.

    A field at its default adds nothing, so that a new field leaves the ids of old stages alone.
    """
    network = stage.network.identity
    if stage.file:
        return {"network": network, "data": data_digest, "file": digest_of_given(stage.file)}
    spec: dict[str, Any] = {
        "network": network,
        "data": data_digest,
        "recipe": _recipe_spec(stage.recipe, bool(teachers or stage.live) or _may_read(stage)),
        "methods": [
            {**methods.identity_of(name, method), **({} if weight == 1.0 else {"weight": weight})}
            for (name, method), weight in zip(stage.methods, stage.weights, strict=True)
        ],
        "seed": stage.seed,
        "teachers": teachers,
    }
    optimizer = optim.identity_of(stage.recipe.optim.optimizer)
    optional = {
        "optimizer": optimizer,
        "start": stage.start,
        "initial": _initial_spec(stage),
        "phase": stage.phase,
        "jax": changed_settings(),
        # BatchNorms then see each device's share, and not the whole batch.
        "devices": 0 if stage.recipe.sync_bn or devices == 1 else devices,
    }
    return spec | {name: value for name, value in optional.items() if value}


def _initial_spec(stage: Stage) -> dict[str, Any]:
    """The weights from elsewhere that a stage begins with; of a later phase its `start` says so."""
    if stage.initial is None or stage.start:
        return {}
    return {"digest": stage.initial.digest, **({"anew": CLASSIFIER} if stage.initial.anew else {})}


def _may_read(stage: Stage) -> bool:
    """Whether a method of a user's, who sees the numbers of kd too, acts without teachers."""
    return any(methods.is_registered(name) and not own.taught for name, own in stage.methods)


def _recipe_spec(recipe: Recipe, taught: bool) -> dict[str, Any]:
    values = changed_fields(recipe)
    if not taught:  # what only concerns teachers does not make another plain training
        for name in ("temperature", "kd_weight", "survival", "dropping"):
            values.pop(name, None)
    elif recipe.dropping.kind != "bernoulli":
        values.pop("survival", None)
    return values


def _id(spec: dict[str, Any]) -> str:
    return digest_json({"format": FORMAT, **spec})[:16]


def digest_of(dataset: data.Dataset) -> str:
    """SHA-256 (hex) of all that a stage sees of a data set: splits, classes and preprocessing.

    Of the metrics only one that chooses the weights: the others decide nothing that is kept, and a
    new one retrains no stage.
    """
    sha = hashlib.sha256(repr((dataset.classes, dataset.mean, dataset.std)).encode())
    if dataset.value_range is not None:
        sha.update(repr(dataset.value_range).encode())
    if dataset.select_by != "accuracy":
        chosen_by = describe(dataset.metrics.get(dataset.select_by))
        sha.update(f"{dataset.select_by} {chosen_by}".encode())
    if dataset.task is not None:
        structure = jax.tree.structure(dataset.task.spec)
        sha.update(f"{structure} {describe(dataset.task.preprocess)}".encode())
    for split in (dataset.train, dataset.valid, dataset.test):
        for array in (*jax.tree.leaves(split.images), split.labels):
            if isinstance(array, data.Streamed):
                sha.update(array.identity.encode())
                continue
            sha.update(repr((array.shape, array.dtype.str)).encode())
            sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()
