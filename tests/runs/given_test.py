"""Networks of earlier runs as teachers, and stages that working directories share."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import distill_jax
from distill_jax import main
from distill_jax.runs.config import ConfigError
from distill_jax.runs.workdir import WorkdirError
from distill_jax.train.reporter import Reporter

BASE = {
    "dataset": {"name": "synthetic:8x8x1:4:48:32", "valid_fraction": 0.25},
    "networks": ("plane4", "plane2"),
    "guidance": ("direct",),
    "recipe": {"epochs": 1, "batch_size": 12},
}


class Trained(Reporter):
    """The networks that were trained."""

    def __init__(self):
        self.names = []

    def stage_started(self, stages, step, steps, histories):
        """Kept."""
        self.names += [stage.network.name for stage in stages]


def run(workdir=None, store=None, **changes):
    trained = Trained()
    results = distill_jax.run({**BASE, **changes}, workdir=workdir, store=store, reporter=trained)
    return results, trained.names


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    results, _ = run(folder, guidance=("none", "direct"), students=("plane4", "plane2"))
    return folder, results


@pytest.mark.parametrize("form", ["row", "folder"])
def test_a_network_of_an_earlier_run_teaches_as_the_one_it_was(first, form):
    folder, before = first
    (stage,) = folder.glob("stages/plane4-*")
    source = f"{folder}:none/plane4/0" if form == "row" else str(stage)
    results, names = run(teacher_weights=f"plane4={source}")
    assert names == ["plane2"]
    _, expected = before.networks["direct", "plane2", 0]
    _, variables = results.networks["direct", "plane2", 0]
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(a, b)


def test_weights_that_were_given_are_in_no_folder_of_the_run(first, tmp_path, capsys):
    given = {"teacher_weights": f"plane4={first[0]}:none/plane4/0"}
    run(tmp_path / "run", students=("plane4", "plane2"), **given)
    loaded = distill_jax.load(tmp_path / "run")
    words = r"\('direct', 'plane4', 0\) has weights that were given, which the run does not keep"
    with pytest.raises(WorkdirError, match=words):
        _ = loaded.networks["direct", "plane4", 0]
    assert loaded.histories["direct", "plane4", 0] == []
    assert main.main(["export", str(tmp_path / "run"), "direct", "--network=plane4"]) == 1
    assert "has weights that were given" in capsys.readouterr().err
    assert main.main(["evaluate", f"--weights={tmp_path / 'run'}:direct/plane4/0"]) == 1
    assert "was given the weights of direct/plane4/0 and does not" in capsys.readouterr().err
    assert loaded.networks["direct", "plane2", 0][0].name == "plane2"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{folder}:none/plane4/7", "has no result 'none/plane4/7': expected GUIDANCE/NETWORK/SEED"),
        ("{folder}", "is a folder: expected a file, a stage's folder"),
        ("{folder}:none/plane2/0", "is no plane4 of these classes"),
        ("{folder}/nothing", "does not exist"),
    ],
)
def test_what_is_no_network_of_an_earlier_run_is_refused(first, source, message):
    with pytest.raises(ConfigError) as caught:
        run(teacher_weights=source.format(folder=first[0]))
    assert message in str(caught.value)
    # What is whole and another network's is not to be removed.
    assert "remove it" not in str(caught.value) and "training" not in str(caught.value)


def test_a_network_that_is_damaged_is_not_said_to_be_another(first, tmp_path):
    (stage,) = first[0].glob("stages/plane4-*")
    damaged = shutil.copytree(stage, tmp_path / "plane4-damaged")
    for file in damaged.glob("weights/arrays/**/d/*"):
        file.write_bytes(b"0")
    with pytest.raises(ConfigError, match="damaged") as caught:
        run(teacher_weights=f"plane4={damaged}")
    assert "of these classes" not in str(caught.value)


def test_a_network_that_saw_images_normalised_otherwise_is_refused(first):
    dataset = {**BASE["dataset"], "mean": (0.1,), "std": (0.9,)}
    with pytest.raises(ConfigError, match="was trained on examples preprocessed by"):
        run(teacher_weights=f"{first[0]}:none/plane4/0", dataset=dataset)


def test_names_of_files_may_hold_commas_and_equals_signs(first, tmp_path):
    (stage,) = first[0].glob("stages/plane4-*")
    odd = tmp_path / "a=b,c=d"
    shutil.copytree(stage, odd)
    for text in (f"plane4={odd}", str(odd)):
        assert run(teacher_weights=text)[1] == ["plane2"]


def test_another_directory_finds_in_a_store_what_was_trained(tmp_path):
    store = tmp_path / "store"
    one, names = run(tmp_path / "one", store)
    assert names == ["plane4", "plane2"] and len(list(store.iterdir())) == 2
    other, names = run(tmp_path / "other", store, recipe={**BASE["recipe"], "kd_weight": 0.9})
    assert names == ["plane2"] and len(list(store.iterdir())) == 3
    shutil.rmtree(store)  # what a directory has taken is its own
    again, names = run(tmp_path / "other", recipe={**BASE["recipe"], "kd_weight": 0.9})
    assert names == [] and again.rows == other.rows
    files = [json.loads((tmp_path / x / "results.json").read_text()) for x in ("one", "other")]
    assert files[0] != files[1]
    with pytest.raises(WorkdirError, match="expected one besides"):
        run(None, store)


@pytest.mark.parametrize("damage", ["cut short", "missing"])
def test_a_damaged_stage_of_a_store_is_trained_again_and_replaced(tmp_path, damage):
    store = tmp_path / "store"
    before, _ = run(tmp_path / "one", store)
    (weights,) = store.glob("plane4-*/weights")
    if damage == "missing":
        shutil.rmtree(weights)
    else:
        for path in filter(Path.is_file, weights.rglob("*")):
            path.write_bytes(path.read_bytes()[:5])
    after, names = run(tmp_path / "other", store)
    assert names == ["plane4"]
    assert after.rows[0]["state_digest"] == before.rows[0]["state_digest"]
    again, names = run(tmp_path / "third", store)
    assert names == [] and again.rows[0]["state_digest"] == before.rows[0]["state_digest"]
    assert len(list(store.iterdir())) == 2


def test_a_home_is_where_a_tilde_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run("~/runs", guidance=("none",))
    assert (tmp_path / "runs" / "results.json").exists()
    results, names = run(
        networks=("plane2", "plane2#2"), teacher_weights="plane2=~/runs:none/plane2/0"
    )
    assert names == ["plane2#2"] and results.rows[0]["teachers"] == ["plane2"]


@pytest.mark.parametrize("workdir", ["gs://bucket/run", "s3://bucket"])
def test_a_url_is_no_working_directory(workdir):
    with pytest.raises(WorkdirError, match="is a URL"):
        run(workdir)


def test_a_store_gives_no_metric_of_other_code_or_that_is_not_asked_for(tmp_path):
    plain = distill_jax.data.load(**BASE["dataset"])

    def run(folder, value, store=tmp_path / "store", seeds=(0,)):
        metrics = {} if value is None else {"mine": lambda logits, labels: (value, 1.0)}
        dataset = dataclasses.replace(plain, metrics=metrics)
        trained, config = Trained(), {**BASE, "seeds": seeds}
        results = distill_jax.run(
            config, workdir=tmp_path / folder, store=store, dataset=dataset, reporter=trained
        )
        return results, trained.names

    run("one", 1.0)
    other, names = run("other", 2.0)
    (row,) = other.rows
    assert names == [] and (row["test_mine"], row["valid_mine"]) == (2.0, 2.0)
    assert all("valid_mine" not in epoch for epoch in other.histories["direct", "plane2", 0])
    again, _ = run("one", 1.0)
    assert again.rows[0]["test_mine"] == 1.0
    without, names = run("one", None, seeds=(0, 1))
    assert names == ["plane4", "plane2"] and "test_mine" not in without.rows[0]
    assert without.table().summary[0]["metrics"] == {}
