"""The tables of a file of results, with the targets beside the figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.table import Table

from experiments.benchmark import compared
from experiments.benchmark.cases import Case
from experiments.benchmark.measure import Measured
from experiments.gpu_row.lines import Line
from experiments.gpu_row.steps import PEAK

FASTER = 2.0  # times torch.compile's, at least
ROW, SEVERAL = 120.0, 2.0  # seconds of the row; five seeds to one, at most
ALIKE = 3e-2  # of the first losses of two frameworks in bfloat16


def tables(lines: Sequence[Line]) -> Iterator[Table | str]:
    """All that there is to be said of some lines."""
    smoke = any(line.get("smoke") for line in lines)
    if smoke:
        yield "in miniature: these figures say that the command works, and nothing else"
    for variant in dict.fromkeys(line["variant"] for line in lines):
        own = [line for line in lines if line["variant"] == variant]
        if variant:
            yield f"\nvariant {variant}"
        for part, make in MADE.items():
            if ours := [line for line in own if line["part"] == part and line["name"] != "end"]:
                yield from make([line for line in ours if not _is_lost(line)])
        yield from _rows(own)
        yield from _lost(own)
        yield from _times(own)


def _is_lost(line: Line) -> bool:
    return any(key in line for key in ("failed", "stopped"))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _met(value: float, limit: float, at_least: bool = False) -> str:
    return "met" if (value >= limit if at_least else value <= limit) else "NOT met"


def _versions(lines: Sequence[Line]) -> Iterator[Table | str]:
    left = ("part", "variant", "at", "env", "set", "smoke", "name")
    for line in lines:
        if line["name"] == "machine":
            yield ", ".join(f"{key} {value}" for key, value in line.items() if key not in left)
        elif "missing" in line:
            yield f"one step: {line['missing']}"
        else:
            yield (
                f"one step on {line['device']}: done {line['start_seconds']:.1f} s after the "
                f"start, of which {line['compile_seconds']:.1f} s compiling"
            )


def _steps(lines: Sequence[Line]) -> Iterator[Table | str]:
    named = {line["name"]: line for line in lines}
    peak = named.get(PEAK, {}).get("tflops", 0.0)
    table = _table(
        f"Steps in turns; target: {FASTER:g} times as fast as torch.compile's",
        *("step", "ms", "times\nas fast", "", "TFLOP/s", "of\npeak"),
    )
    missing = []
    for name, line in named.items():
        if "missing" in line:
            missing.append(f"{name}: {line['missing']}")
            continue
        peer, verdict = named.get(line.get("peer", ""), {}), ("", "")
        if "seconds" in peer:
            faster = _ratio(peer, line)
            verdict = f"{faster:.2f}", _met(faster, FASTER, True)
        rate = line["tflops"]
        of_peak = f"{rate / peak:.2f}" if peak and rate and name != PEAK else ""
        shown_rate = f"{rate:.3g}" if rate else ""
        table.add_row(name, f"{line['ms']:.3g}", *verdict, shown_rate, of_peak)
    yield table
    yield from missing
    for name, line in named.items():
        if line.get("losses_differ", 0.0) > ALIKE:
            yield f"{name}: its first losses DIFFER FROM ours, {line['losses_differ']:.0e}"


def _ratio(over: Line, under: Line) -> float:
    """The median of the rounds' own ratios."""
    none = Case("", "", "")
    return compared.ratio(
        Measured(none, seconds=over["seconds"]), Measured(none, seconds=under["seconds"])
    ).median


def _populations(lines: Sequence[Line]) -> Iterator[Table | str]:
    one = next((line for line in lines if line["name"] == "1" and "seconds" in line), None)
    table = _table(
        f"Students at once; target: 5 within {SEVERAL:g} times",
        *("members", "ms", "to one", "", "to separate runs"),
    )
    for line in lines:
        if "missing" in line:
            table.add_row(line["name"], "-", "-", line["missing"], "")
            continue
        row = [line["name"], f"{line['ms']:.3g}"]
        if one:
            ratio = _ratio(line, one)
            verdict = _met(ratio, SEVERAL) if line["name"] == "5" else ""
            row += [f"{ratio:.2f}", verdict, f"{ratio / int(line['name']):.2f}"]
        table.add_row(*row)
    yield table


def _digests(lines: Sequence[Line]) -> Iterator[Table | str]:
    table = _table("Same bytes", "deterministic", "two runs", "", "killed and resumed", "")
    for deterministic in (False, True):
        own = {line["name"]: line for line in lines if line["deterministic"] == deterministic}
        verdicts = []
        # Without the field two runs that compile for themselves are promised nothing.
        for other, promised in (("run 2", deterministic), ("resumed", True)):
            pair = [own[name]["digests"] for name in ("run 1", other) if name in own]
            same = len(pair) == 2 and pair[0] == pair[1]
            verdicts.append("unknown" if len(pair) < 2 else "same" if same else "differ")
            verdicts.append(("met" if same else "NOT met") if promised and len(pair) == 2 else "")
        table.add_row("yes" if deterministic else "no", *verdicts)
    yield table


