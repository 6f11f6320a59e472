"""The summary of results over seeds, and the table of it at several widths."""

import io
import itertools

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from distill_jax import report


def row(guidance, network, seed, accuracy, **others):
    """A row of results; a guidance such as "dense, temperature=2" is a swept one."""
    graph, *parts = guidance.split(", ")
    changes = dict(part.split("=") for part in parts if "=" in part)
    return {
        "guidance": guidance,
        "graph": graph,
        "changes": changes,
        "control": len(changes) < len(parts),
        "network": network,
        "backbone": network.removeprefix("evolving:"),
        "teachers": [],
        "seed": seed,
        "parameters": 12345,
        "test_accuracy": accuracy,
        "last_test_accuracy": accuracy - 0.01,
        "selection": "validation",
        "protocol": "standard",
        **others,
    }


def summary_of(rows):
    return {(s["guidance"], s["network"]): s for s in report.summarise(rows)}


def cells(table):
    """{(guidance, network): {name of a column: text}} of a table that has all the room."""
    columns = {column.name: column.cells for column in table.columns(10**6)}
    lines = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    return {(line["guidance"], line["network"]): line for line in lines}


def test_mean_sample_deviation_and_last_epoch_over_seeds():
    values = [0.70, 0.74, 0.69]
    found = summary_of([row("none", "plane2", s, v) for s, v in enumerate(values)])
    one = found["none", "plane2"]
    assert one["seeds"] == 3 and one["parameters"] == 12345 and one["branches"] == []
    assert one["accuracy"] == pytest.approx(np.mean(values))
    assert one["deviation"] == pytest.approx(np.std(values, ddof=1))
    assert one["last_accuracy"] == pytest.approx(np.mean(values) - 0.01)
    assert one["gain"] is None
    assert summary_of([row("none", "plane2", 0, 0.5)])["none", "plane2"]["deviation"] is None


def test_gains_are_of_the_same_network_over_the_seeds_that_both_have():
    rows = [
        row("none", "plane2", 0, 0.60),
        row("none", "plane2", 1, 0.70),
        row("none", "plane2", 2, 0.10),
        row("none", "plane4", 0, 0.99),
        row("dense", "plane2", 0, 0.66, teachers=["plane6", "plane4"]),
        row("dense", "plane2", 1, 0.72, teachers=["plane6", "plane4"]),
        row("dense", "plane2", 3, 0.99, teachers=["plane6", "plane4"]),
        row("chain", "plane6", 0, 0.9),
        row("none, low", "plane2", 0, 0.55),
    ]
    for order in (rows, rows[::-1]):
        found = summary_of(order)
        assert found["dense", "plane2"]["gain"] == pytest.approx((0.06 + 0.02) / 2)
        assert found["dense", "plane2"]["teachers"] == ["plane6", "plane4"]
        assert found["none, low", "plane2"]["gain"] == pytest.approx(-0.05)
        for alone in (("none", "plane2"), ("none", "plane4"), ("chain", "plane6")):
            assert found[alone]["gain"] is None


def test_an_evolving_network_is_compared_with_its_backbone():
    branch = {"test_branch1_accuracy": 0.5, "test_branch2_accuracy": 0.3}
    evolved = row("none", "evolving:plane4", 0, 0.80, **branch)
    backbone, taught = row("none", "plane4", 0, 0.75), row("direct", "evolving:plane4", 0, 0.83)
    both = summary_of([evolved, backbone, taught])
    assert both["none", "evolving:plane4"]["gain"] == pytest.approx(0.05)
    assert both["direct", "evolving:plane4"]["gain"] == pytest.approx(0.08)
    assert both["none", "plane4"]["gain"] is None
    # Without the backbone: from the evolving network that nobody taught.
    alone = summary_of([evolved, taught])
    assert alone["none", "evolving:plane4"]["gain"] is None
    assert alone["direct", "evolving:plane4"]["gain"] == pytest.approx(0.03)


