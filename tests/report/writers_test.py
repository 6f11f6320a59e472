"""Writers: what they are told, and TensorBoard's files, read back and compared with a run's own."""

import json
import logging
import re
import struct
import sys
import types
from pathlib import Path

import pytest
from ending import Killed, Steps

import distill_jax
from distill_jax import ConfigError, EpochEnded, StageEnded, StageStarted
from distill_jax.report.page import graph, record
from distill_jax.train import trainer

DOCS = Path(__file__).parents[2] / "docs" / "writers.md"
TINY = {
    "dataset": {"name": "synthetic:8x8x1:4:48:32", "valid_fraction": 0.25},
    "networks": ("plane2", "plane2#2", "plane2#3"),
    "guidance": ("dense+drop",),
    "recipe": {"epochs": 2, "batch_size": 12},
    "population": 1,
}
OF_EPOCHS = ("train/loss", "valid/loss", "valid/accuracy", "train/ce", "train/weighted_kl")
OF_EPOCHS += ("learning_rate", "images_per_second", "train/kept_plane2_2")


def events(folder):
    """The events in the files of a folder, in order."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.glob("events.*")):
        left = path.read_bytes()
        while left:  # length and its checksum, the event and its checksum
            (length,) = struct.unpack("<Q", left[:8])
            yield Event.FromString(left[12 : 12 + length])
            left = left[16 + length :]


def summaries(folder):
    """(step, value) of all summaries in a folder's files, by tag."""
    found = {}
    for event in events(folder):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value))
    return found


def scalars(folder):
    """[(step, number)] of each scalar, by tag."""
    return {
        tag: [(step, value.simple_value) for step, value in pairs]
        for tag, pairs in summaries(folder).items()
        if pairs[0][1].HasField("simple_value")
    }


def lines(workdir):
    """The epochs of `metrics.jsonl`, by the folder of their stage."""
    found = {}
    for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()):
        found.setdefault(f"{line['network']}-{line['stage']}", []).append(line)
    return found


def check_same_epochs(workdir):
    """Each folder of TensorBoard has the numbers of `metrics.jsonl`, each epoch once."""
    epochs = lines(workdir)
    assert {x.name for x in (workdir / "tensorboard").iterdir()} == set(epochs)
    for folder, own in epochs.items():
        written = scalars(workdir / "tensorboard" / folder)
        named = {re.sub("^(train|valid|test)_", r"\1/", name): name for name in own[0]}
        for tag in set(named) & set(written):
            expected = [(x["epoch"], pytest.approx(x[named[tag]])) for x in own]
            assert written[tag] == expected, tag
        there = {"train/loss", "train/accuracy", "valid/loss", "valid/accuracy"}
        assert there <= set(named) & set(written)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    workdir, records = tmp_path_factory.mktemp("told"), []
    config = {**TINY, "tensorboard": True}
    results = distill_jax.run(config, workdir=workdir, writers=[records.append])
    return workdir, results, records


def test_a_writer_is_told_of_every_stage_and_epoch_by_typed_records(told):
    workdir, results, records = told
    kinds = [type(one) for one in records]
    assert kinds == [StageStarted, EpochEnded, EpochEnded, StageEnded] * 3
    assert {one.stage.folder for one in records} == set(lines(workdir))
    stage = records[-1].stage
    assert (stage.network, stage.teachers, stage.seed) == ("plane2#3", ("plane2", "plane2#2"), 0)
    assert stage.guidance == ("dense+drop",) and stage.hyper["kd_weight"] == 0.5
    assert stage.hyper["methods.kd"] == 1.0 and "kd_weight" not in records[0].stage.hyper
    assert all(isinstance(x, (bool, int, float, str)) for x in stage.hyper.values())
    own = lines(workdir)[stage.folder]
    for one, line in zip(records[-3:-1], own, strict=True):
        assert (one.epoch, one.step) == (line["epoch"], line["step"])
        assert one.values.items() <= line.items() and "train_kept_plane2#2" in one.values
    (row,) = results.rows
    assert records[-1].values["test_accuracy"] == row["test_accuracy"]
    assert records[-1].values["agreement_plane2"] == row["agreement"]["plane2"]


def test_tensorboard_has_the_numbers_of_the_run(told):
    workdir, results, _ = told
    check_same_epochs(workdir)
    (row,) = results.rows
    folder = workdir / "tensorboard" / f"plane2#3-{row['stage']}"
    written = scalars(folder)
    assert set(OF_EPOCHS) <= set(written)
    for name in ("test_accuracy", "ece", "valid_accuracy", "seconds"):
        assert written[f"final/{name}"] == [(0, pytest.approx(row[name]))]


