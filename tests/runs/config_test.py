"""The config: what its defaults become, and how every wrong value is answered."""

import dataclasses
import re

import ml_collections
import numpy as np
import pytest

import distill_jax
from distill_jax import graph, methods, models
from distill_jax.methods import KD, CrossEntropy, LossOptions
from distill_jax.methods.fitnet import FitNet
from distill_jax.models import MODELS
from distill_jax.runs.config import (
    ConfigError,
    checkpoint_due,
    config_arguments,
    default_config,
    resolve,
    smoke,
)
from distill_jax.train.dropping import Dropping
from distill_jax.train.optim import OptimOptions

ROW = ("plane6", "plane4", "plane2")


def chosen_methods(experiment, network="plane2", taught=True, **changes):
    """(name, method, weight) of the terms of a network's loss."""
    return experiment.methods_of(
        models.build(network, 4, (8, 8, 1)), ("plane4",) * taught, (), changes
    )


def test_defaults_resolve():
    experiment = resolve(default_config())
    assert experiment == resolve({})
    assert experiment.networks == ROW and set(ROW) <= set(MODELS)
    assert experiment.students == ("plane2",)
    assert experiment.seeds == (0,)
    labels = [one.label for one in experiment.comparisons]
    assert labels == ["none", "direct", "chain", "dense"]
    assert [one.graph for one in experiment.comparisons] == [graph.NAMED[x](ROW) for x in labels]
    assert not any(one.stochastic or one.changes for one in experiment.comparisons)
    assert experiment.methods == {"kd": 1.0, "dml": 1.0}
    assert not (experiment.method_options or experiment.phases)
    assert experiment.topology.mode == "jit"  # on as many devices as suit the machine
    assert experiment.dropping == Dropping("fixed", 1)
    assert experiment.checkpoint_every == "5 minutes"


@pytest.mark.parametrize(
    ("network", "optimizer", "rate"),
    [
        ("plane2", "sgd", 0.01),
        ("plane2#2", "sgd", 0.01),
        ("resnet8", "sgd", 0.1),
        ("evolving:resnet8", "sgd", 0.1),
        ("vgg8", "sgd", 0.05),
        ("wrn_22_1", "sgd", 0.1),
        ("resnet8", "adamw", 0.001),
    ],
)
def test_the_rate_is_that_of_the_networks_family_where_none_is_given(network, optimizer, rate):
    config = {"networks": (network,), "guidance": "none", "recipe": {"optimizer": optimizer}}
    assert resolve(config).recipe_of(network).optim.learning_rate == rate
    config["recipe"]["learning_rate"] = 0.3
    assert resolve(config).recipe_of(network).optim.learning_rate == 0.3


def test_every_default_of_the_recipe_reaches_the_recipe():
    config = default_config().to_dict()
    recipe = resolve(config).recipe_of("plane2")
    flat = {**dataclasses.asdict(recipe), **dataclasses.asdict(recipe.optim)}
    expected = {**config["recipe"], "learning_rate": 0.01}  # that of plain networks
    assert {name: flat[name] for name in config["recipe"]} == expected
    assert recipe.survival == config["dropping"]["survival"]
    assert recipe.selection == "validation"


CHANGED = {
    "epochs": 7,
    "batch_size": 5,
    "last_batch": "keep",
    "augment": "crop_flip",
    "mixup": 0.3,
    "cutmix": 0.4,
    "train_limit": 3,
    "sync_bn": False,
    "temperature": 2.5,
    "kd_weight": 0.25,
    "label_smoothing": 0.2,
    "ema": 0.9,
    "optimizer": "adamw",
    "learning_rate": 0.3,
    "momentum": 0.5,
    "nesterov": True,
    "weight_decay": 0.01,
    "schedule": "piecewise",
    "milestones": (0.2, 0.4),
    "decay": 0.5,
    "warmup_epochs": 2.0,
    "clip_norm": 5.0,
    "accumulate_steps": 4,
    "decayed": "kernels",
    "trainable": ("fc.*",),
    "frozen": ("bn1.*", "bn2.*"),
}


