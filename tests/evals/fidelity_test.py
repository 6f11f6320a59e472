"""Fidelity by hand and against NumPy in float64, and the table over seeds."""

import io
import itertools
import math

import numpy as np
import pytest
from rich.console import Console

from distill_jax import report
from distill_jax.evals import classification

RANDOM = np.random.RandomState(0)
OWN = (3 * RANDOM.standard_normal((50, 6))).astype(np.float32)
THEIRS = (4 * RANDOM.standard_normal((50, 6))).astype(np.float32)
LABELS = RANDOM.randint(0, 6, 50)


def confident(*probabilities):
    """Logits (N, 2) whose first class has these probabilities."""
    p = np.asarray(probabilities, np.float64)
    with np.errstate(divide="ignore"):
        return np.log(np.stack([p, 1 - p], -1))


# ------------------------------------------------------------------------- accuracy and agreement
def test_accuracy_by_hand():
    logits = np.array([[2.0, 1.0, 0.0], [0.0, -1.0, 3.0], [1.0, 5.0, 4.0], [0.0, 7.0, 1.0]])
    assert classification.accuracy(logits, np.array([0, 2, 2, 0])) == 0.5
    assert classification.accuracy(logits, np.array([0, 2, 1, 1])) == 1.0
    assert classification.accuracy(logits, np.array([1, 1, 2, 0])) == 0.0


def test_agreement_by_hand_is_about_classes_and_not_about_labels():
    logits = np.array([[2.0, 1.0, 0.0], [0.0, -1.0, 3.0], [1.0, 5.0, 4.0], [0.0, 7.0, 1.0]])
    others = np.array([[9.0, 8.0, 7.0], [0.0, 9.0, 3.0], [-5.0, -3.0, -4.0], [1.0, 0.0, 0.5]])
    assert (
        classification.agreement(logits, others) == classification.agreement(others, logits) == 0.5
    )
    assert classification.agreement(logits, 0.1 * logits - 5) == 1.0


# ------------------------------------------------------------------------------------------ the KL
def test_kl_equals_float64_and_goes_from_teacher_to_student():
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in map(np.float64, (THEIRS, OWN)))
    expected = np.mean(np.sum(p * np.log(p / q), -1))
    assert classification.kl(THEIRS, OWN) == pytest.approx(expected, rel=1e-12)
    assert abs(classification.kl(OWN, THEIRS) - expected) > 0.1


def test_kl_by_hand():
    half, quarter = confident(0.5), confident(0.25)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert classification.kl(half, quarter) == pytest.approx(expected, rel=1e-12)
    assert classification.kl(np.concatenate([half, half]), np.concatenate([quarter, half])) == (
        pytest.approx(expected / 2, rel=1e-12)  # the mean over examples
    )
    assert classification.kl(OWN, OWN + 7) == pytest.approx(0, abs=1e-6)


def test_kl_of_far_logits_is_finite_and_a_class_ruled_out_adds_nothing():
    teacher = np.array([[1e5, 0.0, -1e5]], np.float32)
    assert classification.kl(teacher, np.zeros((1, 3), np.float32)) == pytest.approx(math.log(3))
    assert classification.kl(np.zeros((1, 3)), teacher) == pytest.approx(
        1e5 - math.log(3), rel=1e-6
    )
    largest = np.finfo(np.float32).max
    extreme = np.array([[largest, -largest]], np.float32)
    assert classification.kl(extreme, -extreme) == pytest.approx(2.0 * float(largest))


# ------------------------------------------------------------------------------------- calibration
def ece_by_loop(logits, labels):
    """Guo et al.'s formula, bin by bin, on (a, b]."""
    shifted = np.float64(logits) - np.float64(logits).max(-1, keepdims=True)
    probabilities = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    total = 0.0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            total += inside.mean() * gap
    return total


@pytest.mark.parametrize("scale", [0.1, 0.5, 1.0, 3.0])
def test_calibration_error_equals_the_formula_bin_by_bin(scale):
    found = classification.expected_calibration_error(scale * OWN, LABELS)
    assert found == pytest.approx(ece_by_loop(scale * OWN, LABELS), rel=1e-12)
    assert 0.01 < found < 1


