"""`report`: a run as a page, read by a parser of HTML and, where there is one, by a browser."""

import dataclasses
import html.parser
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree

import cli
import numpy as np
import pytest

import distill_jax
from distill_jax import main
from distill_jax.runs.run_record import read_record

CONFIG = {
    "name": "small",
    "dataset": {"name": "synthetic:8x8x1:4:96:32", "valid_fraction": 0.25},
    "networks": ("plane4", "plane4#2", "plane2"),
    "guidance": ("none", "dense+drop", "plane4>plane2"),
    "seeds": (0, 1),
    "dropping": {"kind": "bernoulli", "survival": 0.5},
    "controls": {"a <b> & c": {"epochs": 1}},
    "recipe": {"epochs": 2, "batch_size": 12},
}
PATH = "plane4>plane2"
SECTIONS = [
    "Who teaches whom",
    "Results",
    "Learning curves",
    "Agreement and calibration",
    "Stochastic teaching",
    "Terms of the loss",
    "Stages, time and memory",
]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


class Page(html.parser.HTMLParser):
    """The parts of a page: ids, links, headings, rows of tables, and the text of each figure."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.attributes = [], [], []
        self.headings, self.rows, self.figures = [], [], {}
        self.open = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        self.attributes += attributes
        self.ids += [given["id"]] if "id" in given else []
        if tag == "figure":
            self.figures[given["id"]] = ""
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "h3":
            self.headings.append("")
        if tag not in ("meta", "wbr", "br"):
            self.open.append((tag, given))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for tag, given in self.open:
            if tag == "figure":
                self.figures[given["id"]] += data
            if tag in ("td", "th"):
                self.rows[-1][-1] += data
            if tag == "h3":
                self.headings[-1] += data

    def figure(self, name):
        """The texts of the figures of a kind."""
        return [text for key, text in self.figures.items() if re.search(rf"{name}-\d+$", key)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run, whose name has to be escaped, and its results."""
    folder = tmp_path_factory.mktemp("runs") / "a & <b>"
    return folder, distill_jax.run(CONFIG, workdir=folder, progress=False)


@pytest.fixture
def copied(run, tmp_path):
    """A copy of it to be changed."""
    return shutil.copytree(
        run[0], tmp_path / "run", ignore=shutil.ignore_patterns("compiled", "report.*")
    )


def written(capsys, *arguments):
    """The text of the page that the command writes, and its parts."""
    assert main.main(["report", *map(str, arguments), "--latency=no"]) == 0
    output = capsys.readouterr()
    assert not output.err and output.out.endswith(f"report.md are in {arguments[0]}\n")
    text = (arguments[0] / "report.html").read_text("utf-8")
    return text, Page(text)


def refused(capsys, *arguments):
    """The one line with which the command ends."""
    assert main.main(["report", *map(str, arguments), "--latency=no"]) == 1
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    return line


