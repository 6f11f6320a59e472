"""The results of a curriculum, over seeds, as one table."""

from __future__ import annotations

import statistics
from typing import Any

from rich.table import Table

Row = dict[str, Any]


def summarise(rows: list[Row]) -> list[Row]:
    """One row for each guidance and network: mean and standard deviation over seeds.

    The deviation is that of a sample (n - 1), None for one seed. The gain is the mean difference
    from "none" for the same network over the seeds that both have; None without it.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["guidance"], row["network"]), []).append(row)
    summary = []
    for (guidance, network), group in groups.items():
        accuracies = [row["test_accuracy"] for row in group]
        alone = {row["seed"]: row["test_accuracy"] for row in groups.get(("none", network), [])}
        gains = [r["test_accuracy"] - alone[r["seed"]] for r in group if r["seed"] in alone]
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
                "gain": statistics.fmean(gains) if gains and guidance != "none" else None,
            }
        )
    return summary


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
    table = Table(title=title, title_justify="left")
    for heading in ("guidance", "network", "teachers"):
        table.add_column(heading, no_wrap=heading == "network", min_width=8)
    for heading in ("parameters", "seeds", "test accuracy %", "last epoch %", "gain over none"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in summarise(rows):
        spread = "" if row["deviation"] is None else f" ± {100 * row['deviation']:.2f}"
        table.add_row(
            row["guidance"],
            row["network"],
            " ".join(row["teachers"]) or "-",
            f"{row['parameters']:,}",
            str(row["seeds"]),
            f"{100 * row['accuracy']:.2f}{spread}",
            f"{100 * row['last_accuracy']:.2f}",
            "" if row["gain"] is None else f"{100 * row['gain']:+.2f}",
        )
    return table
