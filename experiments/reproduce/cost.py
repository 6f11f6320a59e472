"""What a table costs: the operations of its training steps, and hours at an assumed rate.

  python -m experiments.reproduce.cost     # counts operations.json anew

The forward pass of each network is counted from its shapes by `experiments.benchmark.flops`, once
and for all: tracing some forty networks takes longer than a list should.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from distill_jax import graph, models
from distill_jax.runs.config import Comparison, Experiment, resolve
from experiments import paired
from experiments.benchmark import flops
from experiments.reproduce.budgets import BUDGETS, groups
from experiments.reproduce.tables import Table

OPERATIONS = Path(__file__).with_name("operations.json")
# Of two cores of an AMD EPYC that has nothing else to do; steps in experiments/results/*.json have
# 80 to 230 by network. See --rate.
GIGAFLOPS = 80.0


class Images(NamedTuple):
    """Of a data set: their size in pixels, classes, and how many there are to train on."""

    pixels: int
    classes: int
    train: int


KNOWN = {
    "cifar10": Images(32, 10, 50_000),
    "cifar100": Images(32, 100, 50_000),
    "tfds:imagenet2012": Images(224, 1000, 1_281_167),
}


def images_of(dataset: str) -> Images | None:
    """Of a data set by its name; None of one whose images are not known beforehand."""
    kind, _, spec = dataset.partition(":")
    if kind == "synthetic":
        shape, classes, train, _ = spec.split(":")
        return Images(int(shape.partition("x")[0]), int(classes), int(train))
    return KNOWN.get(dataset)


class Stage(NamedTuple):
    """A network that is trained: its name, seed, frozen teachers' stages and what else differs."""

    network: str
    seed: int
    teachers: tuple[Stage, ...]
    options: str
    epochs: int
    augmented: bool


def stages(experiment: Experiment) -> Iterator[Stage]:
    """The stages of an experiment; what several guidances share comes several times."""
    for seed in experiment.seeds:
        for comparison in experiment.comparisons:
            found: dict[str, Stage] = {}
            for component in graph.plan(comparison.graph, comparison.students):
                for name in component.networks:
                    teachers = tuple(found[x] for x in component.frozen(name))
                    live = component.live(name)
                    taught = bool(teachers or live)
                    options = _options(experiment, comparison, name, live) if taught else ""
                    options += str(experiment.evolve) if ":" in name else ""
                    recipe = experiment.recipe_of(name)
                    epochs = recipe.epochs
                    if taught:
                        epochs += sum(phase.get("epochs", epochs) for phase in experiment.phases)
                    seed_of = experiment.seed_of(name, seed)
                    augmented = recipe.augment != "none"
                    found[name] = Stage(name, seed_of, teachers, options, epochs, augmented)
            yield from found.values()


def _options(
    experiment: Experiment, comparison: Comparison, name: str, live: tuple[str, ...]
) -> str:
    """What makes another training of the same network by the same teachers."""
    dropping = experiment.dropping if comparison.stochastic else None
    if name != experiment.networks[-1]:
        dropping = None
    survival = experiment.recipe["survival"] if dropping else None
    recipe = experiment.recipe_of(name)
    numbers = (recipe.temperature, recipe.kd_weight, dropping, survival, experiment.methods, live)
    return repr(numbers)


def operations(experiments: Iterable[Experiment]) -> float | None:
    """Of all training steps together, each stage once; None of unknown images or networks.

    A step takes a forward and a backward pass of the student, which counts as two. Teachers are run
    at every step where images are augmented, else once for each image.
    """
    counted, total = json.loads(OPERATIONS.read_text("utf-8")), 0.0
    trained: dict[Stage, dict[str, object]] = {}
    for experiment in experiments:
        trained |= dict.fromkeys(stages(experiment), experiment.dataset)
    for stage, dataset in trained.items():
        images = images_of(str(dataset["name"]))
        if images is None:
            return None
        examples = images.train * (1 - float(str(dataset["valid_fraction"])))

        def forward(name: str, images: Images = images) -> float | None:
            base = graph.architecture(name)[0]
            return counted.get(f"{base} {images.pixels} {images.classes}")

        backbones = [models.backbone_name(teacher.network) for teacher in stage.teachers]
        own, taught = forward(stage.network), [forward(name) for name in backbones]
        if own is None or None in taught:
            return None
        often = stage.epochs if stage.augmented else 1
        total += examples * (3 * stage.epochs * own + often * sum(taught))
    return total


def hours(table: Table, given: argparse.Namespace, budget: str) -> float | None:
    """What a table takes at a budget; None where that is not known."""
    at_budget = argparse.Namespace(**{**vars(given), "budget": budget})
    found = operations(resolve(group.config) for group in groups(table, at_budget))
    return None if found is None else found / (1e9 * given.rate) / 3600


def count(tables: Iterable[Table], given: argparse.Namespace) -> dict[str, int]:
    """The operations of one image through each network of the tables."""
    wanted: dict[str, tuple[str, Images]] = {}
    for table in tables:
        for budget in BUDGETS:
            at_budget = argparse.Namespace(**{**vars(given), "budget": budget})
            for group in groups(table, at_budget):
                images = images_of(group.config.dataset.name)
                if images is None:
                    continue
                for name in group.names.values():
                    base = graph.architecture(name)[0]
                    wanted[f"{base} {images.pixels} {images.classes}"] = (base, images)
    return {
        key: flops.forward(models.build(name, images.classes, (images.pixels, images.pixels, 3)))
        for key, (name, images) in sorted(wanted.items())
    }


def main() -> None:
    """Writes `operations.json`."""
    from experiments.reproduce.__main__ import arguments
    from experiments.reproduce.catalogue import TABLES

    counted = count(TABLES.values(), arguments(["--list"]))
    paired.write_whole(OPERATIONS, json.dumps(counted, indent=1) + "\n")


if __name__ == "__main__":
    main()
