"""The papers' tables as commands: figures, configs, verdicts by hand, one that goes on."""

import json
import re

import pytest

from distill_jax import resolve
from distill_jax.models import build
from experiments import pages
from experiments.benchmark import flops
from experiments.reproduce import __main__ as command
from experiments.reproduce import budgets, cost, page, verdict
from experiments.reproduce.catalogue import TABLES
from experiments.reproduce.tables import Claim, rising

SMALL = ("--budget=smoke", "--dataset=synthetic:8x8x3:4:64:32")
ABOUT = {
    "dataset": "cifar10",
    "budget": "short",
    "epochs": 30,
    "dtype": "float32",
    "protocol": "standard",
    "selection": "validation",
    "seeds": 3,
    "teachers": "shared",
    "only_teach": ["plane10", "plane4"],
    "trained_on": ["NVIDIA H100, jax 1.2.3", "cpu, jax 1.2.3"],
}


def by_seed(*percent):
    return {seed: value / 100 for seed, value in enumerate(percent)}


def figures(name):
    return [row.published for row in TABLES[name].rows]


@pytest.mark.parametrize("budget", budgets.BUDGETS)
@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.name)
def test_every_table_is_configs_that_give_its_rows(table, budget):
    given = command.arguments([table.name, f"--budget={budget}", "--seeds=2"])
    labels = []
    for run in budgets.groups(table, given):
        experiment = resolve(run.config)
        results = {(one.label, name) for one in experiment.comparisons for name in one.students}
        assert {run.key(table, row) for row in run.rows} <= results
        labels += [row.label for row in run.rows]
        smoke, short = budget == "smoke", budget == "short"
        assert experiment.recipe["epochs"] in ((1,) if smoke else (30,) if short else PAPER_EPOCHS)
        assert experiment.dataset["name"].startswith("synthetic:") == smoke
        assert smoke or experiment.dataset["name"] == table.dataset
    assert sorted(labels) == sorted({row.label for row in table.rows})
    assert table.claims and {label for claim in table.claims for label in claim} <= set(labels)
    assert cost.hours(table, given, budget) > 0


PAPER_EPOCHS = (80, 90, 150, 160, 200, 240)


def test_published_figures():
    assert figures("takd-plain-cifar10") == [70.16, 72.57, 73.51]
    assert figures("takd-resnet-cifar100") == [61.37, 61.41, 61.82]
    assert figures("takd-resnet-imagenet") == [65.20, 66.60, 67.36]
    assert figures("takd-size-resnet-cifar100") == [61.47, 61.55, 61.82, 61.5]
    found = dict(zip("abcdefgh", figures("takd-methods-resnet14-cifar10"), strict=True))
    assert (found["c"], found["h"]) == (89.72, 91.23)
    assert figures("dgkd-plain-cifar100") == [None, None, 45.14, 48.92, 50.15]
    assert figures("dgkd-resnet-cifar10")[2:] == [88.01, 89.02, 89.66]
    assert figures("dgkd-seven-cifar100") == [44.07, 49.56]
    assert figures("dgkd-wrn-cifar100")[2:4] == [75.04, 76.24]
    assert figures("teskd-resnet18-cifar100") == [74.41, 79.15, None]
    assert len(TABLES["takd-paths-cifar10"].rows) == 15 + 4  # paths, and students alone


def test_claims_are_the_published_order():
    assert TABLES["takd-plain-cifar10"].claims == rising("NOKD", "BLKD", "TAKD")
    last = TABLES["takd-size-resnet-cifar100"].claims[-1]
    assert last == Claim("TA resnet20", "TA resnet14")  # where the figures fall
    assert TABLES["dgkd-plain-cifar100"].claims == rising("TAKD", "DGKD", "DGKD + drop")
    assert TABLES["teskd-resnet18-cifar100"].claims == (Claim("TESKD", "plain"),)
    paths = TABLES["takd-paths-cifar10"].claims
    assert Claim("10>8>6>4>2", "10>4>2") in paths and Claim("10>8>6", "6 alone") in paths
    # Students 6, 4 and 2: two claims each path with an assistant; the full path over the others.
    assert len(paths) == 2 * (1 + 3 + 7) + 2 + 6


