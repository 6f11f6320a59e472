"""The table of fields, the config that is built from it, and its help."""

import dataclasses
import shlex

import pytest
from absl import flags
from ml_collections import config_flags

from distill_jax.methods import TESKD, LossOptions
from distill_jax.runs.config import FIELDS, default_config, fields_help
from distill_jax.runs.config.help import default_text
from distill_jax.train.dropping import Dropping
from distill_jax.train.optim import OptimOptions
from distill_jax.train.stage import Recipe

OPTIONS = {
    "recipe": (Recipe, OptimOptions),
    "loss": (LossOptions,),
    "dropping": (Dropping,),
    "evolve": (TESKD,),
}
ELSEWHERE = {  # what of a recipe stands elsewhere in the config
    "recipe": {"selection", "survival", "dropping", "optim"},
    "dropping": {"survival"},
}
BY_PATH = {field.path: field for field in FIELDS}


@pytest.mark.parametrize("section", OPTIONS)
def test_a_section_has_every_option_of_what_it_describes(section):
    named = {field.path.rpartition(".")[2] for field in FIELDS if field.section == section}
    options = {field.name for kind in OPTIONS[section] for field in dataclasses.fields(kind)}
    assert named ^ options == ELSEWHERE.get(section, set())


def test_every_field_is_there_once_and_in_every_config():
    assert len(BY_PATH) == len(FIELDS)
    leaves = {
        f"{name}.{inner}" if name not in BY_PATH else name
        for name, value in default_config().to_dict().items()
        for inner in (value if isinstance(value, dict) and name not in BY_PATH else [""])
    }
    assert leaves == set(BY_PATH)


def test_a_changed_config_leaves_the_defaults_alone():
    config = default_config()
    config.methods["fitnet"] = 1.0
    config.overrides["plane6"] = {"epochs": 1}
    config.recipe.learning_rate = 0.3
    assert (
        default_config().to_dict()["methods"]
        == BY_PATH["methods"].default
        == {
            "kd": 1.0,
            "dml": 1.0,
        }
    )
    assert default_config().overrides.to_dict() == BY_PATH["overrides"].default == {}
    assert default_config().recipe.learning_rate is None


def given(monkeypatch, argument):
    """The config under one argument of a command line."""
    values = flags.FlagValues()
    monkeypatch.setattr("sys.argv", ["command", argument])  # ml_collections looks there
    config_flags.DEFINE_config_dict("config", default_config(), flag_values=values)
    values(["command", argument])
    return values.config


@pytest.mark.parametrize("path", BY_PATH)
def test_a_default_as_the_help_shows_it_can_be_given_to_the_command(path, monkeypatch):
    field = BY_PATH[path]
    if field.default is None:
        assert default_text(field) == "unset"
        return
    (text,) = shlex.split(default_text(field))  # as a shell takes it
    if path in ("networks", "guidance"):
        text = repr(tuple(text.split(",")))  # as the command quotes names
    value = given(monkeypatch, f"--config.{path}={text}").to_dict()
    for name in path.split("."):
        value = value[name]
    assert value == field.default and type(value) is type(field.default)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--config.recipe.learning_rate=0.3", 0.3),
        ("--config.dropping.teacher_droppable=False", False),
        ('--config.methods={"fitnet": 100.0}', {"fitnet": 100.0}),  # replaced, not merged
        ('--config.sweep={"methods.kd": (0.5, 1.0)}', {"methods.kd": (0.5, 1.0)}),
    ],
)
def test_fields_that_their_default_gives_no_type_take_values(argument, expected, monkeypatch):
    value = given(monkeypatch, argument).to_dict()
    for name in argument.removeprefix("--config.").partition("=")[0].split("."):
        value = value[name]
    assert value == expected


@pytest.mark.parametrize("width", [80, 120])
def test_the_help_has_every_field_within_its_width(width):
    lines = fields_help(width).splitlines()
    assert width - 10 < max(map(len, lines)) <= width
    words = [line.split()[0] for line in lines if line.startswith("  --")]
    assert sorted(words) == sorted(f"--config.{field.path}" for field in FIELDS)
    assert lines.count("") == len({field.section for field in FIELDS}) - 1
    text = " ".join(" ".join(lines).split())
    assert "--config.recipe.epochs 30 Epochs of training." in text