def _starts(lines: Sequence[Line]) -> Iterator[Table | str]:
    table = _table(
        "Four epochs of the row", *("start", "first step, s", "compilation, s", "all, s")
    )
    for name in ("cold", "warm"):
        own = [line for line in lines if line["name"] == name]
        first = next((f"{x['first_step']:.1f}" for x in own if "first_step" in x), "-")
        done = next((x for x in own if x.get("done")), None)
        compilation = f"{done['parts']['compilation']:.1f}" if done else "-"
        table.add_row(name, first, compilation, f"{done['wall']:.1f}" if done else "-")
    yield table


def _parity(lines: Sequence[Line]) -> Iterator[Table | str]:
    table = _table(
        "Parity; target: every case holds at the highest precision",
        *("precision", "cases", "hold", "", "largest error", "to its bound"),
    )
    for precision in dict.fromkeys(line["precision"] for line in lines):
        own = [line for line in lines if line["precision"] == precision]
        hold = sum(line["verdict"] != "BROKEN" for line in own)
        known = [line for line in own if line["error"] is not None]
        verdict = _met(hold, len(own), True) if precision == "highest" else ""
        error = max((line["error"] for line in known), default=float("nan"))
        bound = max((line["error"] / line["bound"] for line in known), default=float("nan"))
        table.add_row(precision, str(len(own)), str(hold), verdict, f"{error:.1e}", f"{bound:.2g}")
    yield table
    for line in lines:
        if line["verdict"] == "BROKEN" and line["precision"] == "highest":
            yield f"{line['name']}: {line['worst']} BROKEN, {line['error']} of {line['bound']:.1e}"


def _rows(lines: Sequence[Line]) -> Iterator[Table | str]:
    """The whole rows: what they took over all attempts, and where the time of the last went."""
    peak = next((x["tflops"] for x in lines if x["name"] == PEAK and "tflops" in x), 0.0)
    walls = {}
    for part in ("row", "row5"):
        own = [line for line in lines if line["part"] == part and "attempt" in line]
        if not own:
            continue
        attempts: dict[float, float] = {}
        for line in own:
            attempts[line["attempt"]] = line["wall"]
            if line.get("done"):  # who asks again only reads it
                break
        wall, seeds = sum(attempts.values()), own[0]["seeds"]
        done = next((line for line in own if line.get("done")), None)
        named = f"row of {seeds} seeds, {own[0]['dataset']}"
        yield f"\n{named}, {len(attempts)} processes: {wall:.1f} s"
        if any(line.get("resumed") and line["attempt"] == own[0]["attempt"] for line in own):
            yield "  it went on with what processes did whose lines are not here: no target applies"
            continue
        if done is None:
            yield "  not at its end: the same --workdir goes on"
            continue
        walls[seeds] = wall
        if seeds == 1:
            yield f"  target under {ROW:.0f} s: {_met(wall, ROW)}"
        elif 1 in walls:
            ratio = wall / walls[1]
            yield (
                f"  {ratio:.2f} times that of one; target at most {SEVERAL:g}: "
                f"{_met(ratio, SEVERAL)}"
            )
        accuracy = ", ".join(f"{100 * value:.2f}" for value in done["test_accuracy"])
        yield f"  test accuracy of the student, %: {accuracy}"
        if len(attempts) == 1:  # of one that goes on nobody knows what the first did
            flops = sum(done["flops"].values())
            rate = flops / wall / 1e12
            of_peak = f", {rate / peak:.3f} of the matrix peak" if peak else ""
            yield f"  {flops / 1e15:.3g} PFLOP, {rate:.3g} TFLOP/s over all of it{of_peak}"
        table = _table("Where its time went", "part", "s", "of all")
        for part_of_it, seconds in done["parts"].items():
            table.add_row(part_of_it, f"{seconds:.1f}", f"{seconds / done['wall']:.2f}")
        yield table


def _lost(lines: Sequence[Line]) -> Iterator[str]:
    for line in lines:
        if _is_lost(line):
            why = "was stopped at its limit" if "stopped" in line else f"failed: {line['failed']}"
            said = (line.get("tail") or "").splitlines()[-1:]
            options = " ".join(map(str, line.get("options", {}).values()))
            yield f"{line['part']}, {line['name']} {options}: {why} {' '.join(said)}"


def _times(lines: Sequence[Line]) -> Iterator[str]:
    took = [f"{line['part']} {line['seconds']:.0f}" for line in lines if line["name"] == "end"]
    if took:
        yield "seconds of each part: " + ", ".join(took)


MADE: dict[str, Callable[[Sequence[Line]], Iterator[Any]]] = {
    "versions": _versions,
    "steps": _steps,
    "populations": _populations,
    "digests": _digests,
    "row4": _starts,
    "parity": _parity,
}
