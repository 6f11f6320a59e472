"""The examples in README.md and docs/adding.md, exactly as they stand there."""

import pathlib
import re
import shlex

import numpy as np
import pytest

from distill_jax import data, default_config, load, methods, resolve
from distill_jax.main import COMMANDS, parse
from distill_jax.runs.config import FIELDS

ROOT = pathlib.Path(__file__).parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "docs" / "results.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
FIELDS_OF_A_ROW = RESULTS.read_text("utf-8").partition("In `results.json`")[2].partition("\n## ")[0]


def blocks(page, language=""):
    """The code blocks of a page that are in a language; "" of commands and what they print."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


EXAMPLES = blocks(ROOT / "docs" / "adding.md", "python")


def run(example, monkeypatch, **options):
    """Runs an example; the results of its runs, which are given these options besides."""
    import distill_jax

    results, plain = [], distill_jax.run

    def kept(config, **own):
        results.append(plain(config, **own, **options))
        return results[-1]

    monkeypatch.setattr(distill_jax, "run", kept)
    exec(compile(example, "docs/adding.md", "exec"), {"__name__": "example"})
    return results


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            assert (page.parent / path).exists() and not anchor, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fields_that_are_named_are_fields(page):
    named = set(re.findall(r"--config\.([a-z_.]*[a-z_])", page.read_text("utf-8")))
    assert named <= {field.path for field in FIELDS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_can_be_read(page):
    text = "".join(blocks(page)).replace("\\\n", " ")
    for command in re.findall(r"python -m distill_jax (\w.*)", text):
        name, *arguments = shlex.split(command, comments=True)
        given = parse(name, COMMANDS[name], arguments)
        if given.config is not None:
            assert resolve(given.config).comparisons, command


def test_the_config_file_of_the_page_is_one():
    (example,) = blocks(ROOT / "docs" / "config.md", "python")
    names: dict = {}
    exec(example, names)
    assert resolve(names["get_config"]("cifar100")).dataset["name"] == "cifar100"
    assert resolve(names["get_config"]("smoke")).recipe["epochs"] == 1


def test_the_configs_in_the_table_are_those_there_are():
    table = README.read_text("utf-8").partition("| config |")[2].partition("\n\n")[0]
    first = "".join(re.findall(r"^\|([^|]*)\|", table, re.MULTILINE))
    files = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert set(re.findall(r"`(\w+)`", first)) == files
    for page in PAGES:
        named = re.findall(r"--config=([a-z]\w*)(?=[\s:`])", page.read_text("utf-8"))
        assert set(named) <= files, page.name


def test_the_guidances_in_the_table_are_guidances():
    text = README.read_text("utf-8").partition("## Who teaches whom")[2]
    guidances = re.findall(r"^\| `([^`]+)` \|", text.partition("\n## ")[0], re.MULTILINE)
    assert len(guidances) == 10 and "dense+drop" in guidances
    row = ("plane10", "plane4", "plane2")
    for guidance in guidances:
        draws = ("plane2", "plane2#2", "plane2#3")
        networks = draws if "#" in guidance else row
        assert resolve({"networks": networks, "guidance": guidance}).comparisons


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md"])
def test_the_methods_in_the_tables_are_those_there_are(page):
    text = (ROOT / page).read_text("utf-8").partition("| method |")[2].partition("\n\n")[0]
    first = "".join(re.findall(r"^\|([^|]*)\|", text, re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", first)) == {*methods.METHODS, "ce"}


def test_the_notebook_of_the_readme_shows_that_teaching_helps(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # it writes its results
    (example,) = blocks(README, "python")
    (results,) = run(example, monkeypatch)
    alone, taught = ([r for r in results.rows if r["guidance"] == x] for x in ("none", "direct"))
    gains = [a["test_accuracy"] - b["test_accuracy"] for a, b in zip(taught, alone, strict=True)]
    assert len(gains) == 5 and np.mean(gains) > 0
    printed = capsys.readouterr().out
    assert f"{100 * np.mean(gains):+.2f}" in printed
    assert max(len(line) for line in printed.splitlines() if line[:1] in "┃│") <= 80
    assert load(tmp_path / "runs" / "notebook").rows == results.rows
    labels = data.load("digits").test.labels[:10]
    assert str(labels) in printed
    documented = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", FIELDS_OF_A_ROW, re.MULTILINE)
    names = {name for cell in documented for name in re.findall(r"\w+", cell)}
    assert "ece" in names and names - {"failed"} <= set(taught[0])


def test_there_are_seven_of_at_most_twenty_lines():
    lengths = [sum(bool(line.strip()) for line in x.splitlines()) for x in EXAMPLES]
    assert len(lengths) == 7 and max(lengths) <= 20, lengths


def test_a_network_gives_the_same_numbers_on_one_device_and_on_two(monkeypatch, capsys):
    # Fewer images: linen's convolutions are slow here.
    few = data.load(**default_config().dataset).limited(32, seed=0)
    two, one = run(EXAMPLES[0], monkeypatch, dataset=few)
    printed = capsys.readouterr().out.splitlines()[-2:]
    for many, alone, line in zip(two.rows, one.rows, printed, strict=True):
        accuracies = many["test_accuracy"], alone["test_accuracy"]
        assert line.split() == [many["guidance"], *map(str, accuracies)]
        assert accuracies[0] == pytest.approx(accuracies[1], abs=0.01)
    label = ("direct", "plane2", 0)
    for many, alone in zip(two.histories[label], one.histories[label], strict=True):
        assert many["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-4)


@pytest.mark.parametrize(("number", "term"), [(1, "dkd_mine"), (2, "attention")])
def test_a_method_teaches(number, term, monkeypatch):
    (result,) = run(EXAMPLES[number], monkeypatch)
    (history,) = result.histories.values()
    assert 0 < history[-1][f"train_{term}"] < history[0][f"train_{term}"]


def test_an_optimizer_trains(monkeypatch):
    (result,) = run(EXAMPLES[3], monkeypatch)
    assert result.rows[0]["test_accuracy"] > 0.5


@pytest.mark.parametrize("number", [4, 5], ids=["transformer", "two inputs"])
def test_another_task_is_distilled(number, monkeypatch):
    (result,) = run(EXAMPLES[number], monkeypatch)
    (row,) = result.rows
    assert row["teachers"] and row["test_accuracy"] > 0.8  # the commoner label: below 0.65
    assert row["agreement"][row["teachers"][0]] > 0.8


def test_a_metric_is_recorded(monkeypatch, capsys):
    (result,) = run(EXAMPLES[6], monkeypatch)
    printed = [float(number) for number in capsys.readouterr().out.split()[-3:]]
    (row,) = result.rows
    assert printed == [row["test_accuracy"], row["test_top3"], row["valid_top3"]]
    network, variables = next(iter(result.networks.values()))
    digits = data.load("digits")
    images = data.normalise(digits.test.images, digits.mean, digits.std)
    logits = np.asarray(network.apply(variables, images)[0].logits)
    ranks = (logits > logits[np.arange(500), digits.test.labels][:, None]).sum(-1)
    assert row["test_top3"] == np.mean(ranks < 3) > row["test_accuracy"]
