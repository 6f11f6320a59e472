"""Weights that networks start from and are trained on; the classifier may be drawn in their place.

The classifier is what of a network's variables has another shape for another number of classes.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from flax import traverse_util

from distill_jax import data, graph, models
from distill_jax.identity import leaves
from distill_jax.interop.files import load_counted
from distill_jax.interop.torch_weights import WeightsError
from distill_jax.models import Network, Variables
from distill_jax.runs.checkpoint import CheckpointError, read_meta
from distill_jax.runs.config import CLASSIFIER
from distill_jax.runs.given import WEIGHTS, load_of_stage, stage_folder
from distill_jax.train.stage import Stage

SHOWN = 3  # of the entries that do not fit


class Beginning(NamedTuple):
    """What a stage begins with.

    Args:
      variables: of its network's backbone, without those that are to be drawn.
      classes: that the file's network tells apart.
    """

    variables: Variables
    classes: int


def load_initial(stages: Iterable[Stage], dataset: data.Dataset) -> dict[str, Beginning]:
    """What each of the stages that start from weights begins with, by its id; files are read once.

    Raises:
      WeightsError: weights that cannot be read, are of another network, were trained on images that
        were normalised otherwise, or of another number of classes where the classifier is kept.
    """

    @functools.cache
    def load(file: str, network: Network, anew: bool) -> Beginning:
        return _load(file, network, anew, dataset)

    begun = [(x, x.initial) for x in stages if x.initial is not None and not x.start]
    return {
        stage.id: load(initial.file, stage.network.backbone, initial.anew)
        for stage, initial in begun
    }


def lines(stages: Iterable[Stage], beginnings: dict[str, Beginning]) -> list[str]:
    """Which networks start from which weights, and what of them is drawn, a line each."""
    found = {}
    for stage in stages:
        if stage.id in beginnings and stage.initial is not None:
            name, own = stage.network.name, stage.initial
            classes = f"classifier ({stage.network.classes} classes) drawn anew"
            drawn = f"; {classes}; the file has {beginnings[stage.id].classes}"
            found[name] = f"  {name} starts from {own.file}{drawn if own.anew else ''}"
    return list(found.values())


def _load(file: str, network: Network, anew: bool, dataset: data.Dataset) -> Beginning:
    base, _ = graph.architecture(network.name)

    def of(classes: int) -> Network:
        return models.build(base, classes, dataset.inputs, network.dtype)

    try:
        wider = of(network.classes + 1)
    except ValueError:  # somebody's network that has so many and no more
        wider = network
    try:
        folder = stage_folder(file)
        if folder is None:
            path, normalisation = Path(file).expanduser(), dataset.normalisation
            variables, classes = load_counted(path, network, wider, of, normalisation)
        else:
            classes = _classes_of_stage(folder, network, wider)
            own = network if classes == network.classes else of(classes)
            variables = load_of_stage(folder, own, dataset)
    except WeightsError as error:
        raise WeightsError(f"init.weights: {_in_one_line(error)}") from None
    if not anew and classes != network.classes:
        raise WeightsError(
            f"init.weights: {file} is {network.name} with {classes} classes, and {dataset.name} "
            f"has {network.classes}: expected as many, or init.anew={CLASSIFIER!r}, which draws "
            "the classifier and takes the rest"
        )
    if anew:
        variables = _without_classifier(network, wider, variables)
    return Beginning(variables, classes)


def _in_one_line(error: Exception) -> str:
    """An error that lists entries, with the first of them."""
    what, *entries = (line.strip() for line in str(error).splitlines())
    more = f" and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
    return " ".join((what, ", ".join(entries[:SHOWN]))).strip() + more


def _without_classifier(network: Network, wider: Network, variables: Variables) -> Variables:
    """What of a network's variables has one shape for every number of classes.

    Raises:
      WeightsError: all of it has.
    """
    flat, (own, other) = traverse_util.flatten_dict(variables), map(_shapes, (network, wider))
    kept = {path: x for path, x in flat.items() if own[path] == other[path]}
    if len(kept) == len(flat):
        raise WeightsError(
            f"init.anew is {CLASSIFIER!r}, and nothing in {network.name} has another shape for "
            "another number of classes: expected a network whose last layer has"
        )
    return traverse_util.unflatten_dict(kept)


def _shapes(network: Network) -> dict[tuple[str, ...], tuple[int, ...]]:
    return {path: x.shape for path, x in traverse_util.flatten_dict(network.shapes).items()}


def _classes_of_stage(folder: Path, network: Network, wider: Network) -> int:
    """How many classes the network of a stage's folder has; the data's where it does not show."""
    try:
        types = read_meta(folder / WEIGHTS)["types"]
    except CheckpointError as error:
        raise WeightsError(str(error)) from None
    own, other = (
        {path: leaf.shape for path, leaf in leaves(one.shapes)} for one in (network, wider)
    )
    for path, shape in own.items():
        for axis, size in enumerate(shape):
            if size != other[path][axis] and path in types:
                found = ast.literal_eval(types[path].partition(" ")[2])  # "float32 (64, 10)"
                return int(found[axis]) - size + network.classes
    return network.classes