def test_calibration_error_by_hand():
    # Bins of 1/15: .95 and .97 share the last one; .62 is alone, and so is .55.
    logits = confident(0.95, 0.97, 0.62, 0.55)
    by_bin = abs(1 - 1.92) + abs(1 - 0.62) + abs(0 - 0.55)
    found = classification.expected_calibration_error(logits, np.array([0, 1, 0, 1]))
    assert found == pytest.approx(by_bin / 4, rel=1e-12)


def test_gaps_of_one_bin_cancel_and_gaps_of_two_do_not():
    shared = classification.expected_calibration_error(confident(0.74, 0.74), np.array([0, 1]))
    assert shared == pytest.approx(0.24)
    apart = classification.expected_calibration_error(confident(0.74, 0.65), np.array([0, 1]))
    assert apart == pytest.approx((0.26 + 0.65) / 2)


def test_certainty_is_in_the_last_bin_and_an_edge_in_the_one_below():
    sure = np.array([[1e4, 0.0], [1e4, 0.0], [3.0, 0.0]])
    assert classification.expected_calibration_error(sure, np.array([0, 0, 0])) == pytest.approx(
        (1 - 1 / (1 + math.exp(-3))) / 3
    )
    assert classification.expected_calibration_error(sure[:2], np.array([1, 1])) == 1.0
    # Even logits of three classes: a confidence of 5/15, whose bin is (4/15, 5/15].
    even, above = np.zeros((1, 3)), np.log([[0.34, 0.33, 0.33]])
    below = np.log([[0.3, 0.3, 0.2, 0.2]])
    even4 = np.concatenate([even, [[-1e9]]], -1)
    above4 = np.concatenate([above, [[-1e9]]], -1)
    both = classification.expected_calibration_error
    right, wrong = 0, 1  # the first of equal logits counts
    together = both(np.concatenate([even4, below]), np.array([right, wrong]))
    assert together == pytest.approx(abs(2 / 3 - 0.3) / 2)
    apart = both(np.concatenate([even4, above4]), np.array([right, wrong]))
    assert apart == pytest.approx((2 / 3 + 0.34) / 2)


# ---------------------------------------------------------------------------------------- the table
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
    """{(guidance, network): {heading: text}} of a rich table."""
    columns = {column.header: list(column.cells) for column in table.columns}
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
        "test accuracy %": f"52.00 ± {100 * np.std((0.5, 0.54), ddof=1):.2f}",
        "last epoch %": "51.00",
        "gain over none": "",
    }
    assert found["dense", "plane2"]["teachers"] == "plane6 plane4"
    assert found["dense", "plane2"]["test accuracy %"] == "50.00 ± 0.00"
    assert found["dense", "plane2"]["gain over none"] == "-2.00"
    assert table.title == "title"


def test_the_table_has_a_column_of_branches_where_there_are_any():
    plain = row("none", "plane4", 0, 0.75)
    evolved = row("none", "evolving:plane4", 0, 0.8, test_branch1_accuracy=0.5)
    headings = [column.header for column in report.results_table([plain]).columns]
    assert "branches %" not in headings
    for rows in itertools.permutations([plain, evolved]):
        found = cells(report.results_table(list(rows)))
        assert found["none", "evolving:plane4"]["branches %"] == "50.00"
        assert found["none", "evolving:plane4"]["gain over none"] == "+5.00"
        assert found["none", "plane4"]["branches %"] == ""
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
    assert "branches %" not in found["none", "plane4"]


@pytest.mark.parametrize(
    ("selection", "words"),
    [("validation", "scored once"), ("test", "biased upwards"), ("last", "last epoch")],
)
def test_the_title_says_how_weights_were_chosen(selection, words):
    title = report.title([row("none", "plane2", 0, 0.5, selection=selection, protocol="paper")])
    assert words in title and "protocol paper" in title
