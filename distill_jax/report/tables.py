"""The results of a run, over seeds, as one table."""

from __future__ import annotations

import re
import statistics
from typing import Any

from rich.table import Table

Row = dict[str, Any]
_EXIT = re.compile(r"test_(branch\d+_)?accuracy")  # what is measured of every network


def summarise(rows: list[Row]) -> list[Row]:
    """One row for each guidance and network: mean and standard deviation over seeds.

    The deviation is that of a sample (n - 1), None for one seed. The gain is the mean difference
    from plain training of the same network over the seeds that both have; None without it. An
    evolving network is compared with its backbone trained alone. "failed" counts the seeds that
    could not be trained; a line that has no others has None for numbers. "metrics" are the means
    of the data set's own on the test set, by name.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    lost = [row for row in rows if row.get("failed")]
    for row in (row for row in rows if not row.get("failed")):
        groups.setdefault((row["guidance"], row["network"]), []).append(row)
    summary = []
    for (guidance, network), group in groups.items():
        accuracies = [row["test_accuracy"] for row in group]
        alone = _alone(groups, group[0])
        gains = [r["test_accuracy"] - alone[r["seed"]] for r in group if r["seed"] in alone]
        measured = [name for name in group[0] if name.startswith("test_")]
        branches = [x for x in measured if _EXIT.fullmatch(x) and x != "test_accuracy"]
        own = [name for name in measured if not _EXIT.fullmatch(name)]
        summary.append(
            {
                "guidance": guidance,
                "network": network,
                "teachers": group[0]["teachers"],
                "parameters": group[0]["parameters"],
                "seeds": len(group),
                "accuracy": statistics.fmean(accuracies),
                "deviation": statistics.stdev(accuracies) if len(group) > 1 else None,
                "last_accuracy": statistics.fmean(row["last_test_accuracy"] for row in group),
                "gain": statistics.fmean(gains) if gains else None,
                "branches": [statistics.fmean(row[name] for row in group) for name in branches],
                "metrics": {
                    name.removeprefix("test_"): statistics.fmean(row[name] for row in group)
                    for name in own
                },
            }
        )
    for row in lost:
        key = {name: row[name] for name in ("guidance", "network")}
        if not any(key.items() <= line.items() for line in summary):
            unknown = dict.fromkeys(
                ("parameters", "accuracy", "deviation", "last_accuracy", "gain")
            )
            teachers = {"teachers": row["teachers"], "seeds": 0, "branches": [], "metrics": {}}
            summary.append({**key, **teachers, **unknown})
    return [{**line, "failed": _count_of(line, lost)} for line in summary]


def _count_of(line: Row, rows: list[Row]) -> int:
    """How many rows are of a line's guidance and network."""
    return sum(all(row[name] == line[name] for name in ("guidance", "network")) for row in rows)


def _alone(groups: dict[tuple[str, str], list[Row]], row: Row) -> dict[int, float]:
    """Accuracy by seed of the plain training that a row is compared with.

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
            return {} if itself else {r["seed"]: r["test_accuracy"] for r in reference}
    return {}


def title(rows: list[Row]) -> str:
    """What the table shows, and how its weights were chosen."""
    chosen = {
        "validation": "weights of the best validation epoch, test set scored once",
        "test": "weights of the best TEST epoch, as the papers' codes choose them: biased upwards",
        "last": "weights of the last epoch",
    }[rows[0]["selection"]]
    return f"Top-1 accuracy on the test set, protocol {rows[0]['protocol']}; {chosen}"


def results_table(rows: list[Row], title: str = "") -> Table:
    """The summary as a rich table; accuracies in percent of the test set."""
    summary = summarise(rows)
    table = Table(title=title, title_justify="left")
    for heading in ("guidance", "network", "teachers"):
        table.add_column(heading, no_wrap=heading == "network", min_width=8)
    for heading in ("parameters", "seeds", "test accuracy %", "last epoch %", "gain over none"):
        table.add_column(heading, justify="right", no_wrap=True)
    metrics = list(dict.fromkeys(name for row in summary for name in row["metrics"]))
    for name in metrics:
        table.add_column(f"test {name}", justify="right")
    if any(row["branches"] for row in summary):
        table.add_column("branches %", justify="right")
    for row in summary:
        table.add_row(
            row["guidance"],
            row["network"],
            " ".join(row["teachers"]) or "-",
            *_numbers(row),
            "" if row["gain"] is None else f"{100 * row['gain']:+.2f}",
            *(f"{row['metrics'][name]:.4g}" if name in row["metrics"] else "" for name in metrics),
            *([" ".join(f"{100 * x:.2f}" for x in row["branches"])] if row["branches"] else []),
        )
    return table


def _numbers(row: Row) -> tuple[str, str, str, str]:
    """Parameters, seeds and accuracies of a line; "failed" where no seed was trained to the end."""
    failed = f" ({row['failed']} failed)" if row["failed"] else ""
    if not row["seeds"]:
        return "", f"0{failed}", "failed", ""
    spread = "" if row["deviation"] is None else f" ± {100 * row['deviation']:.2f}"
    return (
        f"{row['parameters']:,}",
        f"{row['seeds']}{failed}",
        f"{100 * row['accuracy']:.2f}{spread}",
        f"{100 * row['last_accuracy']:.2f}",
    )
