"""The commands that read a run: show, plan and evaluate; and `load`. One run for all."""

import json
import re

import numpy as np
import pytest

import distill_jax
from distill_jax import data, main, report
from distill_jax.interop.files import save_variables

DATA = {"name": "synthetic:8x8x1:4:96:32", "valid_fraction": 0.25}
CONFIG = {
    "name": "small",
    "dataset": DATA,
    "networks": ("plane4", "plane2"),
    "guidance": ("none", "direct"),
    "recipe": {"epochs": 2, "batch_size": 12},
}
ROW = ("direct", "plane2", 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run, and its results."""
    folder = tmp_path_factory.mktemp("run")
    return folder, distill_jax.run(CONFIG, workdir=folder, progress=False)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run that was stopped in its second stage."""
    folder, asked = tmp_path_factory.mktemp("stopped"), []

    class Second(report.Reporter):
        def stage_started(self, stages, step, steps, histories):
            asked.append(stages[0].network.name)

        def epoch_ended(self, stage, record):
            asked.append(record["epoch"])

    with pytest.raises(KeyboardInterrupt):
        distill_jax.run(
            CONFIG, workdir=folder, reporter=Second(), stop=lambda: len(asked) > 4 and asked[4] == 1
        )
    return folder


def printed(capsys, *arguments):
    """The output of a command that succeeds."""
    assert main.main([str(argument) for argument in arguments]) == 0
    output = capsys.readouterr()
    assert not output.err
    return output.out


# -------------------------------------------------------------------------------------------- show
def test_show_prints_the_table_of_a_run(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = printed(capsys, "show", run[0])
    for row in run[1].rows:
        assert re.search(
            rf"│ {row['guidance']} +│ plane2 .* {100 * row['test_accuracy']:.2f} ", text
        )
    assert "3 of 3 stages are done\n" in text and "to go on" not in text


def test_show_tells_how_far_a_run_is(stopped, capsys):
    text = printed(capsys, "show", stopped)
    assert "1 of 3 stages are done; no run is at work here" in text
    assert re.search(r"  plane4, seed 0: epoch 1 of 2, loss [\d.]+, valid [\d.]+ %", text)
    assert "to go on: " in text and "direct" not in text


# -------------------------------------------------------------------------------------------- plan
def test_show_sends_the_folder_of_a_search_to_the_report(tmp_path, capsys):
    (tmp_path / "search.json").write_text("{}")
    assert main.main(["show", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path} is the folder of a search, which `report` shows" in line


def test_plan_measures_what_is_to_be_trained_and_trains_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    file, folder = tmp_path / "small.py", tmp_path / "run"
    file.write_text(f"def get_config():\n    return {CONFIG!r}\n")
    text = printed(capsys, "plan", f"--config={file}", f"--workdir={folder}")
    assert not folder.exists()
    assert max(map(len, text.splitlines())) <= 80
    lines = [line.split() for line in text.splitlines()]
    (taught,) = (line for line in lines if line[:2] == ["plane2", "plane4"])
    assert taught[2:5] == ["2.80k", "12", "0/1"] and "ms" in taught and "MiB" in text
    assert "3 stages, 3 to be trained" in text and "about " in text


def test_plan_knows_what_a_folder_or_a_store_has(run, stopped, tmp_path, capsys):
    text = printed(capsys, "plan", f"--config={run[0]}", f"--workdir={run[0]}")
    assert "3 stages, 0 to be trained" in text and " ms" not in text
    own = [f"--config={stopped}", "--measure=no"]
    text = printed(capsys, "plan", *own, f"--workdir={stopped}")
    assert "3 stages, 2 to be trained" in text
    assert re.search(r"plane4 +- .* 12 +0/1 *\n.*at [1-9]", text)
    own.append(f"--workdir={tmp_path / 'new'}")
    assert "3 stages, 3 to be trained" in printed(capsys, "plan", *own)
    store = f"--store={run[0] / 'stages'}"
    assert "3 stages, 0 to be trained" in printed(capsys, "plan", *own, store)


# ---------------------------------------------------------------------------------------- evaluate
def evaluated(capsys, *arguments):
    """By split, what the command writes for programs."""
    lines = printed(capsys, "evaluate", *arguments, "--log=json").splitlines()
    return {line["split"]: line for line in map(json.loads, lines)}


def test_evaluate_gives_the_numbers_of_training(run, tmp_path, capsys):
    folder, results = run
    (row,) = (x for x in results.rows if (x["guidance"], x["network"], x["seed"]) == ROW)
    wanted = {"validation": row["valid_accuracy"], "test": row["test_accuracy"]}
    file = tmp_path / "student.npz"
    save_variables(file, results.networks[ROW][1])
    of_a_file = ["--network=plane2", f"--config={folder}"]
    for arguments in (
        [f"--weights={folder}:direct/plane2/0"],
        [f"--weights={folder / 'stages' / ('plane2-' + row['stage'])}"],
        [f"--weights={file}", *of_a_file],
    ):
        lines = evaluated(capsys, *arguments)
        assert {split: line["accuracy"] for split, line in lines.items()} == wanted
        assert lines["test"]["ece"] == pytest.approx(row["ece"])
        assert lines["test"]["examples"] == 32
    loss = results.histories[ROW][row["best_epoch"] - 1]["valid_loss"]
    assert lines["validation"]["cross_entropy"] == pytest.approx(loss)


def test_evaluate_takes_other_data(run, capsys):
    other = "--config.dataset.name=synthetic:8x8x1:4:96:64"
    weights = f"--weights={run[0]}:direct/plane2/0"
    own = ["--config.dataset.mean=(0.5,)", "--config.dataset.std=(0.25,)"]
    assert main.main(["evaluate", weights, f"--config={run[0]}", other, *own]) == 1
    assert "was trained on examples preprocessed by" in capsys.readouterr().err
    mean, std = (f"({x[0]!r},)" for x in data.load(**DATA).normalisation)
    own = [f"--config.dataset.mean={mean}", f"--config.dataset.std={std}"]
    text = printed(capsys, "evaluate", weights, f"--config={run[0]}", other, *own)
    assert re.search(r"│ test +│ +64 │", text)


# -------------------------------------------------------------------------------------------- load
def test_load_gives_what_the_run_gave(run):
    folder, results = run
    loaded = distill_jax.load(folder)
    assert loaded.rows == results.rows and list(loaded.networks) == list(results.networks)
    images = data.load(**DATA).test.images
    np.testing.assert_array_equal(loaded.logits(images, *ROW), results.logits(images, *ROW))
    assert loaded.histories[ROW] == results.histories[ROW]
    with pytest.raises(KeyError, match="direct"):
        loaded.networks["dense", "plane2", 0]


def test_load_takes_a_run_that_is_not_finished(stopped):
    loaded = distill_jax.load(stopped)
    assert (
        [row["guidance"] for row in loaded.rows] == ["none"] == [key[0] for key in loaded.networks]
    )
    with pytest.raises(distill_jax.WorkdirError, match="no folder"):
        distill_jax.load(stopped / "none")


FILE = """
import distill_jax
from flax import linen as nn


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        return nn.Dense(4)(x.reshape(len(x), -1)) {more}


distill_jax.register_network("dense_net", lambda classes, inputs: Net())


def get_config():
    return {{"dataset": {data!r}, "networks": ("dense_net",), "guidance": ("none",),
            "recipe": {{"epochs": 1, "batch_size": 12}}}}
"""


def test_names_that_a_config_file_registers_are_known_again(tmp_path, capsys, monkeypatch):
    from distill_jax.models import registry

    file, folder = tmp_path / "own.py", tmp_path / "run"
    file.write_text(FILE.format(data=DATA, more=""))
    config = distill_jax.load_config(str(file))
    results = distill_jax.run(config, workdir=folder, config_file=str(file), progress=False)
    key = ("none", "dense_net", 0)
    images = data.load(**DATA).test.images

    def forget():
        monkeypatch.delitem(registry._REGISTERED, "dense_net")

    forget()
    loaded = distill_jax.load(folder)
    np.testing.assert_array_equal(loaded.logits(images), results.logits(images))
    forget()
    assert "dense_net" in printed(capsys, "plan", f"--config={folder}", "--measure=no")
    forget()
    file.write_text(FILE.format(data=DATA, more="+ 1"))
    with pytest.raises(distill_jax.WorkdirError, match="trained as another network"):
        distill_jax.load(folder).networks[key]
    forget()
    file.unlink()
    with pytest.raises(distill_jax.ConfigError, match="uses network 'dense_net', registered by"):
        distill_jax.load(folder)