def test_every_changed_field_of_the_recipe_reaches_the_recipe():
    assert set(CHANGED) == set(default_config().recipe)
    experiment = resolve({"recipe": CHANGED})
    recipe = experiment.recipe_of("plane2")
    flat = {**dataclasses.asdict(recipe), **dataclasses.asdict(recipe.optim)}
    assert {name: flat[name] for name in CHANGED} == CHANGED
    assert isinstance(recipe.optim, OptimOptions)
    assert experiment.recipe_of("plane2", epochs=9).epochs == 9


def test_whole_numbers_are_taken_for_fractions_and_lists_for_tuples():
    experiment = resolve({"recipe": {"temperature": 3, "milestones": [0.1, 0.2]}, "seeds": [2, 1]})
    recipe = experiment.recipe_of("plane2")
    assert type(recipe.temperature) is float and recipe.temperature == 3.0
    assert recipe.optim.milestones == (0.1, 0.2)
    assert experiment.seeds == (2, 1)


@pytest.mark.parametrize(
    ("protocol", "loss", "selection", "dropping"),
    [
        ("standard", LossOptions(teachers="mean"), "validation", Dropping("fixed")),
        (
            "paper",
            LossOptions(cross_entropy="per_teacher"),
            "validation",
            Dropping("bernoulli", teacher_droppable=False),
        ),
        ("official", LossOptions(kl_reduction="element_mean"), "test", Dropping("fixed")),
    ],
)
def test_a_protocol_sets_what_is_left_empty(protocol, loss, selection, dropping):
    experiment = resolve({"protocol": protocol})
    assert (experiment.loss, experiment.selection) == (loss, selection)
    assert experiment.recipe_of("plane2").selection == selection
    assert chosen_methods(experiment) == [
        ("ce", CrossEntropy(loss), 1.0),
        ("kd", KD(loss), 1.0),
    ]
    assert experiment.dropping == dropping
    chosen = resolve(
        {
            "protocol": protocol,
            "selection": "last",
            "loss": {"kl_reduction": "batch_mean", "cross_entropy": "once", "teachers": "mean"},
            "dropping": {"kind": "none", "teacher_droppable": False},
        }
    )
    assert chosen.loss == LossOptions(teachers="mean")
    assert chosen.selection == "last"
    assert chosen.dropping == Dropping("none", 1, False)


def test_the_paper_drops_assistants_alone_unless_told_otherwise():
    assert "teacher_droppable=False" in repr(resolve({"protocol": "paper"}))
    assert "teacher_droppable=True" in repr(resolve({}))
    given = {"protocol": "paper", "dropping": {"teacher_droppable": True}}
    assert "teacher_droppable=True" in repr(resolve(given))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (("plane6", "plane4"), ("plane6", "plane4")),
        ("plane6,plane4", ("plane6", "plane4")),
        (("plane6,plane4",), ("plane6", "plane4")),
        ((" plane6 , plane4 ,",), ("plane6", "plane4")),
        (["plane6", "plane4,plane2"], ("plane6", "plane4", "plane2")),
    ],
)
def test_names_may_come_as_one_comma_string(text, expected):
    experiment = resolve({"networks": text, "students": text, "guidance": "none,chain"})
    assert experiment.networks == experiment.students == expected
    assert [one.label for one in experiment.comparisons] == ["none", "chain"]