def test_tensorboard_has_hyper_parameters_beside_the_accuracy_that_they_gave(told):
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    workdir, results, _ = told
    (row,) = results.rows
    found = summaries(workdir / "tensorboard" / f"plane2#3-{row['stage']}")

    def content(tag):
        ((_, value),) = found[tag]
        return HParamsPluginData.FromString(value.metadata.plugin_data.content)

    metrics = {m.name.tag for m in content("_hparams_/experiment").experiment.metric_infos}
    assert metrics == {"final/test_accuracy", "final/valid_accuracy"} <= set(found)
    given = content("_hparams_/session_start_info").session_start_info.hparams
    assert given["kd_weight"].number_value == 0.5
    assert given["teachers"].string_value == "plane2 plane2#2"
    assert "_hparams_/session_end_info" in found


def test_tensorboard_has_a_picture_of_the_graph(told):
    workdir, results, _ = told
    (row,) = results.rows
    heights = {}
    for place in (workdir / "tensorboard").iterdir():
        ((_, value),) = summaries(place)["graph"]
        assert value.image.encoded_image_string.startswith(b"\x89PNG")
        heights[place.name.partition("-")[0]] = value.image.height
    # A line each for the networks above it, itself, and what travels along edges.
    assert heights["plane2"] < heights["plane2#2"] < heights["plane2#3"]


def test_a_picture_names_its_networks_and_what_travels_between_them():
    taught = record.StageRecord("b", "small", 0, ("x",), {"large": ("kd",), "peer": ("dml",)})
    taught = [
        record.StageRecord("a", "large", 0, ("x",), {}),
        record.StageRecord("c", "peer", 0, ("x",), {"small": ("dml",)}, live=("small",)),
        record.StageRecord(*list(vars(taught).values())[:5], live=("peer",)),
    ]
    figure = graph.graph_figure(taught)
    texts = [x.get_text() for x in (*figure.axes[0].texts, *figure.texts)]
    assert [x for x in texts if x] == ["large", "peer", "small", "╍╍ dml (live)", "━━ kd"]
    assert len(figure.axes[0].patches) == 2


def test_a_run_that_was_killed_and_goes_on_has_every_epoch_once(told, tmp_path, monkeypatch):
    _, results, _ = told
    monkeypatch.setattr(trainer, "DISPATCH_SECONDS", 0.0)  # one step a dispatch
    config = {**TINY, "tensorboard": True, "checkpoint_every": "2 steps"}
    records = []
    with pytest.raises(Killed):  # its first epoch is told, and what is saved is from before
        distill_jax.run(config, workdir=tmp_path, reporter=Steps(4), writers=[records.append])
    assert [type(one) for one in records] == [StageStarted, EpochEnded]
    with pytest.raises(Killed):
        distill_jax.run(config, workdir=tmp_path, reporter=Steps(4), writers=[records.append])
    rows = distill_jax.run(config, workdir=tmp_path, writers=[records.append]).rows
    assert rows[0]["state_digest"] == results.rows[0]["state_digest"]
    check_same_epochs(tmp_path)
    begun = [len(one.history) for one in records if isinstance(one, StageStarted)]
    assert begun[:2] == [0, 0] and begun[2] == 1


def test_stages_that_were_finished_without_tensorboard_get_their_files(told, tmp_path):
    config = {**TINY, "networks": ("plane2",), "guidance": ("none",)}
    records = []
    distill_jax.run(config, workdir=tmp_path)
    assert not (tmp_path / "tensorboard").exists()
    for _ in range(2):
        asked = {**config, "tensorboard": True}
        distill_jax.run(asked, workdir=tmp_path, writers=[records.append])
        check_same_epochs(tmp_path)
        (own,) = (tmp_path / "tensorboard").glob("*/events.*")
        own.rename(own.with_name("events.kept"))  # what is complete is not written again
    assert not records


def test_weights_that_are_given_begin_and_end_at_once(told):
    workdir, results, _ = told
    folder = next((workdir / "stages").glob("plane2-*"))
    changed = {"teacher_weights": f"plane2={folder}", "guidance": ("direct",)}
    records = []
    distill_jax.run({**TINY, **changed}, writers=[records.append])
    kinds = [type(one) for one in records if one.stage.network == "plane2"]
    assert kinds == [StageStarted, StageEnded] and not records[0].stage.hyper


