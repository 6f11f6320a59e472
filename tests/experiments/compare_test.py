"""Methods compared on a pair: paired differences by hand, published figures, one that goes on."""

import json

import pytest

import distill_jax
from distill_jax import resolve
from distill_jax.report.summary import half_width
from experiments.compare import __main__ as command
from experiments.compare import lines, trained
from experiments.compare.settings import PAIRS, SETTINGS

SMALL = ("--pair=plane4:plane2", "--dataset=synthetic:8x8x3:4:64:32", "--epochs=1")


def gave(method, accuracies):
    return trained.Trained(method, "resnet56:resnet20", accuracies, 7, None)


def test_differences_are_of_the_same_seed():
    plain = gave("none", {0: 0.5, 1: 0.6, 2: 0.7})
    kd = gave("kd", {0: 0.6, 1: 0.65, 2: 0.7})
    at = gave("at", {0: 0.62, 1: 0.67})  # a seed is missing
    none, own, other = lines.lines_of([plain, kd, at], {"none": 0.1, "kd": 0.2, "at": 0.4})
    assert (none.over_plain, own.over_kd, none.published) == (None, None, 69.06)
    mean, half = own.over_plain
    assert mean == pytest.approx(5.0)
    assert half == pytest.approx(4.302653 * 5 / 3**0.5)  # t of 2 degrees of freedom, deviation 5
    assert other.over_kd == pytest.approx((2.0, 0.0))
    assert (none.step, other.step, other.seeds, other.adapters) == (0.5, 2.0, 2, 7)
    assert lines.cells(own)[1:5] == ("70.66", "65.00 ± 5.00", "-", "+5.00 ± 12.42")
    assert half_width([1.0]) is None
    unmeasured = lines.lines_of([gave("none", {0: 0.5}), kd], {})[1]
    assert unmeasured.seeds == 3 and lines.cells(unmeasured)[5] == "-"


def test_published_figures_stand_beside_the_same_data_alone():
    """They are accuracies on CIFAR-100, wherever it comes from."""
    both = [gave("none", {0: 0.5}), gave("kd", {0: 0.6})]
    for dataset in ("cifar100", "tfds:cifar100"):
        assert [x.published for x in lines.lines_of(both, {}, dataset)] == [69.06, 70.66]
    assert [x.published for x in lines.lines_of(both, {}, "cifar10")] == [None, None]
    table = lines.rich_table(lines.lines_of(both, {}), "resnet56:resnet20", "cifar10", 0.7)
    assert table.title == "resnet20 taught by resnet56 (70.00 %): test accuracy on cifar10, %"


def test_one_seed_has_neither_deviation_nor_interval_in_the_caption():
    both = [gave("none", {0: 0.5}), gave("kd", {0: 0.6})]
    table = lines.rich_table(lines.lines_of(both, {}), "a:b", "cifar100", None)
    assert table.caption.startswith("1 seed: paired differences, without an interval; step: its")
    both = [gave("none", {0: 0.5, 1: 0.5}), gave("kd", {0: 0.6, 1: 0.7})]
    table = lines.rich_table(lines.lines_of(both, {}), "a:b", "cifar100", None)
    assert table.caption.startswith("2 seeds: mean ± deviation; paired differences ± half of")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (distill_jax.StagesFailed({"a": "step 3 is not finite"}, None), 1, "error: step 3 is not"),
        (distill_jax.OutOfMemoryError("plane2 needs more"), 1, "error: plane2 needs more"),
        (KeyboardInterrupt(), 130, "stopped and saved in "),
    ],
)
def test_what_ends_a_training_is_said_in_a_line(error, code, words, capsys, tmp_path, monkeypatch):
    def run(*arguments, **options):
        raise error

    monkeypatch.setattr(distill_jax, "run", run)
    assert command.main([*SMALL, f"--workdir={tmp_path}", "--methods=kd"]) == code
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith(words)


def test_a_pair_has_its_own_numbers():
    dkd = SETTINGS["dkd"]
    assert dkd.of_pair("resnet56:resnet20").options == {"dkd": {"beta": 2.0}}
    assert dkd.of_pair("resnet20:resnet8").options == {"dkd": {"beta": 8.0}}
    assert SETTINGS["reviewkd"].of_pair("resnet110:resnet32").methods["reviewkd"] == 1.0
    assert dkd.figure("vgg13:vgg8") == 74.68 and dkd.figure("resnet20:resnet8") is None
    assert SETTINGS["ctkd"].figure("vgg13:vgg8") is None


@pytest.mark.parametrize("pair", PAIRS)
def test_every_setting_is_a_config_with_the_fields_recipe(pair):
    given = command.arguments([f"--pair={pair}", f"--methods={','.join(SETTINGS)}"])
    for name in given.methods:
        experiment = resolve(trained.config_of(name, given))
        recipe = experiment.recipe_of(pair.split(":")[1])
        assert (recipe.epochs, recipe.batch_size, recipe.augment) == (240, 64, "crop_flip")
        assert recipe.optim.milestones == (150 / 240, 180 / 240, 210 / 240)
        assert (recipe.optim.learning_rate, recipe.optim.weight_decay) == (0.05, 5e-4)
        assert recipe.selection == "last" and experiment.seed_of(pair.split(":")[0], 4) == 0


def test_images_can_be_left_as_they_are():
    given = command.arguments(["--augment=none"])
    assert resolve(trained.config_of("kd", given)).recipe_of("resnet20").augment == "none"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--methods=kd,xd", "--methods: 'xd' is none of none, kd, dkd"),
        ("--seeds=0", "--seeds is at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused(argument, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main([argument])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("pair", ["plane4", "plane4:", "plane4:plane3x"])
def test_wrong_pairs_are_refused(pair, capsys, tmp_path):
    assert command.main([f"--pair={pair}", f"--workdir={tmp_path / 'run'}", *SMALL[1:]]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "run").exists()


def test_the_command_trains_the_teacher_once_and_goes_on(tmp_path, capsys):
    arguments = [*SMALL, f"--workdir={tmp_path}", "--batch_size=16"]
    assert command.main([*arguments, "--methods=kd", "--seeds=1", "--rounds=0"]) == 0
    first = json.loads((tmp_path / "compare.json").read_text())
    stages = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    assert len(stages) == 3  # the teacher, the student alone, the student by KD
    capsys.readouterr()
    assert command.main([*arguments, "--methods=fitnet", "--seeds=2"]) == 0
    printed = capsys.readouterr().out
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    assert len(again) == 3 + 2 + 2 and stages.items() <= again.items()
    found = json.loads((tmp_path / "compare.json").read_text())
    for method, by_seed in first["accuracies"].items():
        assert found["accuracies"][method]["0"] == by_seed["0"]
    assert first["step_seconds"] == {} and first["lines"][1]["step"] is None
    assert set(found["step_seconds"]) == {"none", "kd", "fitnet"}
    adapters = {line["method"]: line["adapters"] for line in found["lines"]}
    assert adapters["kd"] == 0 and adapters["fitnet"] > 0
    table = printed.partition("plane2 taught by plane4 (")[2].splitlines()
    assert any("fitnet" in line for line in table)
    assert all(len(line.rstrip()) <= 80 for line in table)
    assert (tmp_path / "compare.md").read_text().count("\n") == 2 + 3