@pytest.mark.parametrize(
    ("spec", "row", "stochastic"),
    [
        ("dense", graph.dense(ROW), False),
        ("dense+drop", graph.dense(ROW), True),
        ("plane6>plane2", graph.path(ROW, ["plane6", "plane2"]), False),
        ("plane2<plane6+plane4+drop", graph.custom(ROW, {"plane2": ROW[:2]}), True),
    ],
)
def test_a_comparison_is_stochastic_by_its_suffix(spec, row, stochastic):
    (got,) = resolve({"guidance": spec}).comparisons
    assert (got.label, got.graph, got.stochastic) == (spec, row, stochastic)


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda rows: np.array(rows, bool)])
def test_a_matrix_may_stand_alone_or_among_others(kind):
    rows = kind([kind([0, 0, 0]), kind([1, 0, 0]), kind([1, 1, 0])])
    (alone,) = resolve({"guidance": rows}).comparisons
    none, other = resolve({"guidance": ("none", rows)}).comparisons
    assert alone.graph == other.graph == graph.dense(ROW) and none.label == "none"
    assert resolve({"seeds": np.arange(3)}).seeds == (0, 1, 2)
    refused({"guidance": rows[:2]}, "the matrix of 3 networks has shape (3, 3), got (2, 3)")


def test_a_control_is_plain_training_with_its_changes():
    control = {"full data": {"epochs": 3, "train_limit": 0}}
    experiment = resolve({"guidance": "chain", "controls": control})
    added = experiment.comparisons[1]
    assert added.label == "none, full data"
    assert added.graph == graph.none(ROW) and not added.stochastic
    assert dict(added.changes) == control["full data"]
    assert experiment.recipe_of("plane2", **dict(added.changes)).epochs == 3
    assert experiment.recipe_of("plane2").epochs == 30


def test_overrides_change_one_network_and_give_way_to_changes():
    experiment = resolve({"overrides": {"plane6": {"epochs": 3, "seed": 5, "kd_weight": 1}}})
    assert experiment.recipe_of("plane6").epochs == 3
    assert experiment.recipe_of("plane6", epochs=4).epochs == 4
    assert experiment.recipe_of("plane6").kd_weight == 1.0
    assert experiment.recipe_of("plane4").epochs == 30
    assert (experiment.seed_of("plane6", 1), experiment.seed_of("plane4", 1)) == (5, 1)


def refused(values, *parts):
    with pytest.raises(ConfigError) as caught:
        resolve(values)
    for part in parts:
        assert part in str(caught.value)


DEFAULTS = default_config().to_dict()
USERS_KEYS = ("methods",)  # a section whose keys are the user's own
SECTIONS = [
    name
    for name, value in DEFAULTS.items()
    if isinstance(value, dict) and value and name not in USERS_KEYS
]
FIELDS = [(name,) for name in DEFAULTS] + [(s, name) for s in SECTIONS for name in DEFAULTS[s]]


def nested(path, value):
    for name in reversed(path):
        value = {name: value}
    return value


def default_at(path):
    value = DEFAULTS
    for name in path:
        value = value[name]
    return value


@pytest.mark.parametrize("path", FIELDS, ids=".".join)
def test_every_field_refuses_another_type_by_name(path):
    default = default_at(path)
    wrong = [None]
    if path == ("recipe", "learning_rate"):  # set by the network's family
        wrong = [True, "1"]
    elif default is None:  # a flag that a protocol sets
        wrong = [1, "true"]
    elif isinstance(default, bool):
        wrong += [1, "true"]
    elif isinstance(default, (int, float)):
        wrong += [True, "1"] + ([1.5] if isinstance(default, int) else [])
    elif isinstance(default, (tuple, dict)):
        wrong += [3] + ([["x"], "x"] if isinstance(default, dict) else [])
    elif path == ("devices",):  # a number, or text
        wrong += [1.5, True, ("a",)]
    else:
        wrong += [3, True, ("a",)]
    for value in wrong:
        refused(nested(path, value), f"config.{'.'.join(path)} is a", repr(value))