@pytest.mark.parametrize(
    ("worse", "better", "expected"),
    [
        ((50, 50, 50), (52, 53, 54), "order confirmed"),  # 3 ± 4.302653 / √3 = 2.484
        ((50, 50, 50), (51, 52, 53), "undecided at n = 3"),  # 2 ± 2.484
        ((52, 53, 54), (50, 50, 50), "contradicted"),
        ((51, 52, 53), (50, 50, 50), "undecided at n = 3"),
        ((50, 50), (51, 51.2), "undecided at n = 2"),  # 1.1 ± 12.706205 · 0.1
        ((50, 50), (51, 51.1), "order confirmed"),  # 1.05 ± 0.635
        ((50, 60, 40), (50, 60, 40), "undecided at n = 3"),
        ((50,), (90,), "undecided at n = 1"),
        ((50, 60.1, 40.3), (51.1, 61.2, 41.4), "undecided at n = 3"),  # 1.1 thrice: no spread seen
    ],
)
def test_a_verdict_needs_an_interval_without_zero(worse, better, expected):
    accuracies = {"a": by_seed(*worse), "b": by_seed(*better)}
    judged = verdict.judge(rising("a", "b"), accuracies)
    assert verdict.verdict(judged) == expected
    assert verdict.verdict(judged, made_up=True) == f"undecided at n = {len(worse)}"


def test_a_verdict_is_of_all_claims():
    low, middle, high = by_seed(50, 50, 50), by_seed(53, 54, 55), by_seed(60, 61, 59)

    def of(**accuracies):
        return verdict.verdict(verdict.judge(rising("a", "b", "c"), accuracies))

    assert of(a=low, b=middle, c=high) == "order confirmed"
    assert of(a=low, b=middle, c=middle) == "undecided at n = 3"
    assert of(a=low, b=high, c=middle) == "contradicted"
    assert of(a=low, b=middle, c=by_seed(54, 62)) == "undecided at n = 2"
    assert verdict.outcome((float("nan"), 1.0)) == "open"


def test_the_page_says_how_and_what(tmp_path):
    table = TABLES["takd-plain-cifar10"]
    accuracies = {
        "NOKD": by_seed(70, 71, 69),
        "BLKD": by_seed(72, 74, 73),
        "TAKD": by_seed(73, 73, 73),
    }
    result = page.result_of(table, accuracies, ABOUT)
    command.write(result, accuracies, [tmp_path / "one", tmp_path / "other"])
    text = (tmp_path / "one" / "takd-plain-cifar10.md").read_text()
    assert "| NOKD | 70.16 | 70.00 ± 1.00 | - |  |\n" in text
    # Differences 2, 3 and 4: the deviation is 1.
    assert "| BLKD | 72.57 | 73.00 ± 1.00 | +3.00 ± 2.48 | holds |\n" in text
    assert "| TAKD | 73.51 | 73.00 ± 0.00 | +0.00 ± 2.48 | open |\n" in text
    assert "budget short, 30 epochs, float32, protocol standard, weights by validation" in text
    assert "plane10, plane4: one training (seed 0) for all seeds" in text
    assert "students trained on NVIDIA H100, jax 1.2.3 and cpu, jax 1.2.3" in text
    assert "undecided at n = 3: of 2 published orders 1 holds, 0 reversed, 1 open" in text
    numbers = json.loads((tmp_path / "other" / "takd-plain-cifar10.json").read_text())
    assert numbers["verdict"] == "undecided at n = 3"
    assert numbers["accuracies"]["BLKD"]["1"] == 0.74
    assert [claim["outcome"] for claim in numbers["claims"]] == ["holds", "open"]


def test_teachers_have_one_seed_unless_they_are_their_own():
    def seeds(name, *options):
        given = command.arguments([name, "--seeds=2", "--budget=paper", *options])
        run = budgets.groups(TABLES[name], given)[0]
        experiment = resolve(run.config)
        return [experiment.seed_of(network, 1) for network in experiment.networks]

    assert seeds("takd-plain-cifar10") == [0, 0, 1]
    assert seeds("takd-plain-cifar10", "--teachers=own") == [1, 1, 1]
    assert seeds("dgkd-wrn-cifar100", "--teachers=own") == [1] * 5
    assert seeds("takd-paths-cifar10") == [0, 1, 1, 1, 1]
    given = command.arguments(["takd-methods-resnet8-cifar10", "--budget=paper"])
    runs = budgets.groups(TABLES[given.table], given)
    (mutual,) = (run for run in runs if run.rows[0].label == "MUTUAL")
    assert "resnet26" not in mutual.config.overrides  # it learns with its student