def edit(path, change):
    """Has `change` change the JSON value of a file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# --------------------------------------------------------------------------------- what is on it
def test_every_part_is_there_with_the_numbers_of_the_run(run, capsys):
    folder, results = run
    text, page = written(capsys, folder)
    assert page.headings == [*SECTIONS, "Not on this page", "How it was made"]
    for row in distill_jax.report.summarise(results.rows):
        accuracy = f"{100 * row['accuracy']:.2f} ± {100 * row['deviation']:.2f}"
        assert [x for x in page.rows if x[:2] == [row["guidance"], "plane2"] and accuracy in x]
    graphs = page.figure("graph")
    assert len(graphs) == 2 and PATH in graphs[1]
    taught = [row["test_accuracy"] for row in results.rows if row["guidance"] == PATH]
    assert f"{100 * np.mean(taught):.2f} ± {100 * np.std(taught, ddof=1):.2f} %" in graphs[1]
    assert all("kd" in graph for graph in graphs)
    assert len(page.figure("curves")) == 3 and len(page.figure("reliability")) == 1
    assert "2 seeds" in page.figure("curves")[0] and "epoch" in page.figure("curves")[0]
    assert "part of several" in page.figures["run0-parameters"]  # plane4 teaches in both
    assert "kl" in "".join(page.figure("terms")) and "MiB" in page.figure("memory")[0]
    agreements = [row["agreement"]["plane4"] for row in results.rows if row["guidance"] == PATH]
    shown = f"{100 * np.mean(agreements):.2f} ± {100 * np.std(agreements, ddof=1):.2f}"
    assert [row for row in page.rows if row[0] == PATH and shown in row]
    started = json.loads((folder / "run.json").read_text())
    assert ["JAX", started["jax"]] in page.rows and ["command", started["command"]] in page.rows


def test_it_stands_alone_and_its_ids_are_its_own(run, capsys):
    text, page = written(capsys, run[0])
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [value for name, value in page.attributes if name in ("src", "srcset")]
    assert "@import" not in text and "url(http" not in text
    references = re.findall(r'(?:href="#|url\(#)([^")]+)', text)
    hrefs = [value for name, value in page.attributes if name.endswith("href")]
    assert all(value.startswith("#") for value in hrefs)
    assert len(page.ids) == len(set(page.ids)) and set(references) <= set(page.ids)
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == page.tags.count("figure") > 10
    for picture in pictures:
        xml.etree.ElementTree.fromstring(picture)


def test_texts_are_shown_as_they_are(run, capsys):
    text, page = written(capsys, run[0])
    assert "<title>a &amp; &lt;b&gt;</title>" in text and "<b>" not in text
    assert ["none, a <b> & c", "plane2"] in [row[:2] for row in page.rows]
    (accuracies,) = page.figure("results")
    assert PATH in accuracies and "none, a <b> & c" in accuracies
    table = (run[0] / "report.md").read_text("utf-8")
    assert "| none, a &lt;b&gt; &amp; c | plane2 |" in table and "plane4\\#2" in table


def test_the_same_run_gives_the_same_bytes(run, capsys):
    folder = run[0]
    first, _ = written(capsys, folder)
    table = (folder / "report.md").read_bytes()
    done = cli.run("report", str(folder), "--latency=no")
    assert done.returncode == 0, done.stderr
    assert (folder / "report.html").read_text("utf-8") == first
    assert (folder / "report.md").read_bytes() == table


def test_latency_is_measured_once_and_kept(copied, capsys):
    _, page = written(capsys, copied)
    assert "run0-latency" not in page.figures
    assert main.main(["report", str(copied)]) == 0
    measured = (copied / "latency.json").read_bytes()
    assert set(json.loads(measured)["seconds"]) == set(CONFIG["networks"])
    assert main.main(["report", str(copied)]) == 0
    assert (copied / "latency.json").read_bytes() == measured
    page = Page((copied / "report.html").read_text("utf-8"))
    assert "ms" in page.figures["run0-latency"] and "plane4#2" in page.figures["run0-latency"]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_reads_it(run, capsys, tmp_path):
    _, page = written(capsys, run[0])
    shutil.copy(run[0] / "report.html", tmp_path / "page.html")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*command, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    seen = Page(done.stdout)
    assert seen.headings == page.headings and seen.rows == page.rows
    assert seen.figures.keys() == page.figures.keys() and seen.ids == page.ids
    assert seen.tags.count("svg") == page.tags.count("svg")


# ----------------------------------------------------------------- what is not finished, or failed
def test_teachers_that_are_dropped_are_counted_as_the_steps_kept_them(run, capsys):
    history = run[1].histories["dense+drop", "plane2", 0]
    for epoch in history:
        each = [epoch[f"train_kept_{name}"] for name in ("plane4", "plane4#2")]
        assert np.mean(each) == pytest.approx(epoch["train_kept"], abs=1e-6)
    assert any(epoch["train_kept_plane4"] != epoch["train_kept_plane4#2"] for epoch in history)
    _, page = written(capsys, run[0])
    (kept,) = page.figure("kept")
    assert "plane4#2" in kept and "% of the steps" in kept
    assert not any("train_kept_plane4" in x for x in run[1].histories[PATH, "plane2", 0])


def test_a_run_that_is_half_done_says_how_far_it_is(copied, capsys):
    lost = {
        row["stage"] for row in json.loads((copied / "results.json").read_text()) if row["teachers"]
    }
    edit(copied / "results.json", lambda rows: rows.__delitem__(slice(2, None)))
    for stage in lost:
        shutil.rmtree(copied / "stages" / f"plane2-{stage}")
    lines = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [x for x in lines if not (json.loads(x)["stage"] in lost and '"epoch": 2' in x)]
    (copied / "metrics.jsonl").write_text("".join(kept) + '{"stage": "to')  # torn
    text, page = written(capsys, copied)
    total = len(json.loads((copied / "run.json").read_text())["stages"])
    assert f"{total - len(lost)} of {total} stages are done; no run is at work" in text
    assert all("not finished" in graph for graph in page.figure("graph"))
    assert any("seed 1 at epoch 1 of 2" in cell for row in page.rows for cell in row)
    shutil.rmtree(copied / "stages")
    (copied / "results.json").unlink()
    (copied / "metrics.jsonl").unlink()
    text, page = written(capsys, copied)
    assert "there are no results yet" in text and len(page.figures) == 2


def test_a_stage_that_failed_is_named_with_its_reason(copied, capsys):
    def fail(rows):
        for row in rows:
            if row["guidance"] == PATH:
                shutil.rmtree(copied / "stages" / f"plane2-{row['stage']}")
                for name in ("test_accuracy", "last_test_accuracy", "parameters", "agreement"):
                    del row[name]
                row["failed"] = "step 3 is not finite in term <kl>"

    edit(copied / "results.json", fail)
    text, page = written(capsys, copied)
    assert "2 of 8 results failed" in text
    assert "step 3 is not finite in term &lt;kl&gt;" in text
    assert "failed" in page.figure("graph")[1] and "failed" not in page.figure("graph")[0]
    assert [row for row in page.rows if row[:2] == [PATH, "plane2"] and "failed" in row]


def test_what_earlier_versions_did_not_record_is_named(copied, capsys):
    edit(
        copied / "run.json",
        lambda run: [stage.pop(x) for stage in run["stages"] for x in ("edges", "live", "methods")],
    )
    edit(copied / "results.json", lambda rows: [row.pop("reliability") for row in rows])
    text, page = written(capsys, copied)
    assert "methods on edges: " in text and "reliability: " in text
    assert not page.figure("reliability") and len(page.figure("graph")) == 2


def test_several_runs_stand_on_one_page(run, copied, capsys):
    edit(copied / "config.json", lambda config: config.update(name="other"))
    text, page = written(capsys, copied, run[0])
    assert len(page.ids) == len(set(page.ids))
    (accuracies,) = page.figure("results")
    assert "run: none" in accuracies and "a & <b>: none" in accuracies
    assert page.headings.count("Learning curves") == 2 and text.count("<h2>") == 2
    assert "# a &amp; &lt;b&gt;" in (copied / "report.md").read_text("utf-8")


def test_runs_whose_folders_have_one_name_are_told_apart(copied, capsys):
    other = shutil.copytree(copied, copied.parent / "other" / copied.name)
    text, _ = written(capsys, copied, other, copied.parent / "." / copied.name)
    assert re.findall("<h2>(.*)</h2>", text) == [str(copied), str(other)]


def test_phases_that_follow_one_another_are_no_seeds_of_one(run):
    record = read_record(run[0])
    stage = record.stages[0]
    pairs = [(seed, phase) for seed in (0, 1) for phase in (True, True, False)]
    stages = [dataclasses.replace(stage, seed=seed, phase=phase) for seed, phase in pairs]
    groups = dataclasses.replace(record, stages=stages).groups
    name = ", ".join(stage.guidance)
    assert [group.label for group in groups] == [f"{name} (phase)", f"{name} (phase 2)", name]
    assert [len(group.stages) for group in groups] == [2, 2, 2]


# ------------------------------------------------------------------------------------- refusals
def test_a_folder_that_is_none_of_a_run_is_refused(tmp_path, capsys):
    assert "there is no folder" in refused(capsys, tmp_path / "nowhere")
    assert "it has no config.json" in refused(capsys, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "has nothing to show: expected a run that was started" in refused(capsys, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", "{"),
        ("run.json", "[]"),
        ("run.json", lambda run: run["stages"][0].pop("network")),
        ("run.json", lambda run: run["stages"][0].update(guidance=None)),
        ("run.json", lambda run: run.update(stages={"a": 1})),
        ("run.json", lambda run: run.update(earlier=3)),
        ("results.json", "[1"),
        ("results.json", lambda rows: rows[0].pop("test_accuracy")),
        ("results.json", lambda rows: rows[0].update(network=3)),
        ("results.json", lambda rows: rows[0].update(valid_accuracy="high")),
        ("results.json", lambda rows: rows[0].update(last_test_accuracy=None)),
        ("results.json", lambda rows: rows[0].update(failed=3)),
        ("results.json", lambda rows: rows[0].update(reliability={"count": 3})),
        ("results.json", lambda rows: rows[0].update(agreement={"plane4": "much"})),
        ("result.json", '{"record": {}}'),
        ("result.json", lambda result: result["record"].update(test_accuracy="high")),
        ("result.json", lambda result: result["history"][0].update(valid_accuracy=[1])),
        ("metrics.jsonl", "{\n{}\n"),
    ],
)
def test_a_damaged_record_is_refused_by_name(file, change, copied, capsys):
    path = copied / file
    if file == "result.json":
        path = next(iter(sorted(copied.glob("stages/plane2-*/result.json"))))
    if isinstance(change, str):
        path.write_text(change)
    else:
        edit(path, change)
    line = refused(capsys, copied)
    assert line.startswith("error: ") and str(copied) in line
    assert not (copied / "report.html").exists()
    assert main.main(["show", str(copied)]) == 1
    assert capsys.readouterr().err == f"{line}\n"


def test_a_folder_that_cannot_be_written_is_refused(copied, capsys):
    (copied / "report.html").mkdir()
    line = refused(capsys, copied)
    assert "could not write" in line and "expected a folder that can be written" in line
    assert not (copied / ".report.html.tmp").exists()