@pytest.mark.parametrize("path", FIELDS, ids=".".join)
def test_a_misspelt_field_is_answered_with_the_field_meant(path):
    *section, name = path
    misspelt = (*section, name + "z")
    refused(
        nested(misspelt, default_at(path)),
        f"config.{'.'.join(misspelt)}: unknown {name + 'z'!r}; did you mean {name!r}?",
    )


@pytest.mark.parametrize("section", [(), *((name,) for name in SECTIONS)])
def test_an_unknown_field_is_answered_with_those_there_are(section):
    known = ", ".join(sorted(default_at(section)))
    refused(nested((*section, "qqq"), 1), f".qqq: unknown 'qqq'. There are {known}"[:60])


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        # names
        ({"protocol": "offical"}, ("protocol", "'offical'", "did you mean 'official'?")),
        ({"selection": "tests"}, ("selection", "'tests'")),
        ({"dtype": "float23"}, ("dtype", "did you mean 'float32'?")),
        ({"parallel": "pmp"}, ("parallel", "'pmp'")),
        ({"devices": 4000}, ("4000 devices",)),
        ({"devices": -1}, ("-1 devices",)),
        ({"checkpoint_every": "often"}, ("checkpoint_every", "'often'")),
        ({"loss": {"kl_reduction": "mean"}}, ("kl_reduction", "'mean'", "batch_mean")),
        ({"loss": {"cross_entropy": "twice"}}, ("cross_entropy", "'twice'")),
        ({"loss": {"teachers": "max"}}, ("teachers", "'max'")),
        # the row
        ({"networks": ()}, ("at least one network",)),
        ({"networks": (1, 2)}, ("networks are names", "(1, 2)")),
        ({"networks": ("plane2", "plane2")}, ("repeated: plane2",)),
        ({"networks": ("plane2",)}, ("'direct' guidance needs at least two",)),
        ({"guidance": ()}, ("guidance is empty",)),
        ({"guidance": (3,)}, ("guidance are names", "(3,)")),
        ({"guidance": "dens"}, ("unknown guidance 'dens'", "did you mean 'dense'?")),
        ({"guidance": "dense+drp"}, ("unknown guidance 'dense+drp'",)),
        ({"guidance": "plane6>plane3"}, ("'plane3' is not in the row",)),
        ({"guidance": ("dense", "dense")}, ("guidance is named twice",)),
        ({"students": ("plane5",)}, ("students", "'plane5'", "did you mean 'plane")),
        # seeds
        *[
            ({"seeds": seeds}, ("seeds", "different"))
            for seeds in ((), (1, 1), (-1,), (2**32,), (0.5,), (True,), ("a",))
        ],
        # dropping
        ({"dropping": {"kind": "fix"}}, ("dropping kind", "'fix'")),
        ({"dropping": {"number": -1}}, ("dropping number", "-1")),
        ({"dropping": {"survival": 1.1}}, ("survival", "1.1")),
        ({"guidance": "none+drop"}, ("cannot drop 1 of 0 teachers",)),
        ({"guidance": "dense+drop", "dropping": {"number": 3}}, ("cannot drop 3 of 2 teachers",)),
        (
            {"guidance": "chain+drop", "dropping": {"teacher_droppable": False}},
            ("cannot drop 1 of 1 teachers, of which 0 may go",),
        ),
        # the recipe
        ({"recipe": {"epochs": 0}}, ("epochs", "0")),
        ({"recipe": {"batch_size": 0}}, ("batch_size", "0")),
        ({"recipe": {"train_limit": -1}}, ("train_limit", "-1")),
        ({"recipe": {"last_batch": "pad"}}, ("last_batch", "'pad'")),
        ({"recipe": {"augment": "mixup"}}, ("augment", "'mixup'")),
        ({"recipe": {"temperature": 0.0}}, ("temperature", "0.0")),
        ({"recipe": {"temperature": float("nan")}}, ("temperature", "nan")),
        ({"recipe": {"kd_weight": -0.1}}, ("kd_weight", "-0.1")),
        ({"recipe": {"kd_weight": float("nan")}}, ("kd_weight", "nan")),
        ({"recipe": {"optimizer": "adam"}}, ("optimizer", "'adam'")),
        ({"recipe": {"learning_rate": 0.0}}, ("learning_rate", "0.0")),
        ({"recipe": {"momentum": 1.0}}, ("momentum", "1.0")),
        ({"recipe": {"weight_decay": -1.0}}, ("weight_decay", "-1.0")),
        ({"recipe": {"schedule": "cos"}}, ("schedule", "'cos'")),
        ({"recipe": {"milestones": (0.7, 0.5)}}, ("milestones", "(0.7, 0.5)")),
        ({"recipe": {"milestones": ("half",)}}, ("milestones", "half")),
        ({"recipe": {"decay": 0.0}}, ("decay", "0.0")),
        ({"recipe": {"warmup_epochs": -1.0}}, ("warmup_epochs", "-1.0")),
        # overrides and controls
        ({"overrides": {"plane5": {}}}, ("overrides.plane5", "did you mean 'plane")),
        ({"overrides": {"plane6": 3}}, ("overrides.plane6 is a section",)),
        ({"overrides": {"plane6": {"epoch": 3}}}, ("overrides.plane6.epoch", "mean 'epochs'?")),
        ({"overrides": {"plane6": {"epochs": "3"}}}, ("overrides.plane6.epochs is a", "'3'")),
        ({"overrides": {"plane6": {"epochs": 0}}}, ("epochs", "0")),
        ({"overrides": {"plane6": {"seed": "a"}}}, ("overrides.plane6.seed is a", "'a'")),
        ({"overrides": {"plane6": {"seed": -1}}}, ("overrides.plane6.seed", "-1")),
        ({"controls": {"x": 3}}, ("controls.x is a section",)),
        ({"controls": {"x": {"epoch": 3}}}, ("controls.x.epoch", "did you mean 'epochs'?")),
        ({"controls": {"x": {"epochs": 0}}}, ("epochs", "0")),
        ({"controls": {"x": {"seed": 1}}}, ("controls.x.seed: unknown 'seed'",)),
    ],
)
def test_values_out_of_range_are_refused_by_name(values, parts):
    refused(values, *parts)


