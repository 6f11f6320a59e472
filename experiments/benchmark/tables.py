"""The benchmark's tables and its JSON."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from experiments.benchmark import compared
from experiments.benchmark.compared import PEAK, Ratio, Verdict
from experiments.benchmark.measure import Measured

TOLERANCE = 1e-4  # of the losses of two frameworks


def shown(value: Ratio) -> str:
    """A ratio with its quartiles."""
    return f"{value.median:.2f} ({value.low:.2f}-{value.high:.2f})"


def numbers(found: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """The rows as plain values: medians, rates, ratios to the first row."""
    flops, first = compared.operations(found), next(iter(found.values()))
    peak = _rate(found[PEAK], flops[PEAK]) if PEAK in found and not found[PEAK].missing else 0.0
    rows = []
    for name, measured in found.items():
        row: dict[str, Any] = {"name": name, "case": dataclasses.asdict(measured.case)}
        if measured.missing:
            rows.append({**row, "missing": measured.missing})
            continue
        seconds, rate = statistics.median(measured.seconds), _rate(measured, flops[name])
        row |= {
            "seconds": seconds,
            "rounds": measured.seconds,
            "images_per_second": measured.case.batch * measured.case.members / seconds,
            "flops": flops[name],
            "flops_per_second": rate,
            "peak_fraction": rate / peak if peak else 0.0,
            "start_seconds": measured.start_seconds,
            "compile_seconds": measured.compile_seconds,
            "process_bytes": measured.process_bytes,
            "step_bytes": measured.step_bytes,
            "losses": measured.losses,
            "device": measured.device,
        }
        if name != PEAK and not first.missing:
            row["ratio"] = compared.ratio(measured, first)._asdict()
        rows.append(row)
    return rows


def _rate(measured: Measured, flops: float) -> float:
    return flops / statistics.median(measured.seconds)


def steps_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Time, rates, memory and start of every row."""
    table = Table(title=title, title_justify="left")
    table.add_column("step", no_wrap=True)
    for heading in (
        "ms",
        f"/ {rows[0]['name']} (quartiles)",
        "images/s",
        "GFLOP/s",
        "of peak",
        "MB",
        "start",
        "compile",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if "missing" in row:
            table.add_row(row["name"], "-", row["missing"])
            continue
        network = row["name"] != PEAK
        table.add_row(
            row["name"],
            f"{1e3 * row['seconds']:.1f}",
            shown(Ratio(**row["ratio"])) if "ratio" in row else "",
            f"{row['images_per_second']:,.0f}" if network else "",
            f"{row['flops_per_second'] / 1e9:,.0f}" if row["flops"] else "",
            f"{row['peak_fraction']:.2f}" if row["flops"] and row["peak_fraction"] else "",
            f"{row['step_bytes'] / 1e6:,.0f}" if network else "",
            f"{row['start_seconds']:.1f}",
            f"{row['compile_seconds']:.1f}",
        )
    return table


def targets_table(verdicts: Sequence[Verdict], applies: bool) -> Table:
    """The targets, their ratios, and whether they are met; said of nothing but two CPU cores."""
    table = Table(title="Ratios, and the targets on two CPU cores", title_justify="left")
    for heading in ("target", "measured", "of", "to", ""):
        table.add_column(heading, no_wrap=heading == "measured")
    words = {True: "met", False: "NOT met", None: ""}
    for verdict in verdicts:
        counts = applies or verdict.met is None
        word = words[verdict.met] if counts else "does not apply here"
        table.add_row(verdict.target.what, shown(verdict.ratio), verdict.over, verdict.under, word)
    return table


def fidelity_lines(differences: Mapping[str, float], tolerance: float = TOLERANCE) -> list[str]:
    """What the first losses say: the same step is compared, or it is not."""
    return [
        f"{name}: the first losses {'agree with' if worst <= tolerance else 'DIFFER FROM'} ours, "
        f"{worst:.0e}"
        for name, worst in differences.items()
    ]
