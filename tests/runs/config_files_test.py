"""Configs by the names of their files, and as runs record them."""

import json
import pathlib

import numpy as np
import pytest

import distill_jax
from distill_jax import main
from distill_jax.runs.config import fields_of, find_config

ROOT = pathlib.Path(distill_jax.__file__).parents[1]
SMALL = {
    "name": "recorded",
    "dataset": {"name": "synthetic:8x8x1:4:96:32", "valid_fraction": 0.25},
    "networks": ("plane4", "plane2"),
    "guidance": ("none",),
    "recipe": {"epochs": 1, "batch_size": 12},
}


def test_the_configs_of_the_package_go_by_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # from any folder
    names = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    assert len(names) >= 9
    for name in names:
        assert find_config(name).path == ROOT / "configs" / f"{name}.py"
        assert distill_jax.load_config(f"{name}:smoke").name.endswith("-smoke")
    assert distill_jax.load_config("takd_plain:cifar100").dataset.name == "cifar100"


def test_a_file_with_a_colon_in_its_name_is_that_file(tmp_path):
    file = tmp_path / "a:b.py"
    file.write_text("get_config = lambda: {'name': 'colon'}")
    assert distill_jax.load_config(str(file)).name == "colon"
    file.write_text("get_config = lambda which='': {'name': which}")
    assert distill_jax.load_config(f"{tmp_path / 'a:b.py'}").name == ""


FULL = {
    **SMALL,
    "guidance": ("none", "chain", [[0, 0], [1, 1]], np.tril(np.ones((2, 2)), -1)),
    "students": ("plane2",),
    "seeds": (0, 3),
    "recipe": {"epochs": 2, "learning_rate": 0.1, "milestones": (0.25,), "frozen": ("conv1.*",)},
    "methods": {"kd": 0.5, "fitnet": 100.0},
    "method_options": {"fitnet": {"hint_layer": 1}},
    "phases": ({"methods": {"fitnet": 1.0, "ce": 0.0}, "trainable": ("conv1.*", "layer1.*")},),
    "overrides": {"plane4": {"epochs": 1, "seed": 7}},
    "controls": {"longer": {"epochs": 4}},
    "sweep": {"kd_weight": (0.1, 0.9), "methods.fitnet": (1.0, 10.0)},
    "dropping": {"teacher_droppable": True},
}


def as_json(value):
    """As JSON has it: lists for tuples and arrays."""
    return json.loads(json.dumps(value, default=lambda x: x.tolist()))


@pytest.mark.parametrize("config", [SMALL, FULL], ids=["small", "full"])
def test_a_recorded_config_is_the_config(config, tmp_path):
    from distill_jax.runs.prepare import Prepared

    recorded = Prepared(None, None, None, {}, {"registered": {}}).recorded(fields_of(config))
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    for text in (str(tmp_path), str(tmp_path / "config.json")):
        loaded = distill_jax.load_config(text)
        assert as_json(fields_of(loaded)) == as_json(fields_of(config))
        one, other = distill_jax.resolve(loaded), distill_jax.resolve(config)
        assert one.comparisons == other.comparisons and one.recipe == other.recipe
        assert (one.phases, one.overrides) == (other.phases, other.overrides)


def test_a_run_goes_on_by_the_config_that_it_recorded(tmp_path, capsys):
    file, folder = tmp_path / "small.py", tmp_path / "run"
    file.write_text(f"def get_config():\n    return {SMALL!r}\n")
    distill_jax.run(
        distill_jax.load_config(str(file)), workdir=folder, config_file=str(file), progress=False
    )
    first = json.loads((folder / "run.json").read_text())
    assert first["config_file"] == str(file) and first["earlier"] == []
    assert first["jax"] == __import__("jax").__version__ and first["command"]
    assert [stage["guidance"] for stage in first["stages"]] == [["none"]]
    rows = json.loads((folder / "results.json").read_text())
    # The rate of the network's family, now given: the same experiment.
    given = [f"--config={folder}", f"--workdir={folder}", "--config.recipe.learning_rate=0.01"]
    assert main.main(["train", *given]) == 0
    assert "epochs," not in capsys.readouterr().out  # nothing was trained
    assert json.loads((folder / "results.json").read_text()) == rows
    second = json.loads((folder / "run.json").read_text())
    assert second["config_file"] == str(folder / "config.json")
    assert second["earlier"] == [{k: v for k, v in first.items() if k not in ("stages", "earlier")}]
    assert main.main(["train", *given[:2], "--config.recipe.learning_rate=0.02"]) == 1
    assert "learning_rates.plane2 is 0.01 there and 0.02 here" in capsys.readouterr().err
