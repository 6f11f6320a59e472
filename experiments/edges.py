"""Any method along any edge of any graph: one row of networks, a method of its own in each graph.

  python -m experiments.edges --workdir=runs/edges

The largest network has all images of the digits, those below it 10 a class. What two graphs have in
common is trained once, and what has been trained is not trained again. Prints one table; gains are
over the same network trained alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

import distill_jax
from distill_jax import report

NETWORKS = ("resnet20", "resnet14", "resnet8")


class Edges(NamedTuple):
    """A graph, and what travels along its edges: methods and their weights, `ce` among them."""

    guidance: str
    methods: dict[str, float]


SHOWN = (
    Edges("none", {}),
    Edges("direct", {"kd": 1.0}),
    Edges("chain", {"crd": 0.8, "ce": 1.0}),
    Edges("dense", {"at": 50.0, "ce": 1.0}),
    Edges("dense+drop", {"kd": 1.0, "rkd": 1.0}),
    Edges("resnet14<resnet8;resnet8<resnet14", {"dkd": 1.0, "ce": 1.0}),
    Edges("resnet14<resnet20+resnet8;resnet8<resnet20+resnet14", {"dkd": 1.0, "ce": 1.0}),
    Edges("resnet14<resnet20;resnet8<resnet14+resnet8", {"kd": 1.0, "sp": 1000.0}),
)


def config_of(edges: Edges, seeds: int, epochs: int) -> ml_collections.ConfigDict:
    """The config of one graph with its methods."""
    config = distill_jax.default_config()
    config.name = "edges"
    config.networks, config.guidance = NETWORKS, (edges.guidance,)
    config.students, config.seeds = NETWORKS[-1:], tuple(range(seeds))
    config.dataset.valid_fraction = 0.2
    config.recipe.update(epochs=epochs, batch_size=50, train_limit=10, schedule="cosine")
    config.overrides = {NETWORKS[0]: {"train_limit": 0, "epochs": max(1, epochs // 8)}}
    if edges.methods:
        config.methods = edges.methods
    return config


def label(edges: Edges) -> str:
    """The graph and the methods, such as "chain: crd"."""
    methods = [name for name in edges.methods if name != "ce"]
    return ": ".join(filter(None, (edges.guidance, " + ".join(methods))))


def rows_of(edges: Edges, results: distill_jax.Results) -> list[dict[str, Any]]:
    """The rows of a graph's results, named after its methods too."""
    return [{**row, "guidance": label(edges)} for row in results.rows]


def main(argv: Sequence[str]) -> int:
    """Trains what is missing, prints the table and writes it."""
    parser = argparse.ArgumentParser(prog="python -m experiments.edges", allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--epochs", type=int, default=80, help="of the networks with few images")
    parser.add_argument("--workdir", default="runs/edges", help="where all is kept")
    given = parser.parse_args(argv)
    workdir, rows = Path(given.workdir), []
    for number, edges in enumerate(SHOWN):
        config = config_of(edges, given.seeds, given.epochs)
        results = distill_jax.run(config, workdir=workdir / str(number), store=workdir / "store")
        rows += rows_of(edges, results)
    table = report.results_table(rows, "Any method along any edge")
    report.console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
