"""`distill_jax evaluate`: any weights on any data."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.table import Table

from distill_jax import data, report
from distill_jax.commands.arguments import ArgumentsError, Command, Flag
from distill_jax.commands.train import LOG
from distill_jax.evals import classification
from distill_jax.evals.metrics import combined
from distill_jax.identity import finite
from distill_jax.models import Network, Variables
from distill_jax.runs import config as config_lib
from distill_jax.runs.ambient import pinned
from distill_jax.runs.given import load_given, network_of, stage_folder
from distill_jax.runs.load import dataset_of
from distill_jax.runs.plan import build_network
from distill_jax.train import inference, memory
from distill_jax.train.sharding import Topology
from distill_jax.train.stage import Recipe, Stage

WEIGHTS = Flag(
    "weights",
    "A file of weights, a stage's folder, or RUN:GUIDANCE/NETWORK/SEED, a row of an earlier run.",
)
NETWORK = Flag("network", "The network that they are of; where they are of a run, it is known.")


def evaluate(given: SimpleNamespace) -> int:
    """Prints what a network with given weights is worth on the validation and the test split."""
    if not given.weights:
        raise ArgumentsError(f"evaluate needs --weights. {WEIGHTS.about}")
    folder = stage_folder(given.weights)
    name = given.network or (network_of(folder) if folder else "")
    if not name:
        raise ArgumentsError(f"{given.weights} is a file: expected the --network that it is of")
    run = None if given.config else _run_of(folder, given.weights)
    experiment = config_lib.resolve(given.config or config_lib.load_config(str(run)))
    with pinned(experiment.dtype, experiment.precision):
        dataset = dataset_of(run, experiment) if run else data.load(**experiment.dataset)
        try:
            network = build_network(experiment, dataset, name).backbone
        except ValueError as error:
            raise ArgumentsError(f"--network={name}: {error}") from None
        stage = Stage(network, (), Recipe(), seed=0, file=given.weights)
        variables = load_given(stage, dataset)
        measured = [
            _measured(network, variables, dataset, part, experiment.topology)
            for part in ("valid", "test")
            if len(getattr(dataset, part).labels)
        ]
    if given.log == "json":
        for line in measured:
            about = {"weights": given.weights, "network": name, "dataset": dataset.name}
            print(json.dumps(finite({**about, **line}), allow_nan=False))
    else:
        report.console().print(_table(measured, f"{name} on {dataset.name}"))
    return 0


def _run_of(folder: Path | None, weights: str) -> Path:
    """The folder of the run that a stage's folder is in."""
    run = folder.absolute().parents[1] if folder else None
    if run is None or not (run / config_lib.RECORDED).is_file():
        raise ArgumentsError(f"{weights} is in no run: expected a --config, for the data")
    return run


def _measured(
    network: Network, variables: Variables, dataset: data.Dataset, part: str, topology: Topology
) -> dict[str, Any]:
    split, parts, bins = getattr(dataset, part), [], []
    with memory.told(f"{network.name} on {dataset.name}"):
        for piece in inference.pieces(split, dataset.classes):
            (logits,) = inference.predict_logits([(network, variables)], piece, dataset, topology)
            parts.append(inference.measured(logits[:1], piece, dataset))
            bins.append(classification.reliability(logits[0], piece.labels))
    measured, examples = combined(parts), len(split.labels)
    return {
        "split": {"valid": "validation"}.get(part, part),
        "examples": examples,
        "accuracy": measured["accuracy"],
        "cross_entropy": measured["loss"],
        "ece": classification.error_of(classification.added(bins), examples),
        **{name: measured[name] for name in dataset.metrics},
    }


def _table(measured: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    own = list(measured[0])[5:]
    table.add_column("split")
    for heading in ("examples", "accuracy %", "cross-entropy", "calibration error", *own):
        table.add_column(heading, justify="right")
    for line in measured:
        table.add_row(
            line["split"],
            f"{line['examples']:,}",
            f"{100 * line['accuracy']:.2f}",
            *(f"{line[name]:.4f}" for name in ("cross_entropy", "ece", *own)),
        )
    return table


EVALUATE = Command(
    about="Evaluates weights of any kind on a config's data, a run's on its own.",
    run=evaluate,
    flags=(WEIGHTS, NETWORK, LOG),
    config="optional",
)