def test_branches_are_means_over_seeds_deepest_first():
    rows = [
        row("none", "evolving:plane5", seed, 0.8)
        | {"test_branch1_accuracy": 0.5 + seed / 10, "test_branch2_accuracy": 0.3}
        for seed in (0, 1)
    ]
    found = summary_of(rows)["none", "evolving:plane5"]
    assert found["branches"] == pytest.approx([0.55, 0.3])


def test_the_table_shows_percent_with_spread_gain_and_a_dash_for_no_teacher():
    rows = [row("none", "plane2", s, v) for s, v in enumerate((0.5, 0.54))]
    rows += [row("dense", "plane2", s, 0.5, teachers=["plane6", "plane4"]) for s in (0, 1)]
    table = report.results_table(rows, "title")
    found = cells(table)
    assert found["none", "plane2"] == {
        "guidance": "none",
        "network": "plane2",
        "teachers": "-",
        "parameters": "12,345",
        "seeds": "2",
        "accuracy": f"52.00 ± {100 * np.std((0.5, 0.54), ddof=1):.2f}",
        "last epoch": "51.00",
        "gain": "",
    }
    assert found["dense", "plane2"]["teachers"] == "plane6 plane4"
    assert found["dense", "plane2"]["accuracy"] == "50.00 ± 0.00"
    assert found["dense", "plane2"]["gain"] == "-2.00 ± 25.41"
    assert table.title == "title"


def test_the_table_has_a_column_of_branches_where_there_are_any():
    plain = row("none", "plane4", 0, 0.75)
    evolved = row("none", "evolving:plane4", 0, 0.8, test_branch1_accuracy=0.5)
    headings = [column.name for column in report.results_table([plain]).columns(140)]
    assert "branches" not in headings
    for rows in itertools.permutations([plain, evolved]):
        found = cells(report.results_table(list(rows)))
        assert found["none", "evolving:plane4"]["branches"] == "50.00"
        assert found["none", "evolving:plane4"]["gain"] == "+5.00"
        assert found["none", "plane4"]["branches"] == ""
    console = Console(width=140, file=io.StringIO())
    console.print(report.results_table([plain, evolved]))
    assert "evolving:plane4" in console.file.getvalue()


def test_the_table_has_a_column_of_each_metric_that_the_data_set_brings():
    rows = [
        row("none", "plane4", s, 0.7, test_balanced_accuracy=0.25 + s / 2, test_f1=2.0)
        for s in (0, 1)
    ]
    rows.append(row("none", "plane2", 0, 0.7, test_f1=3.0))
    found = cells(report.results_table(rows))
    assert found["none", "plane4"]["test balanced_accuracy"] == "0.5"
    assert [found["none", f"plane{n}"]["test f1"] for n in (4, 2)] == ["2", "3"]
    assert found["none", "plane2"]["test balanced_accuracy"] == ""
    assert "branches" not in found["none", "plane4"]


@pytest.mark.parametrize(
    ("selection", "words"),
    [("validation", "scored once"), ("test", "biased upwards"), ("last", "last epoch")],
)
def test_the_title_says_how_weights_were_chosen(selection, words):
    title = report.title([row("none", "plane2", 0, 0.5, selection=selection, protocol="paper")])
    assert words in title and "protocol paper" in title


