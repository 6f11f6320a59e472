"""The search: what it refuses, that it goes on, and that its winner is trained again to the bit."""

import json
import os
import signal
import sys

import pytest

from distill_jax import data, main
from distill_jax.runs.config import default_config, load_config, resolve
from distill_jax.train.fit import Interrupted
from experiments.search import __main__ as command
from experiments.search import record, setup, space, trained

CONFIG = """
from distill_jax import default_config


def get_config():
    config = default_config()
    config.name = "small"
    config.networks, config.guidance = ("plane4", "plane2"), ("none", "direct")
    config.dataset.update(name="synthetic:8x8x1:4:96:32", valid_fraction=0.25)
    config.recipe.update(epochs=2, batch_size=12)
    return config
"""
KD = '{"kd_weight": [0.05, 1.0], "temperature": [1, 2, 5]}'


@pytest.fixture
def config(tmp_path):
    """The path of a small config's file."""
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return path


def search(config, workdir, text, *more):
    """The exit code of the command."""
    arguments = [f"--config={config}", f"--space={text}", f"--workdir={workdir}", *more]
    return command.main(arguments)


def found(workdir):
    """What is written of a search."""
    return json.loads((workdir / "search.json").read_text())


def points(workdir):
    return [trial["point"] for trial in found(workdir)["trials"]]


def best(workdir):
    """The accuracy of the best trial."""
    by_number = {x["trial"]: x for x in found(workdir)["trials"]}
    return by_number[found(workdir)["best"]]["accuracy"]


@pytest.fixture
def made_up(monkeypatch):
    """Trials that are not trained: their accuracy is 1 - kd_weight, and they are counted."""
    calls = []

    def train(fields, points, folder, *, stop, watch=None, **others):
        calls.append(points)
        return [trained.Outcome({0: 1.0 - point["kd_weight"]}) for point in points]

    monkeypatch.setattr(trained, "train", train)
    return calls


# -------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the search needs --space={field: [0.05, 1.0] (a range of two floats)"),
        ("{kd", "--space is a literal of Python or JSON, got '{kd'"),
        ("[1]", "--space is a dict of fields"),
        ('{"kd_wieght": [1, 2]}', "unknown 'kd_wieght'; did you mean 'kd_weight'?"),
        ('{"loss.teacher": ["mean"]}', "unknown 'loss.teacher'; did you mean 'loss.teachers'?"),
        ('{"kd_weight": []}', "kd_weight has one choice or more, got []"),
        ('{"kd_weight": [1, 1.0, 0]}', "the choices of kd_weight are all different"),
        ('{"kd_weight": [0.9, 0.1]}', "kd_weight goes from low to high, got 0.9 to 0.1"),
        ('{"kd_weight": [0.5, 0.5]}', "kd_weight goes from low to high, got 0.5 to 0.5"),
        ('{"kd_weight": [0.1, 2.0]}', "--space: kd_weight=2.0: kd_weight is between 0 and 1"),
        ('{"kd_weight": [0.1, "x"]}', "sweep.kd_weight is a float, got 'x'"),
        ('{"kd_weight": [NaN, 1.0]}', "kd_weight goes from a number to a number, got nan, 1.0"),
        ('{"kd_weight": {"low": 0.0, "high": 1.0, "log": true}}', "so low above 0, got 0.0"),
        ('{"kd_weight": {"low": 0.1}}', "kd_weight is [0.05, 1.0] (a range of two floats)"),
        ('{"epochs": [1.0, 2.0]}', "--space: epochs=1.0: sweep.epochs is a int, got 1.0"),
        ('{"batch_size": [12, 1000]}', "batch_size=1000: batch_size 1000 is larger than"),
        ('{"survival": [0.5, 1.0]}', "survival makes no difference to guidance direct"),
        ('{"guidance": ["none"], "kd_weight": [0.1, 0.5]}', "no difference to guidance none"),
        ('{"kd_weight": [0, 1], "recipe.kd_weight": [0, 1]}', "--space names a field twice"),
        ('{"seeds": [0, 1]}', "seeds is the same in all trials"),
        ('{"dataset.name": ["digits"]}', "dataset.name is the same in all trials"),
        ('{"protocol": ["official", "paper"]}', "selection is test, so that the test set decides"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_in_a_line(
    text, message, config, tmp_path, capsys
):
    assert search(config, tmp_path / "search", text) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "search").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--trials=0"], "--trials is a whole number from 1 on, got '0'"),
        (["--at_once=two"], "--at_once is a whole number from 1 on, got 'two'"),
        (["--sampler=cma"], "value should be one of <tpe|grid|random>"),
        (["--sampler=grid"], "--sampler=grid needs choices, and kd_weight is a range"),
        (["--config.dataset.valid_fraction=0.0"], "expected dataset.valid_fraction above 0"),
        (["--config.selection=test"], "the test set decides what the search sees"),
        (["--config.sweep={'epochs': (1, 2)}"], "expected none, as --space says it"),
        (["--config.recipe.epoch=1"], "--config has no such field"),
    ],
)
def test_arguments_that_cannot_be_are_refused_in_a_line(more, message, config, tmp_path, capsys):
    assert search(config, tmp_path / "search", KD, *more) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "search").exists()