@pytest.mark.parametrize("config", [None, 3, [], [("name", "x")]])
def test_what_is_no_config_is_refused(config):
    refused(config, "config is a section")


def test_controls_are_the_last_comparisons_under_labels_of_their_own():
    comparisons = resolve({"controls": {"a": {}, "b": {}}}).comparisons
    labels = [one.label for one in comparisons]
    assert labels[-2:] == ["none, a", "none, b"]


@pytest.mark.parametrize(
    ("every", "not_yet", "due"),
    [
        ("500 steps", (499, 99, 9e9), (500, 0, 0)),
        ("1 step", (0, 99, 9e9), (1, 0, 0)),
        ("2 epochs", (9e9, 1.9, 9e9), (0, 2, 0)),
        ("0.5 epoch", (9e9, 0.4, 9e9), (0, 0.5, 0)),
        ("5 minutes", (9e9, 99, 299), (0, 0, 300)),
        (" 1  minute ", (9e9, 99, 59), (0, 0, 60)),
        ("90 seconds", (9e9, 99, 89), (0, 0, 90)),
    ],
)
def test_checkpoints_are_due_by_steps_epochs_or_time(every, not_yet, due):
    assert not checkpoint_due(every)(*not_yet)
    assert checkpoint_due(every)(*due)


@pytest.mark.parametrize(
    "every", ["", "5", "minutes", "5 hours", "-1 steps", "0 epochs", "x steps", "nan minutes"]
)
def test_checkpoint_times_that_cannot_be_read_are_refused(every):
    with pytest.raises(ConfigError, match=f"checkpoint_every is .*{re.escape(repr(every))}"):
        checkpoint_due(every)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("digits", "synthetic:8x8x1:10:128:64"),
        ("fashion_mnist", "synthetic:28x28x1:10:128:64"),
        ("cifar10", "synthetic:32x32x3:10:128:64"),
        ("cifar100", "synthetic:32x32x3:100:200:100"),
        ("sst2", "synthetic_text:2:128:64"),
        ("text:mine.jsonl", "synthetic_text:2:128:64"),
        ("wn18rr", "synthetic_triples:40:4:400"),
    ],
)
def test_smoke_cuts_down_data_epochs_and_seeds(dataset, expected):
    config = default_config()
    config.dataset.name, config.seeds = dataset, (1, 2, 3)
    config.overrides = {"plane6": {"epochs": 90}, "plane4": {"learning_rate": 0.5}}
    config.controls = {"full": {"train_limit": 50}}
    experiment = resolve(smoke(config, name="changed"))
    assert experiment.dataset["name"] == expected
    assert (experiment.name, len(experiment.seeds)) == ("changed", 1)
    assert {experiment.recipe_of(network).epochs for network in ROW} == {1}
    assert experiment.recipe_of("plane4").optim.learning_rate == 0.5
    assert dict(experiment.comparisons[-1].changes)["train_limit"] < 50