def test_a_writer_that_fails_is_warned_of_once_and_the_others_are_told(caplog):
    def down(record):
        raise ConnectionError("no network")

    class Also:
        def __call__(self, record):
            raise ValueError(record.stage.network)

    records = []
    config = {**TINY, "networks": ("plane2",), "guidance": ("none",)}
    with caplog.at_level(logging.WARNING, "distill_jax"):
        rows = distill_jax.run(config, writers=[down, Also(), records.append]).rows
    assert "test_accuracy" in rows[0] and len(records) == 4
    said = [one.getMessage() for one in caplog.records if one.name == "distill_jax"]
    assert len(said) == 2 and "the writer down failed (ConnectionError: no network)" in said[0]
    assert "the writer Also failed (ValueError: plane2)" in said[1]


def test_what_cannot_be_written_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    class Trained(distill_jax.report.Reporter):
        def run_started(self, planned):
            raise AssertionError("it has begun")

    def refused(match, config=TINY, **options):
        with pytest.raises(ConfigError, match=match) as error:
            distill_jax.run(config, reporter=Trained(), **options)
        assert "\n" not in str(error.value)

    refused("writers is a list of functions of one record, got <", writers=print)
    refused(r"writers is a list of functions of one record, got \[3\]", writers=[3])
    asked = {**TINY, "tensorboard": True}
    refused("tensorboard is True and there is no workdir: expected one", asked)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    refused(r"pip install 'distill_jax\[tensorboard\]'", asked, workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    refused("tensorboard", {**TINY, "tensorboard": "yes"}, workdir=tmp_path / "run")


def run_of_docs(number, monkeypatch, name, module):
    """Runs an example of the page with a stand-in for the library that it uses."""
    monkeypatch.setitem(sys.modules, name, module)
    example = re.findall(r"^```python\n(.*?)^```$", DOCS.read_text(), re.DOTALL | re.M)[number]
    body = example.partition("def write(record):\n")[2].partition("\n\n")[0]
    assert f"import {name}" in example and len(body.splitlines()) == 5
    run, rows = distill_jax.run, []

    def kept(config, **options):
        recipe = {**TINY["recipe"], **config["recipe"]}
        rows.extend(run({**TINY, **config, "recipe": recipe}, **options).rows)

    monkeypatch.setattr(distill_jax, "run", kept)
    exec(compile(example, str(DOCS), "exec"), {"__name__": "example"})
    return rows


def test_the_example_for_wandb_logs_each_stage_as_a_run(monkeypatch, caplog):
    runs, finished = {}, []

    def init(*, id, name, config, resume, reinit):
        logged = []
        runs[name] = id, config, logged
        return types.SimpleNamespace(log=logged.append, finish=lambda: finished.append(name))

    (row,) = run_of_docs(0, monkeypatch, "wandb", types.SimpleNamespace(init=init))
    stage_id, config, logged = runs[f"plane2#3-{row['stage']}"]
    assert stage_id == row["stage"] and config["kd_weight"] == 0.5
    assert sorted(runs) == sorted(finished) and len(runs) == 2
    assert len(logged) == 3 and not caplog.records
    assert logged[0]["train_loss"] > 0 and logged[-1]["test_accuracy"] == row["test_accuracy"]


def test_the_example_for_mlflow_logs_each_stage_as_a_run(monkeypatch, caplog):
    runs, open_runs = {}, []

    class Run:
        def __init__(self, run_id, name):
            self.info = types.SimpleNamespace(run_id=run_id or f"id of {name}")
            runs.setdefault(self.info.run_id, ({}, []))

        def __enter__(self):
            open_runs.append(self.info.run_id)
            return self

        def __exit__(self, *error):
            open_runs.pop()

    module = types.SimpleNamespace(
        start_run=lambda *, run_id, run_name: Run(run_id, run_name),
        log_params=lambda params: runs[open_runs[-1]][0].update(params),
        log_metrics=lambda metrics, step=None: runs[open_runs[-1]][1].append((step, metrics)),
    )
    (row,) = run_of_docs(1, monkeypatch, "mlflow", module)
    params, logged = runs[f"id of plane2#3-{row['stage']}"]
    assert params["kd_weight"] == 0.5 and len(runs) == 2
    assert [step for step, _ in logged] == [None, 1, 2, None] and not logged[0][1]
    assert logged[-1][1]["test_accuracy"] == row["test_accuracy"] and not caplog.records