# ---------------------------------------------------------------------------- intervals and sweeps
def test_a_gain_has_its_paired_interval_by_students_t():
    plain, taught = (0.70, 0.74, 0.69, 0.71), (0.73, 0.75, 0.70, 0.76)
    rows = [row("none", "plane2", s, v) for s, v in enumerate(plain)]
    rows += [row("dense", "plane2", s, v) for s, v in enumerate(taught)]
    rows += [row("chain", "plane2", s, v) for s, v in enumerate((0.75, 0.71))]
    found = summary_of(rows)
    # Differences 3, 1, 1, 5: mean 2.5, deviation sqrt(11/3); t(0.975; 3) = 3.182446305284263.
    dense = found["dense", "plane2"]
    assert dense["gain"] == pytest.approx(0.025, abs=1e-12) and dense["gain_seeds"] == 4
    assert dense["gain_interval"] == pytest.approx(
        3.182446305284263 * np.sqrt(11 / 3) / 2 / 100, rel=1e-9
    )
    # Differences 5, -3: mean 1, deviation sqrt(32); t(0.975; 1) = 12.706204736432095.
    assert found["chain", "plane2"]["gain_interval"] == pytest.approx(
        12.706204736432095 * 4 / 100, rel=1e-9
    )
    table = report.results_table(rows)
    assert cells(table)["dense", "plane2"]["gain"] == "+2.50 ± 3.05 (n=4)"
    assert "over n seeds" in table.notes(140)[0]
    assert "over 4 seeds" in report.results_table(rows[:8]).notes(140)[0]


def test_one_seed_has_no_interval_and_the_table_says_so():
    rows = [row("none", "plane2", 0, 0.5), row("dense", "plane2", 0, 0.52)]
    assert summary_of(rows)["dense", "plane2"]["gain_interval"] is None
    table = report.results_table(rows)
    assert cells(table)["dense", "plane2"]["gain"] == "+2.00"
    assert table.notes(140) == ["gain: one seed has no interval"]


def swept(*lines, **others):
    """Rows of a sweep of temperature, (guidance, value, validation, test) each."""
    return [
        row(f"{guidance}, temperature={value}", "plane2", 0, test, valid_accuracy=valid, **others)
        for guidance, value, valid, test in lines
    ]


def test_the_best_of_each_sweep_is_marked_by_validation_and_not_by_test():
    rows = [row("none", "plane2", 0, 0.4, valid_accuracy=0.99)]
    rows += swept(("chain", 1, 0.60, 0.90), ("chain", 4, 0.70, 0.80), ("dense", 1, 0.65, 0.7))
    best = {key[0]: line["best"] for key, line in summary_of(rows).items()}
    assert best == {
        "none": False,
        "chain, temperature=1": False,
        "chain, temperature=4": True,
        "dense, temperature=1": True,
    }
    table = report.results_table(rows)
    found = {key[0]: line["validation"].strip() for key, line in cells(table).items()}
    assert found["chain, temperature=4"] == "70.00*" and found["chain, temperature=1"] == "60.00"
    assert any("best of its sweep by validation" in line for line in table.notes(80))
    assert "*" not in printed(report.results_table(rows[:1]))


def test_a_line_that_lost_seeds_or_has_no_validation_is_not_the_best():
    rows = swept(("chain", 1, 0.9, 0.9), ("chain", 4, 0.7, 0.8))
    rows.append({**rows[0], "seed": 1, "failed": "step 3 is not finite"})
    assert summary_of(rows)["chain, temperature=4", "plane2"]["best"]
    unknown = report.results_table(swept(("chain", 1, None, 0.9), ("chain", 4, None, 0.8)))
    assert "*" not in printed(unknown) and "validation" not in cells(unknown)


# ------------------------------------------------------------------------------ where it is shown
LONG = "plane4<plane10;plane2<plane10+plane4, kd_weight=0.9"


def printed(table, width=140):
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def wide_rows():
    labels = ("none", "direct", LONG, LONG.replace("0.9", "0.5"), "none, full data")
    teachers = ["plane10", "plane8", "plane6", "plane4"]
    return [
        row(label, "evolving:plane2", s, 0.7 + s / 30, teachers=teachers, valid_accuracy=0.5)
        for label in labels
        for s in (0, 1)
    ]