# --------------------------------------------------------------------------- methods and phases
def test_methods_are_kd_beside_the_cross_entropy_and_the_latter_alone_where_nobody_teaches():
    experiment = resolve({})
    loss = LossOptions(teachers="mean")
    assert chosen_methods(experiment) == [("ce", CrossEntropy(loss), 1.0), ("kd", KD(loss), 1.0)]
    assert chosen_methods(experiment, taught=False) == [("ce", CrossEntropy(), 1.0)]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"fitnet": 100}, [("ce", CrossEntropy(), 1.0), ("fitnet", FitNet(), 100.0)]),
        ({"fitnet": 1.0, "ce": 0.0}, [("ce", CrossEntropy(), 0.0), ("fitnet", FitNet(), 1.0)]),
        (
            {"kd": 0.5, "ce": 2},
            [("ce", CrossEntropy(), 2.0), ("kd", KD(LossOptions(teachers="mean")), 0.5)],
        ),
        (
            {"kd": 1.0, "fitnet": 2.0},
            [
                ("ce", CrossEntropy(LossOptions(teachers="mean")), 1.0),
                ("kd", KD(LossOptions(teachers="mean")), 1.0),
                ("fitnet", FitNet(), 2.0),
            ],
        ),
        ({}, [("ce", CrossEntropy(), 1.0)]),
    ],
)
def test_a_weight_of_the_cross_entropy_counts_as_given_else_against_kd(weights, expected):
    assert chosen_methods(resolve({"methods": weights})) == expected


def test_numbers_of_a_method_stand_in_method_options():
    config = {"methods": {"fitnet": 1.0}, "method_options": {"fitnet": {"hint_layer": 1}}}
    experiment = resolve(config)
    assert chosen_methods(experiment)[1] == ("fitnet", FitNet(hint_layer=1), 1.0)


def test_an_override_has_methods_and_their_numbers_of_its_own():
    own = {"methods": {"fitnet": 3}, "method_options": {"fitnet": {"teacher_layer": 0}}}
    experiment = resolve({"overrides": {"plane4": own}})
    assert chosen_methods(experiment, "plane4") == [
        ("ce", CrossEntropy(), 1.0),
        ("fitnet", FitNet(teacher_layer=0), 3.0),
    ]
    assert chosen_methods(experiment, "plane2") == chosen_methods(resolve({}), "plane2")


