"""The results of a run over seeds: means, spreads, gains and what is best of a sweep."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]
CONFIDENCE = 0.95  # of the gains' intervals
_EXIT = re.compile(r"test_(branch\d+_)?accuracy")  # what is measured of every network


def summarise(rows: list[Row]) -> list[Row]:
    """One row for each guidance and network: mean and standard deviation over seeds.

    The deviation is that of a sample (n - 1), None for one seed. The gain is the mean difference
    from plain training of the same network over the "gain_seeds" seeds that both have; None without
    it. "gain_interval" is half the width of its 95 % interval, by Student's t with n - 1 degrees of
    freedom; None of one seed. One with branches is compared with its backbone trained alone.
    Seeds under which one and the same network stands, as where an override fixes its seed, or where
    its weights are given, are one.
    "failed" counts the seeds that could not be trained; a line that has no others has None for
    numbers. "metrics" are the means of the data set's own on the test set, by name. Of the lines
    that a sweep made of one guidance, "best" marks that of the highest validation accuracy.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["guidance"], row["network"]), []).append(row)
    trained = {
        key: own for key, group in groups.items() if (own := [r for r in group if not _failed(r)])
    }
    lost = [key for key in groups if key not in trained]
    lines = {key: _line(group, _alone(trained, group[0])) for key, group in trained.items()}
    lines |= {key: _nothing(groups[key][0]) for key in lost}
    for key, line in lines.items():
        line["failed"] = len(trainings(list(filter(_failed, groups[key]))))
    best = _best_of_sweeps({key: (groups[key][0], line) for key, line in lines.items()})
    return [{**line, "best": key in best} for key, line in lines.items()]


def metrics_of(measured: Mapping[str, Any]) -> list[str]:
    """The names of a data set's own metrics in what was measured of a network on the test set."""
    own = (x for x in measured if x.startswith("test_") and not _EXIT.fullmatch(x))
    return [name.removeprefix("test_") for name in own]


def _failed(row: Row) -> bool:
    return bool(row.get("failed"))


def trainings(rows: list[Row]) -> list[Row]:
    """The rows, of those of one guidance, network and training the first."""
    found: dict[Any, Row] = {}
    for row in rows:
        found.setdefault((row["guidance"], row["network"], _training(row)), row)
    return list(found.values())


def _training(row: Row) -> Any:
    """What tells the training of a row from that of others."""
    return row.get("stage") or row["seed"]


def _line(group: list[Row], alone: dict[int, Row]) -> Row:
    """The summary of the rows of one guidance and network, given the rows without it by seed."""
    both = [row for row in group if row["seed"] in alone]
    pairs = {(_training(row), _training(alone[row["seed"]])): row for row in both}
    gains = [r["test_accuracy"] - alone[r["seed"]]["test_accuracy"] for r in pairs.values()]
    group = trainings(group)
    accuracies = [row["test_accuracy"] for row in group]
    validated = [row["valid_accuracy"] for row in group if row.get("valid_accuracy") is not None]
    branches = [x for x in group[0] if _EXIT.fullmatch(x) and x != "test_accuracy"]

    def mean(name):
        # Null is what is not finite, as JSON has it.
        return statistics.fmean(math.nan if row[name] is None else row[name] for row in group)

    return {
        "guidance": group[0]["guidance"],
        "network": group[0]["network"],
        "teachers": group[0]["teachers"],
        "parameters": group[0]["parameters"],
        "seeds": len(group),
        "accuracy": statistics.fmean(accuracies),
        "deviation": statistics.stdev(accuracies) if len(group) > 1 else None,
        "last_accuracy": mean("last_test_accuracy"),
        "valid_accuracy": statistics.fmean(validated) if len(validated) == len(group) else None,
        "gain": statistics.fmean(gains) if gains else None,
        "gain_interval": half_width(gains),
        "gain_seeds": len(gains),
        "branches": [mean(name) for name in branches],
        "metrics": {name: mean(f"test_{name}") for name in metrics_of(group[0])},
    }


def _nothing(row: Row) -> Row:
    """The summary of a guidance and network of which no seed could be trained."""
    about = {name: row[name] for name in ("guidance", "network", "teachers")}
    numbers = ("parameters", "accuracy", "deviation", "last_accuracy", "valid_accuracy")
    unknown = dict.fromkeys((*numbers, "gain", "gain_interval"))
    return {**about, **unknown, "seeds": 0, "gain_seeds": 0, "branches": [], "metrics": {}}


def half_width(differences: list[float]) -> float | None:
    """Half of the interval of their mean, by Student's t; None of fewer than two."""
    n = len(differences)
    if n < 2:
        return None
    from scipy import special  # at the end of a run, as it is long to import

    quantile = float(special.stdtrit(n - 1, (1 + CONFIDENCE) / 2))
    return quantile * statistics.stdev(differences) / math.sqrt(n)


def _best_of_sweeps(lines: dict[tuple[str, str], tuple[Row, Row]]) -> set[tuple[str, str]]:
    """The keys of the lines that are the best of their sweep, by validation alone.

    A sweep is the lines of one network under one guidance and different values of the same fields.
    A line that lost seeds is not compared with others.
    """
    sweeps: dict[Any, list[tuple[str, str]]] = {}
    for key, (row, line) in lines.items():
        whole = line["valid_accuracy"] is not None and not line["failed"]
        if row["changes"] and not row["control"]:
            sweep = sweeps.setdefault((row["graph"], row["network"], *row["changes"]), [])
            sweep += [key] if whole else []
    return {
        max(keys, key=lambda key: lines[key][1]["valid_accuracy"])
        for keys in sweeps.values()
        if keys
    }


def _alone(groups: dict[tuple[str, str], list[Row]], row: Row) -> dict[int, Row]:
    """The rows by seed of the plain training that a row is compared with.

    That is training without teachers under the same swept values, of which some concern only the
    taught: of several the one that has most of them in common.
    """
    swept = {} if row["control"] else row["changes"]
    plain = [
        group
        for group in groups.values()
        if group[0]["graph"] == "none"
        and not group[0]["control"]
        and group[0]["changes"].items() <= swept.items()
    ]
    for network in (row["backbone"], row["network"]):
        same = [group for group in plain if group[0]["network"] == network]
        if same:
            reference = max(same, key=lambda group: len(group[0]["changes"]))
            itself = reference[0]["guidance"] == row["guidance"] and network == row["network"]
            return {} if itself else {r["seed"]: r for r in reference}
    return {}