@pytest.mark.parametrize("width", [30, 64, 80, 100, 140, 300])
def test_at_any_width_nothing_that_matters_is_cut(width):
    text = printed(report.results_table(wide_rows(), "title"), width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    squeezed = "".join(text.split()).replace("│", "")
    for wanted in ("none,fulldata", "direct", "evolving:plane2", "71.67±2.36", "+0.00±0.00"):
        assert wanted in squeezed
    if width >= 80:
        # A label stands below itself, wrapped where its parts are joined.
        first = [line.split("│")[1].strip() for line in text.splitlines() if line[0] == "│"]
        assert "".join(LONG.split()) in "".join("".join(first).split())
        assert not any(0 < len(part) < 4 for part in first)


@pytest.mark.parametrize("width", [45, 64, 80, 100])
def test_labels_of_wide_characters_push_no_number_out(width):
    """Those of East Asia take two places each."""
    label = "none, 学生のラベルをすべて使う"
    rows = [row("none", "plane2", s, 0.5) for s in (0, 1)]
    rows += [row(label, "plane2", s, 0.7 + s / 30) for s in (0, 1)]
    text = printed(report.results_table(rows), width)
    assert max(map(cell_len, text.splitlines())) <= width and "…" not in text
    squeezed = "".join(text.split())
    assert "71.67±2.36" in squeezed and "+21.67±21.18" in squeezed
    names = [line.split("│")[1].strip() for line in text.splitlines() if "│" in line]
    assert "".join(label.split()) in "".join("".join(names or text).split())


def test_the_least_useful_columns_go_first_and_are_named():
    table = report.results_table(wide_rows())
    names = {width: [column.name for column in table.columns(width)] for width in (80, 130, 160)}
    assert names[80] == ["guidance", "network", "validation", "accuracy", "gain"]
    assert "seeds" in names[130] and "parameters" not in names[130]
    assert len(names[160]) == 9
    (left,) = [line for line in table.notes(80) if "results.json" in line]
    assert left.endswith("teachers, parameters, seeds, last epoch")
    assert not any("results.json" in line for line in table.notes(160))
    lost = report.results_table([*wide_rows(), {**wide_rows()[0], "seed": 9, "failed": "why"}])
    kept = [column.name for column in lost.columns(110)]
    assert "seeds" in kept and "teachers" not in kept  # as it tells of failures
    assert "1 more could not be trained to the end" in lost.notes(80)
    assert not any("trained" in line for line in lost.notes(110))


def test_a_notebook_shows_a_table():
    bundle = report.results_table(wide_rows(), "title")._repr_mimebundle_([], [])
    assert "full data" in bundle["text/html"] and "full data" in bundle["text/plain"]


@pytest.mark.parametrize(("columns", "width"), [("93", 93), ("", 140), ("no", 140), ("0", 140)])
def test_what_is_no_terminal_is_as_wide_as_columns_says(monkeypatch, columns, width):
    monkeypatch.setenv("COLUMNS", columns)
    assert report.console().width == width


def test_seeds_under_which_one_network_stands_are_one():
    """An override has fixed its seed, or its weights are given."""
    rows = [row("none", "plane4", s, 0.9, stage="a") for s in range(3)]
    rows += [row("direct", "plane4", s, 0.9, stage="a") for s in range(3)]
    rows += [row("none", "plane2", s, 0.5, stage="b") for s in range(3)]
    taught = [0.6, 0.7, 0.65]
    rows += [row("direct", "plane2", s, x, stage=f"c{s}") for s, x in enumerate(taught)]
    found = summary_of(rows)
    for guidance, network in (("none", "plane4"), ("direct", "plane4"), ("none", "plane2")):
        line = found[guidance, network]
        assert (line["seeds"], line["deviation"], line["gain_interval"]) == (1, None, None)
    assert found["direct", "plane4"]["gain"] == 0.0
    assert found["direct", "plane2"]["gain"] == pytest.approx(0.15)
    assert found["direct", "plane2"]["seeds"] == found["direct", "plane2"]["gain_seeds"] == 3
    lost = [row("none", "plane4", s, 0.0, stage="a", failed="why") for s in range(3)]
    assert summary_of(lost)["none", "plane4"]["failed"] == 1
