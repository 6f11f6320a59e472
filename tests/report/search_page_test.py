"""`report` of a search: its pictures and tables from search.json alone."""

import json
import re
import sys
import xml.etree.ElementTree

import pytest

from distill_jax import main

SPACE = {
    "kd_weight": {"low": 0.05, "high": 1.0, "log": False},
    "learning_rate": {"low": 1e-4, "high": 0.1, "log": True},
    "guidance": {"choices": ["plane4>plane2", "dense<b>"]},
    "milestones": {"choices": [[0.5], [0.5, 0.75]]},
}
ACCURACIES = (0.5, 0.75, 0.6, None, 0.4)
STATES = ("complete", "complete", "complete", "failed", "pruned")


def trial(number):
    accuracy, state = ACCURACIES[number], STATES[number]
    point = {"kd_weight": 0.1 + 0.2 * number, "learning_rate": 10.0**-number * 0.09}
    point |= {"guidance": SPACE["guidance"]["choices"][number % 2], "milestones": [0.5]}
    point["learning_rate"] = max(point["learning_rate"], 1e-4)
    failed = "step 3 is not finite in term <kl>" if state == "failed" else ""
    about = {"trial": number, "state": state, "point": point, "accuracy": accuracy}
    return {**about, "failed": failed, "seconds": 1.25, "accuracies": {}, "folder": ""}


@pytest.fixture
def record():
    """What a search writes."""
    about = {"name": "small", "guidance": "direct", "network": "plane2", "seeds": [0, 1]}
    about |= {"sampler": "tpe", "pruner": "median", "config": {"name": "small"}, "best": 1}
    return {**about, "space": SPACE, "trials": [trial(i) for i in range(5)]}


def report(folder, record, capsys):
    """The exit code, the page, and what is said of errors."""
    folder.mkdir(exist_ok=True)
    (folder / "search.json").write_text(record if isinstance(record, str) else json.dumps(record))
    code = main.main(["report", str(folder)])
    page = folder / "report.html"
    text = page.read_text("utf-8").replace("<wbr>", "") if page.exists() else ""
    return code, text, capsys.readouterr().err


def test_a_search_has_a_page_of_its_own(record, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)  # where it is not installed
    code, text, errors = report(tmp_path / "a & <b>", record, capsys)
    assert code == 0 and not errors
    assert "<title>a &amp; &lt;b&gt;</title>" in text
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    titles = [re.search('aria-label="([^"]*)"', picture)[1] for picture in pictures]
    assert titles == ["Accuracy over trials", *(f"Accuracy by {name}" for name in SPACE)]
    for picture in pictures:
        xml.etree.ElementTree.fromstring(picture)
    assert all("var(--c1)" in picture and "var(--c6)" in picture for picture in pictures)
    assert "5 trials; 1 pruned; 1 failed; validation accuracy of plane2 under direct" in text
    assert "mean over 2 seeds; best: 75.00 % by trial 1, kd_weight=0.3" in text
    ids = re.findall('id="([^"]*)"', text)
    assert len(ids) == len(set(ids)) and "<script" not in text and "<b>dense" not in text
    assert "step 3 is not finite in term &lt;kl&gt;" in text
    texts = re.findall(r">([^<>]+)</text>", pictures[2])
    assert "0.001" in texts and "0.1" in texts  # plain numbers, not powers
    table = (tmp_path / "a & <b>" / "report.md").read_text("utf-8").partition("## Trials")[2]
    firsts = re.findall(r"^\| (\d) \|", table, re.MULTILINE)
    assert firsts == ["1", "2", "0", "4", "3"]  # the best first; then pruned and failed


def test_the_same_search_gives_the_same_bytes(record, tmp_path, capsys):
    first = report(tmp_path / "search", record, capsys)[1]
    assert report(tmp_path / "search", record, capsys)[1] == first


def test_the_best_so_far_is_drawn_where_it_was_found(record, tmp_path, capsys):
    before = report(tmp_path / "search", record, capsys)[1]
    record["trials"][4] = {**record["trials"][4], "state": "complete", "accuracy": 0.9}
    after = report(tmp_path / "search", record, capsys)[1]
    assert "best: 75.00 % by trial 1" in before and "best: 90.00 % by trial 4" in after


def test_a_search_that_has_just_begun_says_so(record, tmp_path, capsys):
    code, text, _ = report(tmp_path / "search", {**record, "trials": [], "best": None}, capsys)
    assert code == 0 and "0 trials; " in text and "no trial is finished yet" in text
    assert "<svg" not in text
    one = {**record, "trials": [trial(0)]}
    assert "1 trial; " in report(tmp_path / "search", one, capsys)[1]


def changed(record, **fields):
    return {**record, "trials": [{**record["trials"][0], **fields}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: "{", "Expecting property name"),
        (lambda record: "[]", "expected an object"),
        (lambda record: {**record, "name": 3}, "search.json has name=3: expected a text"),
        (lambda record: {**record, "trials": [3]}, "a trial has 3: expected an object"),
        (lambda record: {**record, "space": {"kd_weight": {}}}, "low is '': expected a number"),
        (lambda record: changed(record, state="odd"), "a trial has state='odd'"),
        (lambda record: changed(record, accuracy=None), "is complete and has no accuracy"),
        (lambda record: changed(record, accuracy="high"), "accuracy is 'high': expected a number"),
        (lambda record: changed(record, point={"guidance": "x"}), "a trial has guidance='x'"),
        (lambda record: changed(record, point={"kd_weight": "x"}), "kd_weight is 'x'"),
    ],
)
def test_a_damaged_record_is_refused_by_name(change, message, record, tmp_path, capsys):
    code, text, errors = report(tmp_path / "search", change(record), capsys)
    (line,) = errors.splitlines()
    assert code == 1 and not text and message in line
    assert line.startswith(f"error: {tmp_path / 'search' / 'search.json'}: a record is damaged: ")