def test_a_list_of_sweeps_gives_the_combinations_of_each():
    entries = [{"kd_weight": (0.1, 0.9), "temperature": 2}, {"kd_weight": 0.5}, {"kd_weight": 0.5}]
    config = {"guidance": ("none", "direct"), "sweep": entries}
    labels = [comparison.label for comparison in resolve(config).comparisons]
    both = [f"direct, kd_weight={x}, temperature=2.0" for x in (0.1, 0.9)]
    assert labels == ["none", *both, "direct, kd_weight=0.5"]
    assert [x.label for x in resolve({"guidance": "direct", "sweep": []}).comparisons] == ["direct"]


def test_a_sweep_sets_weights_of_methods_where_these_are_used():
    config = {"methods": {"kd": 1.0, "fitnet": 1.0}, "sweep": {"methods.fitnet": (1, 10.0)}}
    experiment = resolve({**config, "overrides": {"plane4": {"methods": {"kd": 1.0}}}})
    labels = [one.label for one in experiment.comparisons]
    assert labels[:3] == ["none", "direct, methods.fitnet=1.0", "direct, methods.fitnet=10.0"]
    changes = dict(experiment.comparisons[2].changes)
    assert chosen_methods(experiment, "plane2", **changes)[2] == ("fitnet", FitNet(), 10.0)
    assert [name for name, *_ in chosen_methods(experiment, "plane4", **changes)] == ["ce", "kd"]


PHASE = {"methods": {"fitnet": 1, "ce": 0.0}, "epochs": 3, "trainable": ["conv1.*", "bn1.*"]}


def test_phases_are_recipes_and_methods_that_differ():
    experiment = resolve({"phases": (PHASE,)})
    (phase,) = experiment.phases
    assert phase["methods"] == {"fitnet": 1.0, "ce": 0.0}
    recipe = experiment.recipe_of("plane2", **phase)
    assert (recipe.epochs, recipe.optim.trainable) == (3, ("conv1.*", "bn1.*"))
    assert recipe.batch_size == experiment.recipe_of("plane2").batch_size
    cut = default_config()
    cut.phases = (PHASE,)
    assert resolve(smoke(cut)).phases[0]["epochs"] == 1


def test_a_registered_method_is_used_by_its_name(monkeypatch):
    monkeypatch.setattr(methods.registry, "_registered", {})
    methods.register_method("mine", lambda student, teacher, labels, hyper: labels * 0.0)
    (_, (name, method, weight)) = chosen_methods(resolve({"methods": {"mine": 2.0}}))
    assert (name, method.name, weight) == ("mine", "mine", 2.0)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"methods": {"fitnett": 1.0}}, ("unknown method 'fitnett'", "did you mean 'fitnet'?")),
        (
            {"methods": {"qqq": 1.0}},
            ("unknown method 'qqq'", "There are ce, kd, dml, teskd, fitnet"),
        ),
        *[
            ({"methods": {"kd": weight}}, ("config.methods.kd is a weight", repr(weight)))
            for weight in (float("nan"), float("inf"), "1", True, None)
        ],
        ({"method_options": {"qqq": {}}}, ("unknown method 'qqq'",)),
        ({"method_options": {"fitnet": 3}}, ("config.method_options.fitnet is a section", "3")),
        (
            {"method_options": {"fitnet": {"layer": 1}}},
            ("method 'fitnet' has no option 'layer'", "hint_layer, teacher_layer"),
        ),
        (
            {"method_options": {"kd": {"temperature": 2.0}}},
            ("config.method_options.kd", "config.loss, recipe.temperature and recipe.kd_weight"),
        ),
        ({"method_options": {"teskd": {}}}, ("what 'teskd' takes stands in config.evolve",)),
        (
            {"overrides": {"plane4": {"methods": {"qqq": 1}}}},
            ("unknown method 'qqq'",),
        ),
        (
            {"overrides": {"plane4": {"methods": {"kd": "1"}}}},
            ("overrides.plane4.methods.kd is a weight", "'1'"),
        ),
        (
            {"overrides": {"plane4": {"method_options": {"kd": {}}}}},
            ("overrides.plane4.method_options.kd", "recipe.temperature"),
        ),
        ({"overrides": {"plane4": {"methods": 3}}}, ("overrides.plane4.methods is a section",)),
        ({"sweep": {"methods.fitnet": (1.0,)}}, ("sweep.methods.fitnet", "unknown")),
        ({"sweep": {"methods.kd": (1.0, float("nan"))}}, ("sweep.methods.kd is a weight", "nan")),
        ({"sweep": [{"kd_weight": 0.5}, 3]}, ("config.sweep is a section", "3")),
        ({"sweep": {"methods.kd": (1.0, 1.0)}}, ("sweep.methods.kd", "all different")),
        ({"phases": ({},)}, ("phases[0] is a dict of recipe fields and methods",)),
        ({"phases": (3,)}, ("phases[0] is a section", "3")),
        ({"phases": ({"seed": 1},)}, ("phases[0] is a dict of recipe fields",)),
        ({"phases": (PHASE, {"epoch": 3})}, ("phases[1].epoch", "did you mean 'epochs'?")),
        ({"phases": ({"epochs": 0},)}, ("epochs is 1 or more, got 0",)),
        ({"phases": ({"methods": {"qqq": 1}},)}, ("unknown method 'qqq'",)),
        ({"recipe": {"trainable": ("(",)}}, ("regular expressions", "'('")),
        ({"recipe": {"clip_norm": -1.0}}, ("clip_norm", "-1.0")),
        ({"recipe": {"accumulate_steps": 0}}, ("accumulate_steps is 1 or more, got 0",)),
        ({"recipe": {"decayed": "some"}}, ("decayed is one of", "'some'")),
    ],
    ids=lambda value: str(value)[:60],
)
def test_methods_that_cannot_be_used_are_refused_by_name(values, parts):
    refused(values, *parts)