def test_the_recipe_of_a_row_is_its_own():
    given = command.arguments(["takd-resnet-cifar100", "--budget=paper"])
    recipes = []
    for run in budgets.groups(TABLES[given.table], given):
        experiment = resolve(run.config)
        found = (experiment.recipe_of(name) for name in ("resnet20", "resnet8"))
        recipes.append([(recipe.kd_weight, recipe.temperature) for recipe in found])
    assert recipes[1][1] == (0.2, 2.0)  # 110 -> 8
    assert recipes[2] == [(0.5, 5.0), (0.15, 5.0)]  # 110 -> 20 -> 8
    given = command.arguments(["dgkd-plain-cifar100", "--budget=paper"])
    dropping = resolve(budgets.groups(TABLES[given.table], given)[0].config).dropping
    assert (dropping.kind, dropping.teacher_droppable) == ("bernoulli", False)


def test_the_list(capsys):
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    named = [line for line in lines if re.match("(takd|dgkd|teskd)-", line)]
    assert [line.split()[0] for line in named] == list(TABLES) and len(named) >= 12
    assert max(map(len, lines)) <= 80
    assert named[0].split()[1:5] == ["cifar10", "70.16", "72.57", "73.51"]
    assert all(re.search(r"(\s+(<?[\d.]+)){3}$", line) for line in named)


def test_operations_are_those_that_are_counted():
    counted = json.loads(cost.OPERATIONS.read_text())
    for name, classes in (("plane4", 10), ("resnet8", 100)):
        assert counted[f"{name} 32 {classes}"] == flops.forward(build(name, classes, (32, 32, 3)))
    # By hand: three stages of plain training, 10 -> 4 and 10 -> 2 and 4 -> 2.
    given = command.arguments(["takd-plain-cifar10", "--budget=paper", "--seeds=1", "--rate=1"])
    ten, four, two = (counted[f"plane{size} 32 10"] for size in (10, 4, 2))
    steps = 3 * 160 * (ten + four + 3 * two) + 2 * ten + four
    found = cost.hours(TABLES[given.table], given, "paper")
    assert found == pytest.approx(45_000 * steps / 3600e9)


def test_the_page_of_docs_names_every_table():
    text = (pages.DOCS / "reproduce.md").read_text("utf-8")
    assert set(re.findall(r"`((?:takd|dgkd|teskd)-[\w-]+)`", text)) == set(TABLES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a table, or --list them"),
        (["takd-plane-cifar10"], "no table 'takd-plane-cifar10'; did you mean 'takd-plain-"),
        (
            ["takd-plain-cifar10", "--budget=long"],
            "--budget: 'long' is none of smoke, short, paper",
        ),
        (["takd-plain-cifar10", "--seeds=0"], "--seeds is at least 1, got 0"),
        (["takd-plain-cifar10", "--protocol=mine"], "--protocol: 'mine' is none of standard"),
        (["takd-plain-cifar10", "--save"], "--save keeps results on real images"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_missing_data_is_said(tmp_path, capsys):
    arguments = ["takd-plain-cifar10", "--budget=short", f"--data_dir={tmp_path / 'none'}"]
    assert command.main([*arguments, f"--workdir={tmp_path / 'run'}"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and "none" in line


def test_the_command_trains_a_table_once_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["takd-plain-cifar10", *SMALL, f"--workdir={tmp_path}"]
    written = tmp_path / "takd-plain-cifar10-smoke" / "takd-plain-cifar10.json"

    def stages():
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}

    def run(*more):
        """What it says before the table, and from there on."""
        assert command.main([*arguments, *more]) == 0
        before, mark, table = capsys.readouterr().out.partition("takd-plain-cifar10: ")
        return before, mark + table

    progress, printed = run()
    first, trained = written.read_bytes(), stages()
    assert len(trained) == 5  # the teacher, the assistant by it, and the student in three ways
    assert "1 epochs" in progress
    assert max(map(len, printed.splitlines())) <= 80
    assert "undecided at n = 1: made-up images decide nothing" in printed
    progress, again = run()
    assert again == printed and "epochs" not in progress  # nothing was trained
    assert written.read_bytes() == first and stages() == trained
    run("--seeds=2")
    assert len(stages()) == 5 + 3 and trained.items() <= stages().items()  # the student alone
    found = json.loads(written.read_text())
    assert found["verdict"] == "undecided at n = 2"
    for label, accuracies in json.loads(first)["accuracies"].items():
        assert found["accuracies"][label]["0"] == accuracies["0"]
