"""The id of a stage: a digest of all that determines what it is trained to.

Content counts and names do not: that of the stage's teachers, of the data, and of the code that a
user registered. Stages of different guidances or of earlier runs that agree in all of it are one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from distill_jax import data, methods
from distill_jax.identity import changed_fields, describe, digest_json
from distill_jax.methods.registry import EdgeMethod
from distill_jax.runs.ambient import changed_settings
from distill_jax.runs.config import CLASSIFIER
from distill_jax.runs.given import digest_of_given
from distill_jax.train import optim
from distill_jax.train.stage import Recipe, Stage

FORMAT = 2  # of the ids: raised when the same values come to mean another training


class Setting(NamedTuple):
    """What all stages of a plan have in common.

    Args:
      data: the digest of the data set, see `digest_of`.
      devices: that share a batch.
    """

    data: str
    devices: int


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


def specs_of(stages: list[Stage], ids: Mapping[str, str], setting: Setting) -> list[dict[str, Any]]:
    """What determines each of the stages that one step trains, see `spec_of`.

    In a cycle that is also whom each of them hears live, by the digests of what they are without.
    """
    teachers = [_in_order(s, [ids[teacher.name] for teacher in s.teachers]) for s in stages]
    pairs = zip(stages, teachers, strict=True)
    specs = [spec_of(stage, given, setting) for stage, given in pairs]
    alone = {s.network.name: id_of(spec) for s, spec in zip(stages, specs, strict=True)}
    live = [_in_order(stage, [alone[peer.name] for peer in stage.live]) for stage in stages]
    if not any(live):
        return specs
    cycle = sorted(zip(alone.values(), live, strict=True))
    return [
        {**spec, "live": heard, "cycle": cycle} for spec, heard in zip(specs, live, strict=True)
    ]


def spec_of(stage: Stage, teachers: tuple[str, ...], setting: Setting) -> dict[str, Any]:
    """All that determines a stage, as JSON values; its id is their digest.

    A field at its default adds nothing, so that a new field leaves the ids of old stages alone.
    """
    network = stage.network.identity
    if stage.file:
        return {"network": network, "data": setting.data, "file": digest_of_given(stage.file)}
    spec: dict[str, Any] = {
        "network": network,
        "data": setting.data,
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
        "devices": 0 if stage.recipe.sync_bn or setting.devices == 1 else setting.devices,
    }
    return spec | {name: value for name, value in optional.items() if value}


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


def id_of(spec: dict[str, Any]) -> str:
    """The id of a stage that `spec` determines."""
    return digest_json({"format": FORMAT, **spec})[:16]
