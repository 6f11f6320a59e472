"""What networks give for whole splits, and what is measured of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import data
from distill_jax.evals import classification
from distill_jax.evals.metrics import Measured, combined, measure
from distill_jax.models import Network, Variables
from distill_jax.train import sharding
from distill_jax.train.metrics import accuracy_names
from distill_jax.train.teachers import TeacherOutputs, frozen_forward

PART = {"cpu": 64, "gpu": 256}  # images that a device takes at once; the last of them fill up
DISPATCH_BYTES = 2**23  # of images, about, that are looked at in one dispatch
LOGIT_BYTES = 2**28  # of one network's logits, about, that are at hand at once
EXITS = "exits"  # in place of an output: the logits of a network and of its branches


def outputs_on_split(
    pairs: Sequence[tuple[Network, Variables]],
    split: data.Split | DeviceSplit,
    dataset: data.Dataset,
    topology: sharding.Topology,
    names: tuple[str, ...],
) -> list[dict[str, Any]]:
    """What each network gives for a whole split: the outputs `names`, NumPy arrays (N, ...).

    Args:
      pairs: the networks, each with its variables; streamed images are decoded once for all.
      split: images and labels, or what `device_put` made of them.
      dataset: gives the preprocessing.
      topology: the devices that share the images.
      names: fields of `Outputs`, or `EXITS`.
    """
    runs = [
        (_outputs_program(network, len(places), names, dataset.preprocessing, topology), places)
        for network, places in _run_at_once([network for network, _ in pairs], topology)
    ]
    placed = [topology.device_put(variables) for _, variables in pairs]
    given = [tuple(placed[place] for place in places) for _, places in runs]
    dispatched: list[list[Any]] = [[] for _ in pairs]
    classes = dataset.classes
    for images, parts in (
        split.parts if isinstance(split, DeviceSplit) else _parts(split, topology, classes)
    ):
        outputs = [
            program(variables, images, np.int32(parts))
            for (program, _), variables in zip(runs, given, strict=True)
        ]
        for (_, places), of_each in zip(runs, outputs, strict=True):
            for place, own in zip(places, topology.fetch(of_each), strict=True):
                dispatched[place].append(jax.tree.map(lambda x, parts=parts: x[:parts], own))
    n = len(split.labels)

    # (P, B, ...) of each dispatch -> (N, ...); what filled up the last part is cut off.
    def join(*dispatches):
        return np.concatenate([x.reshape(-1, *x.shape[2:]) for x in dispatches])[:n]

    return [jax.tree.map(join, *outputs) for outputs in dispatched]


def _run_at_once(
    networks: Sequence[Network], topology: sharding.Topology
) -> list[tuple[Network, list[int]]]:
    """Networks, each with the places that one program runs: of the like on a GPU or TPU all.

    On a CPU each runs by itself, as `vmap` makes grouped convolutions there.
    """
    if topology.backend == "cpu":
        return [(network, [place]) for place, network in enumerate(networks)]
    places: dict[Network, list[int]] = {}
    for place, network in enumerate(networks):
        places.setdefault(network, []).append(place)
    return list(places.items())


def predict_logits(
    pairs: Sequence[tuple[Network, Variables]],
    split: data.Split | DeviceSplit,
    dataset: data.Dataset,
    topology: sharding.Topology = sharding.Topology(),
) -> list[np.ndarray]:
    """The logits of each network and of its branches: (E, N, C) float32; see `outputs_on_split`."""
    outputs_of_each = outputs_on_split(pairs, split, dataset, topology, (EXITS,))
    return [np.stack(outputs[EXITS]) for outputs in outputs_of_each]


def teacher_outputs(
    pairs: Sequence[tuple[Network, Variables]],
    split: data.Split,
    dataset: data.Dataset,
    topology: sharding.Topology,
    needs: tuple[str, ...] = (),
) -> TeacherOutputs:
    """What teachers give for a whole split, to be read by the rows of a batch: (N, K, C) logits."""
    outputs_of_each = outputs_on_split(pairs, split, dataset, topology, ("logits", *needs))
    logits = [outputs.pop("logits") for outputs in outputs_of_each]
    empty = np.zeros((len(split.labels), 0, dataset.classes), np.float32)
    return TeacherOutputs(np.stack(logits, 1) if logits else empty, tuple(outputs_of_each))


class DeviceSplit(NamedTuple):
    """A split on the devices, to be looked at more than once."""

    parts: list[tuple[Any, int]]
    labels: np.ndarray
    images: Any


def device_put(
    split: data.Split, topology: sharding.Topology, classes: int
) -> data.Split | DeviceSplit:
    """Puts a split where `predict_logits` takes it at once.

    Streamed images stay where they are, and so do examples of so many classes that not all logits
    are at hand at once.
    """
    if isinstance(split.images, data.Streamed) or len(split.labels) > at_once(classes):
        return split
    return DeviceSplit(list(_parts(split, topology, classes)), split.labels, split.images)


def at_once(classes: int) -> int:
    """How many examples' logits are at hand at once."""
    return max(1, LOGIT_BYTES // (4 * classes) // 256) * 256


def pieces(split: data.Split | DeviceSplit, classes: int) -> Iterator[data.Split | DeviceSplit]:
    """A split in parts of which all logits are at hand at once: most are one such part."""
    size = at_once(classes)
    if isinstance(split, DeviceSplit) or len(split.labels) <= size:
        yield split
        return
    for start in range(0, len(split.labels), size):
        part = slice(start, start + size)
        yield data.Split(data.take(split.images, part), split.labels[part])


def _parts(
    split: data.Split, topology: sharding.Topology, classes: int
) -> Iterator[tuple[Any, int]]:
    """Inputs (P, B, ...) shared by the devices, and how many of the P parts are any."""
    if not len(split.labels):
        return
    arrays = jax.tree.leaves(split.images)
    example = sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in arrays)
    batch = topology.count * PART.get(topology.backend, PART["gpu"])
    size = batch * max(1, DISPATCH_BYTES // (batch * max(example, 1)))
    size = min(size, batch * max(1, at_once(classes) // batch))
    several, images = topology.processes, split.images
    each = batch // several
    if several > 1:
        images = data.take(images, _own_rows(len(split.labels), size, batch, topology))
    for start, inputs in enumerate(data.parts(images, size // several)):
        parts = -(-min(size, len(split.labels) - start * size) // batch)
        inputs = jax.tree.map(lambda x: x.reshape(-1, each, *x.shape[1:]), inputs)
        yield topology.put_parts(inputs, batch), parts


def _own_rows(n: int, size: int, batch: int, topology: sharding.Topology) -> np.ndarray:
    """The examples, of `n`, that this process's devices take of `size` in each dispatch."""
    dispatches = -(-n // size)
    rows = np.arange(dispatches * size).reshape(-1, batch)[:, topology.own(batch)].ravel()
    # All take part in the last dispatch, whoever has examples in it.
    least = (dispatches - 1) * size // topology.processes + 1
    return np.minimum(rows[: max(np.sum(rows < n), least)], n - 1)


@functools.lru_cache(maxsize=32)
def _outputs_program(network, count, names, preprocessing, topology):
    """Of `count` networks that are alike: a tuple of their variables -> one of their outputs."""

    def select(outputs):
        exits = tuple(exit.logits for exit in (outputs, *outputs.branches))
        return {name: exits if name == EXITS else getattr(outputs, name) for name in names}

    def freeze(variables):
        frozen = tuple(map(network.freeze, variables))
        return frozen[0] if count == 1 else jax.tree.map(lambda *x: jnp.stack(x), *frozen)

    def forward(frozen, inputs):
        def run(one):
            return frozen_forward(network, one, preprocessing.evaluate(inputs), select)

        if count == 1:
            return (run(frozen),)
        stacked = jax.vmap(run)(frozen)
        return tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count))

    key = ("outputs", network, count, names, preprocessing, topology)
    return sharding.forward_loop(freeze, forward, topology, key)


def evaluate(
    pairs: Sequence[tuple[Network, Variables]],
    split: data.Split | DeviceSplit,
    dataset: data.Dataset,
    topology: sharding.Topology = sharding.Topology(),
) -> list[dict[str, float]]:
    """Of each network over a split accuracies, the branches' too, cross-entropy, and metrics."""
    found: list[list[Measured]] = [[] for _ in pairs]
    for piece in pieces(split, dataset.classes):
        logits_of_each = predict_logits(pairs, piece, dataset, topology)
        for own, logits in zip(found, logits_of_each, strict=True):
            own.append(measured(logits, piece, dataset))
    return [combined(own) for own in found]


def measured(
    logits: np.ndarray, split: data.Split | DeviceSplit, dataset: data.Dataset
) -> Measured:
    """Accuracies, cross-entropy and metrics of logits (E, N, C) of a split or a piece of one."""
    own = classification_metrics(logits, split.labels)
    means = {name: (value, float(len(split.labels))) for name, value in own.items()}
    return means | measure(dataset.metrics, logits[0], split.labels, split.images)


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The accuracy of each exit, and the cross-entropy of the first; logits (E, N, C)."""
    names = accuracy_names(len(logits))
    accuracies = {k: classification.accuracy(x, labels) for k, x in zip(names, logits, strict=True)}
    return {**accuracies, "loss": classification.cross_entropy(logits[0], labels)}