def test_without_optuna_it_says_what_to_install(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert search(config, tmp_path / "search", KD) == 1
    message = "error: the search needs optuna: pip install -e '.[search]'\n"
    assert capsys.readouterr().err == message


def test_help_fits_a_terminal(capsys):
    assert command.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "python -m experiments.search --config=CONFIG" in text and "--pruner" in text
    assert max(map(len, text.splitlines())) <= 80


def test_folders_and_records_that_are_not_its_own_are_refused(config, tmp_path, capsys, made_up):
    workdir = tmp_path / "search"
    workdir.mkdir()
    (workdir / "notes").touch()
    assert search(config, workdir, KD) == 1
    assert "holds notes and no search.db" in capsys.readouterr().err
    (workdir / "notes").rename(workdir / "search.db")
    (workdir / "search.db").write_text("no database")
    assert search(config, workdir, KD) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{workdir / 'search.db'} cannot be used as the database of a search" in line
    assert not made_up


@pytest.mark.parametrize(
    ("text", "more", "difference"),
    [
        (KD.replace("1.0", "0.9"), (), "space.kd_weight.high is 1.0 there and 0.9 here"),
        (KD, ("--config.recipe.epochs=3",), "config.recipe.epochs is 2 there and 3 here"),
        (KD, ("--config.seeds=0,1",), "config.seeds is [0] there and [0, 1] here"),
        (KD, ("--config.dataset.split_seed=1",), "config.dataset.split_seed is 0 there"),
    ],
)
def test_another_search_is_refused_by_what_differs(
    text, more, difference, config, tmp_path, capsys, made_up
):
    assert search(config, tmp_path / "search", KD, "--trials=1") == 0
    capsys.readouterr()
    assert search(config, tmp_path / "search", text, "--trials=2", *more) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds another search" in line and difference in line
    assert len(made_up) == 1
    same = ("--config.devices=1", "--config.name=other", "--sampler=random")
    assert search(config, tmp_path / "search", KD, "--trials=2", *same) == 0


# ---------------------------------------------------------------------------- spaces and samplers
def test_the_forms_of_a_space():
    fields, line = space.base_of(default_config())
    assert line == "searched is guidance dense; left out: none, direct, chain"
    fields["method_options"] = {"fitnet": {"hint_layer": 1}}
    text = (
        '{"kd_weight": [0.05, 1.0], "epochs": {"low": 2, "high": 4}, "temperature": [1, 2],'
        ' "learning_rate": {"low": 1e-4, "high": 1e-1, "log": true}, "methods.kd": {"choices":'
        ' [0.5, 2.0]}, "loss.standardise": [true, false], "overrides.plane2.momentum": [0.0, 0.9],'
        ' "method_options.fitnet.hint_layer": [1, 0], "milestones": [[0.5], [0.5, 0.75]]}'
    )
    dataset = data.load("synthetic:8x8x1:4:960:32")
    found = space.parse(text, fields, dataset)
    assert found["kd_weight"] == space.Dimension((), 0.05, 1.0)
    assert found["epochs"] == space.Dimension((), 2, 4)
    assert found["learning_rate"].log and found["methods.kd"].choices == (0.5, 2.0)
    assert not space.all_swept(found, fields)
    point = {name: dimension.ends[-1] for name, dimension in found.items()}
    experiment = resolve(space.config_of(fields, [point]))
    (comparison,) = experiment.comparisons
    swept = {"kd_weight": 1.0, "epochs": 4, "temperature": 2.0, "learning_rate": 0.1}
    assert dict(comparison.changes) == {**swept, "methods.kd": 2.0, "milestones": (0.5, 0.75)}
    assert experiment.overrides["plane2"] == {"momentum": 0.9}
    assert experiment.method_options == {"fitnet": {"hint_layer": 0}}
    assert fields["overrides"] == {} and fields["method_options"]["fitnet"]["hint_layer"] == 1
    # Teachers are those of the config: what is swept concerns the taught alone.
    assert experiment.recipe["temperature"] == 4.0


def test_a_search_that_is_continued_asks_for_what_one_at_a_time_would(config, tmp_path, made_up):
    for trials in (4, 12, 14):
        assert search(config, tmp_path / "often", KD, f"--trials={trials}") == 0
    assert search(config, tmp_path / "once", KD, "--trials=14") == 0
    assert len(made_up) == 28 and points(tmp_path / "often") == points(tmp_path / "once")
    values = [point["kd_weight"] for point in points(tmp_path / "once")]
    assert len(set(values)) == 14 and all(0.05 <= value <= 1.0 for value in values)
    assert found(tmp_path / "once")["best"] == values.index(min(values))
    assert search(config, tmp_path / "other", KD, "--trials=3", "--seed=5") == 0
    assert points(tmp_path / "other") != points(tmp_path / "once")[:3]


def test_the_sampler_learns_where_accuracies_are_high(config, tmp_path, made_up):
    assert search(config, tmp_path / "tpe", KD, "--trials=30") == 0
    values = [point["kd_weight"] for point in points(tmp_path / "tpe")]
    assert sum(values[10:]) / 20 < sum(values[:10]) / 10 - 0.1


def test_a_grid_has_each_of_its_points_once(config, tmp_path, made_up, capsys):
    grid = '{"kd_weight": [0, 0.5, 1], "temperature": [1, 2]}'
    assert search(config, tmp_path, grid, "--sampler=grid", "--trials=4") == 1  # another's folder
    workdir = tmp_path / "grid"
    assert search(config, workdir, grid, "--sampler=grid", "--trials=4") == 0
    assert search(config, workdir, grid, "--sampler=grid", "--trials=50") == 0
    assert "the grid has 6 points, so that there are no more trials" in capsys.readouterr().out
    expected = [{"kd_weight": k, "temperature": t} for k in (0, 0.5, 1) for t in (1, 2)]
    assert points(workdir) == expected


def test_a_killed_trial_is_tried_again(config, tmp_path, monkeypatch, capsys, made_up):
    train = trained.train

    def die(*arguments, **others):
        raise KeyboardInterrupt("as a kill does")

    assert search(config, tmp_path / "search", KD, "--trials=1") == 0
    monkeypatch.setattr(trained, "train", die)
    with pytest.raises(KeyboardInterrupt):
        search(config, tmp_path / "search", KD, "--trials=3")
    assert len(found(tmp_path / "search")["trials"]) == 1
    monkeypatch.setattr(trained, "train", train)
    assert search(config, tmp_path / "search", KD, "--trials=3") == 0
    assert search(config, tmp_path / "whole", KD, "--trials=3") == 0
    assert points(tmp_path / "search") == points(tmp_path / "whole")
    numbers = [trial["trial"] for trial in found(tmp_path / "search")["trials"]]
    assert numbers == [0, 2, 3]  # 1 was lost


def test_a_signal_saves_and_the_same_command_goes_on(
    config, tmp_path, monkeypatch, capsys, made_up
):
    train = trained.train

    def stopped(*arguments, stop, **others):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        raise Interrupted

    monkeypatch.setattr(trained, "train", stopped)
    assert search(config, tmp_path / "search", KD, "--trials=2") == 128 + signal.SIGTERM
    assert "the same command goes on from there" in capsys.readouterr().out
    monkeypatch.setattr(trained, "train", train)
    assert search(config, tmp_path / "search", KD, "--trials=2") == 0
    assert search(config, tmp_path / "whole", KD, "--trials=2") == 0
    assert points(tmp_path / "search") == points(tmp_path / "whole")


def test_the_winner_knows_the_names_that_its_config_registers(config, tmp_path, made_up, capsys):
    register = (
        'register_network("mine", lambda classes, inputs: nn.Sequential([lambda x: x.reshape('
    )
    register += "len(x), -1), nn.Dense(classes)]))"
    text = CONFIG.replace('"plane2"', '"mine"').replace("import ", "import register_network, ")
    text = text.replace("\n\n\n", f"\nfrom flax import linen as nn\n\n{register}\n\n\n")
    config.write_text(text)
    assert search(config, tmp_path / "search", KD, "--trials=2") == 0
    winner = (tmp_path / "search" / "best.py").read_text()
    assert f"load_config({str(config)!r})" in winner
    assert load_config(str(tmp_path / "search" / "best.py")).networks == ("plane4", "mine")


def test_the_table_fits_a_terminal_and_names_the_best(
    config, tmp_path, made_up, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    wide = '{"kd_weight": [0.05, 1.0], "learning_rate": {"low": 1e-4, "high": 0.1, "log": true}, '
    wide += '"augment": ["none", "flip", "crop_flip"], "loss.standardise": [true, false]}'
    assert search(config, tmp_path / "search", wide, "--trials=30") == 0
    printed = capsys.readouterr().out
    table = printed.partition("Validation accuracy of plane2 under direct")[2]
    lines = table.partition("best: ")[0].splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert "the 24 best of 30; all are in search.json" in table
    assert f"{100 * best(tmp_path / 'search'):.2f} %" in table.partition("best: ")[2]


def test_what_cannot_be_trained_is_a_trial_without_accuracy(config, tmp_path, monkeypatch, capsys):
    outcomes = [trained.Outcome(failed="step 3 is not finite"), trained.Outcome({0: 0.5, 1: 0.7})]
    monkeypatch.setattr(trained, "train", lambda *a, **b: [outcomes.pop(0)])
    assert search(config, tmp_path / "search", KD, "--trials=1") == 1
    assert "no trial could be trained to the end" in capsys.readouterr().err
    assert search(config, tmp_path / "search", KD, "--trials=2") == 0
    lost, done = found(tmp_path / "search")["trials"]
    assert (lost["state"], lost["failed"], lost["accuracy"]) == (
        "failed",
        "step 3 is not finite",
        None,
    )
    assert done["accuracy"] == pytest.approx(0.6) and done["accuracies"] == {"0": 0.5, "1": 0.7}


# --------------------------------------------------------------------------------- what is trained
def again(workdir, tmp_path, *more):
    """The validation accuracies of the winner's config, trained by the command."""
    arguments = [f"--config={workdir / 'best.py'}", f"--workdir={tmp_path / 'again'}", *more]
    assert main.main(["train", *arguments]) == 0
    rows = json.loads((tmp_path / "again" / "results.json").read_text())
    return {str(row["seed"]): row["valid_accuracy"] for row in rows}


def test_the_winner_is_a_config_that_gives_the_same_accuracy(config, tmp_path, capsys):
    workdir = tmp_path / "search"
    more = ("--config.seeds=0,1", "--config.devices=1", "--pruner=median")
    assert search(config, workdir, KD, "--trials=2", *more) == 0
    trials = found(workdir)["trials"]
    assert [trial["state"] for trial in trials] == ["complete", "complete"]
    stages = sorted(path.name.partition("-")[0] for path in (workdir / "store").iterdir())
    assert stages == ["plane2"] * 4 + ["plane4"] * 2  # teachers once a seed
    (winner,) = (x for x in trials if x["trial"] == found(workdir)["best"])
    assert winner["accuracy"] == sum(winner["accuracies"].values()) / 2 == best(workdir)
    loaded = load_config(str(workdir / "best.py"))
    assert dict(loaded.sweep) == winner["point"] and loaded.guidance == ("direct",)
    assert again(workdir, tmp_path) == winner["accuracies"]
    row = json.loads((workdir / winner["folder"] / "results.json").read_text())[0]
    assert winner["accuracies"]["0"] == row["valid_accuracy"] != row["test_accuracy"]


def test_trials_that_are_trained_at_once_are_those_trained_alone(config, tmp_path, capsys):
    grid = '{"kd_weight": [0, 0.9], "temperature": [1, 5]}'
    more = ("--config.devices=1", "--sampler=grid", "--trials=3")
    assert search(config, tmp_path / "alone", grid, *more) == 0
    assert search(config, tmp_path / "at_once", grid, *more, "--at_once=3") == 0
    one, other = (found(tmp_path / name)["trials"] for name in ("alone", "at_once"))
    assert [x["accuracies"] for x in one] == [x["accuracies"] for x in other]
    assert len({x["folder"] for x in one}) == 3 and len({x["folder"] for x in other}) == 1
    text = (tmp_path / "at_once" / "trials").iterdir()
    assert json.loads((next(text) / "config.json").read_text())["population"] == 3
    path = '{"recipe.kd_weight": [0.1, 0.9]}'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained, "train", lambda f, points, *a, **b: [trained.Outcome({0: 0.5})])
        assert search(config, tmp_path / "path", path, "--at_once=2", "--trials=2") == 0
    assert "are trained one after the other" in capsys.readouterr().out


def test_a_trial_that_is_worse_than_half_of_the_others_is_ended(config, tmp_path, capsys):
    rate = '{"learning_rate": [0.05, 0.05001, 0.05002, 0.05003, 0.05004, 1e-6]}'
    more = ("--sampler=grid", "--pruner=median", "--config.devices=1", "--config.recipe.epochs=3")
    assert search(config, tmp_path / "search", rate, "--trials=6", *more) == 0
    states = [trial["state"] for trial in found(tmp_path / "search")["trials"]]
    assert states[-1] == "pruned" and states[:5].count("complete") == 5
    last = found(tmp_path / "search")["trials"][-1]
    assert 0.0 < last["accuracy"] < best(tmp_path / "search")
    assert "pruned" in capsys.readouterr().out


def test_what_differs_between_trials_is_not_said_of_all(config):
    """Guidances and networks may be searched; each trial has a last network of its own."""
    networks = [["plane4", "plane2"], ["plane6", "plane4"]]
    text = json.dumps({"guidance": ["direct", "chain"], "networks": networks})
    options = setup.Options(trials=1, at_once=1, seed=0, sampler="tpe", pruner="median")
    search = setup.prepared(load_config(str(config)), text, options)
    assert search.about["guidance"] == "direct or chain"
    assert search.about["network"] == "plane2 or plane4"
    points = [{"guidance": "chain", "networks": x} for x in search.space["networks"].choices]
    assert [trained.network_of(search.fields, point) for point in points] == ["plane2", "plane4"]
    about = {"trial": 0, "trials": 1, "accuracy": 0.5}
    assert "its last network is plane4" in record.best_config(search.fields, points[1], about)
    one = setup.prepared(load_config(str(config)), KD, options)
    assert (one.about["guidance"], one.about["network"]) == ("direct", "plane2")