# ------------------------------------------------------------------- arguments of a config file
def test_arguments_of_a_config_file_come_in_any_order_and_default_to_the_first():
    choices = {"dataset": ("cifar10", "cifar100"), "network": ("resnet18", "vgg16")}
    for text in ("cifar100,smoke", " smoke , cifar100 ,"):
        given = config_arguments(text, **choices)
        assert (given.dataset, given.network, given.smoke) == ("cifar100", "resnet18", True)
    given = config_arguments("", **choices)
    assert (given.dataset, given.network, given.smoke) == ("cifar10", "resnet18", False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("smok", "unknown 'smok'; did you mean 'smoke'? There are cifar10, cifar100, smoke"),
        ("smoke,mnist", "unknown 'mnist'. There are cifar10, cifar100, smoke"),
        ("cifar10,cifar100", "name one dataset, got cifar10 and cifar100"),
    ],
)
def test_other_arguments_of_a_config_file_are_refused_with_those_there_are(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_arguments(text, dataset=("cifar10", "cifar100"))


def test_a_config_dict_and_its_plain_dict_resolve_alike():
    config = default_config()
    config.recipe.update(epochs=3, kd_weight=0.9)
    config.overrides = {"plane6": {"epochs": 10}}
    assert isinstance(config, ml_collections.ConfigDict)
    assert resolve(config) == resolve(config.to_dict())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ("a", "b", False, [])),
        ("smoke", ("c", "d", True, [])),
        ("x:y:z,smoke", ("x", "y:z", True, ["x:y:z"])),
    ],
)
def test_a_pair_of_networks_is_read(text, expected):
    given = distill_jax.pair_arguments(text, pair="a:b", small="c:d")
    assert (given.teacher, given.student, given.smoke, given.named) == expected


@pytest.mark.parametrize("text", ["a:b,c:d", ":b", "a:"])
def test_what_is_no_pair_is_refused(text):
    with pytest.raises(distill_jax.ConfigError, match="a pair is TEACHER:STUDENT"):
        distill_jax.pair_arguments(text, pair="a:b", small="c:d")
