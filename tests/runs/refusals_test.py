"""Every wrong input is refused through the public cli, in words, before anything is compiled."""

import dataclasses
import errno
import fcntl
import json
import os

import jax
import numpy as np
import pytest
from flax import linen, nnx

import distill_jax
from distill_jax import data, models
from distill_jax.interop.files import save_variables
from distill_jax.report import Reporter
from distill_jax.runs.checkpoint import CheckpointError
from distill_jax.runs.workdir import WorkdirError

REFUSED = (distill_jax.ConfigError, data.DataError, WorkdirError, CheckpointError)
COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **about: COMPILED.append(event) if "backend_compile" in event else None
)
ROW = ("plane4", "plane2")
TINY = {
    "dataset": {"name": "synthetic:8x8x1:4:48:32", "valid_fraction": 0.25},
    "networks": ROW,
    "guidance": ("direct",),
    "recipe": {"epochs": 1, "batch_size": 12},
}
IMAGES = np.random.default_rng(0).integers(0, 256, (48, 8, 8, 1), np.uint8)
LABELS = np.arange(48, dtype=np.int32) % 4
TEST = IMAGES[:8], LABELS[:8]


def labelled(label, at=7):
    labels = LABELS.copy()
    labels[at] = label
    return labels


def with_nan():
    images = (IMAGES / 255).astype(np.float32)
    images[3, 2, 1] = np.nan
    return images


def refused(parts, **arguments):
    """Runs, and fails unless that is refused with all of `parts` and without compiling."""
    before = len(COMPILED)
    with pytest.raises(REFUSED) as caught:
        distill_jax.run(**{"config": TINY, **arguments})
    for part in parts:
        assert part in str(caught.value)
    assert len(COMPILED) == before


def test_what_is_good_is_compiled_and_counted():
    before = len(COMPILED)
    dataset = data.from_arrays((IMAGES, LABELS), TEST, classes=4, valid_fraction=0.25)
    assert distill_jax.run(TINY, dataset=dataset).rows
    assert len(COMPILED) > before


# ----------------------------------------------------------------------------------- given arrays
ARRAYS = {
    "label -1": ({"train": (IMAGES, labelled(-1))}, ["label -1 at index 7", "expected 0 to 3"]),
    "label too high": ({"train": (IMAGES, labelled(4))}, ["label 4 at index 7", "expected 0 to 3"]),
    "test label -1": ({"test": (IMAGES[:8], labelled(-1)[:8])}, ["test label -1", "0 to 3"]),
    "valid label": ({"valid": (IMAGES, labelled(9, 0))}, ["valid label 9", "expected 0 to 3"]),
    "float labels": ({"train": (IMAGES, LABELS / 1)}, ["float64 (48,)", "expected integers"]),
    "one-hot labels": ({"train": (IMAGES, np.eye(4, dtype=int)[LABELS])}, ["(48, 4)", "(N,)"]),
    "fewer labels": ({"train": (IMAGES, LABELS[:9])}, ["48 images and 9 labels", "as many of"]),
    "no pair": ({"train": IMAGES}, ["ndarray", "expected (images, labels)"]),
    "float images": ({"train": (IMAGES / 255, LABELS)}, ["float64", "expected uint8, 0 to 255"]),
    "nan pixels": ({"train": (with_nan(), LABELS)}, ["float32 with NaN", "expected uint8"]),
    "wide images": ({"train": (IMAGES.astype(np.int16), LABELS)}, ["int16", "expected uint8"]),
    "bool images": ({"train": (IMAGES > 9, LABELS)}, ["bool", "expected uint8"]),
    "gray images": ({"train": (IMAGES[..., 0], LABELS)}, ["(48, 8, 8)", "expected (N, H, W, C)"]),
    "channels first": (
        {"train": (np.zeros((48, 3, 8, 8), np.uint8), LABELS)},
        ["(48, 3, 8, 8)", "8 channels", "expected (N, H, W, C)"],
    ),
    "no images": ({"train": (IMAGES[:0], LABELS[:0])}, ["0 images", "expected at least one"]),
    "no test": ({"test": (IMAGES[:0], LABELS[:0])}, ["test has 0 images", "at least one"]),
    "other test shape": (
        {"test": (np.zeros((4, 9, 8, 1), np.uint8), LABELS[:4])},
        ["(9, 8, 1)", "expected one shape for all splits"],
    ),
    "one class": ({"classes": 1}, ["classes is 1", "at least 2"]),
    "broken class": ({"classes": 4.0}, ["classes is 4.0", "expected an integer"]),
    "fewer classes": ({"classes": 3}, ["label 3 at index 3", "expected 0 to 2"]),
    "all held out": ({"valid_fraction": 1.0}, ["valid_fraction is 1.0", "valid_fraction < 1"]),
    "held out below 0": ({"valid_fraction": -0.1}, ["valid_fraction is -0.1", "0 <="]),
    "nothing held out": ({"valid_fraction": 0.01}, ["is 0.01", "expected a larger fraction"]),
    "split seed": ({"split_seed": -1}, ["split_seed is -1", "at least 0"]),
    "two means": ({"mean": (0.5, 0.5), "std": (0.2,)}, ["(0.5, 0.5)", "expected 1 finite values"]),
    "mean alone": ({"mean": (0.5,)}, ["std is ()", "give both mean and std"]),
    "mean nan": ({"mean": (float("nan"),), "std": (1.0,)}, ["(nan,)", "finite values"]),
    "mean text": ({"mean": ("a",), "std": (1.0,)}, ["('a',)", "finite values"]),
    "std 0": ({"mean": (0.5,), "std": (0.0,)}, ["std is (0.0,)", "above 0"]),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(name):
    change, parts = ARRAYS[name]
    good = {"train": (IMAGES, LABELS), "test": TEST, "classes": 4, "valid_fraction": 0.25}
    before = len(COMPILED)
    with pytest.raises(data.DataError) as caught:
        distill_jax.run(TINY, dataset=data.from_arrays(**{**good, **change}))
    for part in parts:
        assert part in str(caught.value)
    assert len(COMPILED) == before


def changed(part, index=0, value=None):
    """A data set whose split was changed behind its back."""
    dataset = data.from_arrays((IMAGES, LABELS), TEST, classes=4, valid_fraction=0.25)
    split = list(getattr(dataset, part))
    split[index] = value(split[index])
    return dataclasses.replace(dataset, **{part: data.Split(*split)})


def other(**fields):
    dataset = data.from_arrays((IMAGES, LABELS), TEST, classes=4, valid_fraction=0.25)
    return dataclasses.replace(dataset, **fields)


BY_HAND = {
    "label -1": (lambda: changed("train", 1, lambda y: y - 1), ["label -1", "expected 0 to 3"]),
    "label too high": (lambda: changed("valid", 1, lambda y: y + 1), ["label 4", "0 to 3"]),
    "float": (lambda: changed("test", 0, lambda x: x / 255), ["test images are float64", "uint8"]),
    "shape": (lambda: changed("test", 0, lambda x: x[:, 1:]), ["(7, 8, 1)", "expected (8, 8, 1)"]),
    "empty": (lambda: changed("train", 0, lambda x: x[:0]), ["0 images", "expected at least one"]),
    "std": (lambda: other(std=(0.0,)), ["std is (0.0,)", "above 0"]),
    "mean": (lambda: other(mean=(0.1, 0.2)), ["mean is (0.1, 0.2)", "expected 1 finite"]),
    "classes": (lambda: other(classes=2), ["label 2", "expected 0 to 1"]),
    "pair": (lambda: (IMAGES, LABELS), ["a tuple", "expected one of distill_jax.data"]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_data_sets_made_by_hand(name):
    make, parts = BY_HAND[name]
    refused(parts, dataset=make())


# ------------------------------------------------------------------------------------- the config
NAN = float("nan")
CONFIGS = [
    ({"dataset": {"name": "cifar11"}}, ["'cifar11'", "did you mean 'cifar10'"]),
    ({"dataset": {"name": "synthetic:8x8:4"}}, ["'8x8:4'", "expected synthetic[:HxWxC"]),
    ({"dataset": {"name": "synthetic:8x8x1:4:0"}}, ["'8x8x1:4:0'", "all at least 1"]),
    ({"dataset": {"name": "synthetic:9999x9999x3:4:9999"}}, ["9999x9999x3", "at most"]),
    ({"dataset": {"name": "cifar10", "data_dir": "/nowhere"}}, ["'/nowhere'", "existing folder"]),
    ({"dataset": {"valid_fraction": "a"}}, ["valid_fraction is a float, got 'a'"]),
    ({"recipe": {"batch_size": 1000}}, ["batch_size 1000", "larger than the 36"]),
    ({"recipe": {"batch_size": 0}}, ["batch_size is 1 or more, got 0"]),
    ({"recipe": {"batch_size": -8}}, ["batch_size is 1 or more, got -8"]),
    ({"recipe": {"epochs": -1}}, ["epochs is 1 or more, got -1"]),
    ({"recipe": {"epochs": 0}}, ["epochs is 1 or more, got 0"]),
    ({"recipe": {"epochs": 1.5}}, ["epochs is a int, got 1.5"]),
    ({"recipe": {"train_limit": -1}}, ["train_limit is 0 or more, got -1"]),
    ({"recipe": {"train_limit": 999}}, ["per_class is 999", "expected at most 9"]),
    ({"recipe": {"temperature": 0.0}}, ["temperature is a number above 0, got 0.0"]),
    ({"recipe": {"temperature": -4.0}}, ["temperature is a number above 0, got -4.0"]),
    ({"recipe": {"temperature": NAN}}, ["temperature is a number above 0, got nan"]),
    ({"recipe": {"temperature": float("inf")}}, ["temperature is a number above 0, got inf"]),
    ({"recipe": {"kd_weight": -0.1}}, ["kd_weight is between 0 and 1, got -0.1"]),
    ({"recipe": {"kd_weight": 1.1}}, ["kd_weight is between 0 and 1, got 1.1"]),
    ({"recipe": {"kd_weight": NAN}}, ["kd_weight is between 0 and 1, got nan"]),
    ({"recipe": {"learning_rate": -0.1}}, ["learning_rate", "-0.1"]),
    ({"recipe": {"learning_rate": NAN}}, ["learning_rate", "nan"]),
    ({"recipe": {"momentum": 1.0}}, ["momentum", "1.0"]),
    ({"recipe": {"weight_decay": -1e-4}}, ["weight_decay", "-0.0001"]),
    ({"recipe": {"warmup_epochs": -1.0}}, ["warmup_epochs", "-1.0"]),
    ({"recipe": {"augment": "mixup"}}, ["augment is one of", "'mixup'"]),
    ({"recipe": {"mixup": -0.1}}, ["mixup is a number of 0 or more, got -0.1"]),
    ({"recipe": {"cutmix": NAN}}, ["cutmix is a number of 0 or more, got nan"]),
    (
        {"teacher_logits": "table", "recipe": {"mixup": 0.2}},
        ["'table' needs images that never change, but they are mixed by recipe.mixup"],
    ),
    *(
        (
            {"methods": {"kd": 1.0, name: 1.0}, "recipe": recipe},
            [f"method {name!r} reads the label of an example", "recipe.mixup and recipe.cutmix 0"],
        )
        for name, recipe in (
            ("dkd", {"mixup": 0.2}),
            ("crd", {"cutmix": 1.0}),
            ("ps_kd", {"mixup": 0.2, "cutmix": 1.0}),
        )
    ),
    (
        {"methods": {"cs_kd": 1.0}, "recipe": {"mixup": 0.2}},
        ["'cs_kd' needs another example of the same class", "recipe.mixup and recipe.cutmix 0"],
    ),
    ({"methods": {"ddgsd": 1.0}}, ["'ddgsd' compares two views", "augment is 'none'"]),
    (
        {
            "networks": ("plane6", "plane4", "plane2"),
            "guidance": "plane4<plane2;plane2<plane4+plane6",
            "methods": {"kd": 1.0, "kdcl": 1.0},
        },
        ["'kdcl' gives each network an augmentation", "such as plane6", "live teachers alone"],
    ),
    ({"method_options": {"cs_kd": {"temperature": 0}}}, ["cs_kd's temperature", "above 0, got 0"]),
    ({"method_options": {"ps_kd": {"alpha": 2}}}, ["ps_kd's alpha", "between 0 and 1, got 2"]),
    (
        {"method_options": {"ddgsd": {"distance_weight": -1}}},
        ["ddgsd's distance_weight is a number of 0 or more, got -1"],
    ),
    ({"method_options": {"kdcl": {"alpha": NAN}}}, ["kdcl's alpha", "between 0 and 1, got nan"]),
    ({"recipe": {"epoch": 3}}, ["unknown 'epoch'; did you mean 'epochs'?"]),
    ({"evolve": {"temperature": -1.0}}, ["temperature is a number above 0, got -1.0"]),
    ({"dropping": {"survival": 1.5}}, ["survival is between 0 and 1, got 1.5"]),
    ({"dropping": {"number": -1}}, ["dropping number is 0 or more, got -1"]),
    ({"guidance": "direct+drop", "dropping": {"number": 2}}, ["cannot drop 2 of 1 teachers"]),
    ({"networks": ("plane4", "plane3x")}, ["plane3x", "did you mean"]),
    ({"networks": ("plane4", "plane4")}, ["stand once in a row", "plane4"]),
    ({"networks": ("plane4",)}, ["needs at least two networks", "'plane4'"]),
    ({"networks": ()}, ["at least one network"]),
    ({"networks": ("plane8", "plane2")}, ["plane8 has 4 pools", "got 8×8"]),
    ({"guidance": "plane4>plane9"}, ["'plane9' is not in the row"]),
    ({"guidance": "plane2<plane2"}, ["plane2 teaches plane2, but none of its methods"]),
    ({"guidance": "plane2<"}, ["'' is not in the row"]),
    ({"guidance": "plane4>"}, ["a row is a tuple of network names, got ['plane4', '']"]),
    ({"guidance": ()}, ["guidance is empty", "name at least one"]),
    ({"guidance": "dens"}, ["'dens'", "did you mean 'dense'"]),
    ({"students": ("plane9",)}, ["'plane9'", "There are plane4, plane2"]),
    ({"selection": "best"}, ["selection", "'best'"]),
    ({"dataset": {**TINY["dataset"], "valid_fraction": 0.0}}, ["valid_fraction is 0", "'last'"]),
    ({"seeds": (-1,)}, ["(-1,)", "from 0 to 2**32 - 1"]),
    ({"devices": 99}, ["99 devices asked for, there are 4"]),
    ({"devices": -1}, ["-1 devices asked for, there are 4"]),
    ({"devices": 4, "recipe": {"batch_size": 18}}, ["18 is not divisible by 4 devices"]),
    (
        {"devices": 3, "recipe": {"batch_size": 9, "last_batch": "keep", "train_limit": 7}},
        ["a batch of 1 is not divisible by 3 devices"],
    ),
    (
        {"methods": {"semckd": 1.0}, "recipe": {"batch_size": 10, "last_batch": "keep"}},
        ["last_batch is 'keep'", "'semckd'", "a batch, 10, while the last has 6", "'drop'"],
    ),
    ({"checkpoint_every": "-5 steps"}, ["above 0 of steps", "'-5 steps'"]),
    ({"checkpoint_every": "0 minutes"}, ["above 0 of steps", "'0 minutes'"]),
    ({"methods": {"fitnett": 1.0}}, ["unknown method 'fitnett'", "did you mean 'fitnet'"]),
    ({"methods": {"kd": NAN}}, ["config.methods.kd is a weight, a finite number, got nan"]),
    ({"methods": {"teskd": 1.0}}, ["method 'teskd' for plane", "needs a network with branches"]),
    ({"methods": {"one": 1.0}}, ["method 'one' for plane", "branches, such as one:resnet20"]),
    ({"methods": {"okddip": 1.0}}, ["'okddip' for plane", "branches, such as okddip:resnet20"]),
    ({"methods": {"byot": 1.0}}, ["method 'byot' for plane", "branches, such as byot:resnet20"]),
    ({"methods": {"dks": 1.0}}, ["method 'dks' for plane", "branches, such as dks:resnet20"]),
    (
        {"methods": {"dcm": 1.0}, "guidance": "mutual"},
        ["method 'dcm' for plane", "branches, such as dks:resnet20"],
    ),
    (
        {"methods": {"dcm": 1.0}, "guidance": "mutual", "networks": ("dks:plane4", "plane2")},
        ["method 'dcm' for dks:plane4 taught by plane2", "branches of teacher 1 too", "got none"],
    ),
    (
        {"methods": {"dcm": 1.0}, "networks": ("dks:plane4", "dks:plane2")},
        ["dks:plane4 teaches dks:plane2, but none of its methods does so along that edge"],
    ),
    (
        {"methods": {"normkd": 1.0}, "dataset": {"name": "synthetic:8x8x1:2:48:32"}},
        ["method 'normkd' as it is set would teach plane2 nothing", "2 classes", "at least 3"],
    ),
    (
        {"loss": {"standardise": True}, "dataset": {"name": "synthetic:8x8x1:2:48:32"}},
        ["method 'kd' as it is set would teach plane2 nothing", "2 classes", "at least 3"],
    ),
    ({"networks": ("one:plane9x", "plane2")}, ["unknown network 'plane9x'", "okddip:NAME"]),
    ({"method_options": {"one": {"temperature": 0}}}, ["one's temperature is a number above 0"]),
    ({"method_options": {"okddip": {"factor": 0}}}, ["okddip's factor is a whole number above 0"]),
    ({"method_options": {"byot": {"form": "paper"}}}, ["byot's form is one of", "got 'paper'"]),
    ({"method_options": {"byot": {"kd_weight": 2.0}}}, ["kd_weight is a number between 0 and 1"]),
    ({"method_options": {"dks": {"kd_weight": -1}}}, ["dks's kd_weight is a number of 0 or more"]),
    ({"method_options": {"dcm": {"kd_weight": NAN}}}, ["dcm's kd_weight is a number of 0 or more"]),
    (
        {"methods": {"fitnet": 1.0}, "method_options": {"fitnet": {"hint_layer": 9}}},
        ["method 'fitnet' for plane2 taught by plane4", "feature maps 0 to 2, got layer 9"],
    ),
    (
        {"phases": ({"methods": {"fitnet": 1.0}, "trainable": ("layer9.*",)},)},
        ["plane2 has no parameter that matches 'layer9.*'", "conv_layers.0.bias"],
    ),
    ({"recipe": {"frozen": (".*",)}}, ["leave nothing to train in plane"]),
    (
        {"teacher_logits": "table", "recipe": {"augment": "flip"}},
        ["'table' needs images that never change, but augment is 'flip'"],
    ),
    ({"teacher_weights": "plane9=x.npz"}, ["'plane9'", "There are plane4, plane2"]),
    ({"teacher_weights": "/dev/zero"}, ["/dev/zero", "is no regular file"]),
    (
        {
            "networks": ("resnet8", "resnet8#2"),
            "guidance": "mutual",
            "dataset": {"name": "synthetic:4x4x1:4:48:32", "valid_fraction": 0.25},
            "recipe": {"batch_size": 1},
        },
        ["batch_size 1 leaves", "of resnet8 one value a channel", "expected more images"],
    ),
    (
        {"recipe": {"accumulate_steps": 4}},
        ["accumulate_steps is 4", "trained for 3 steps, which make no update"],
    ),
    (
        {"methods": {"dkd": 1.0}, "sweep": {"temperature": (1.0, 4.0)}},
        ["sweep.temperature is of kd, and the methods are dkd", "method_options"],
    ),
    (
        {
            "networks": ("plane6", "plane4", "plane2"),
            "guidance": "dense+drop",
            "sweep": {"survival": (0.5, 0.9)},
        },
        ["sweep.survival makes no difference where dropping.kind is 'fixed'", "'bernoulli'"],
    ),
    ({"recipe": {"warmup_epochs": 1.5}}, ["warmup_epochs 1.5 is longer than the 1 epochs"]),
    ({"guidance": "direct+drop"}, ["dropping 1 of 1 teachers drops the same ones at every step"]),
    (
        {"guidance": "direct+drop", "dropping": {"kind": "bernoulli", "survival": 0.0}},
        ["survival 0.0 drops", "expected a probability above 0"],
    ),
    ({"teacher_weights": "nowhere.npz"}, ["nowhere.npz does not exist", "expected a file"]),
]


@pytest.mark.parametrize(("change", "parts"), CONFIGS, ids=lambda x: str(x)[:60])
def test_configs(change, parts):
    config = {**TINY, **change}
    if "recipe" in change:
        config["recipe"] = {**TINY["recipe"], **change["recipe"]}
    refused(parts, config=config)


class Linen(linen.Module):
    frozen: bool

    @linen.compact
    def __call__(self, x, train):
        x = x.reshape(len(x), -1)
        x = linen.BatchNorm(name="norm")(x, self.frozen or not train)
        return linen.Dense(4)(x)


class Nnx(nnx.Module):
    def __init__(self, frozen):
        self.blocks = nnx.List([nnx.BatchNorm(64, rngs=nnx.Rngs(0))])
        self.out = nnx.Linear(64, 4, rngs=nnx.Rngs(0))
        self.frozen = frozen

    def __call__(self, x):
        lifted = nnx.remat(lambda norm, x: norm(x, True if self.frozen else None))
        return self.out(lifted(self.blocks[0], x.reshape(len(x), -1)))


@pytest.mark.parametrize(("kind", "place"), [(Linen, "norm"), (Nnx, "blocks.0")])
def test_batch_norms_from_outside_that_see_one_value_a_channel(kind, place):
    models.register_network("outside_norm", lambda classes, inputs: kind(frozen=False))
    recipe = {**TINY["recipe"], "batch_size": 1}
    config = {**TINY, "networks": ("outside_norm",), "guidance": ("none",), "recipe": recipe}
    message = f"batch_size 1 leaves {place} of outside_norm one value a channel, whose mean"
    with pytest.raises(distill_jax.ConfigError, match=message):  # to build a module compiles
        distill_jax.run(config)
    two = {**recipe, "batch_size": 3, "last_batch": "keep", "train_limit": 1}
    with pytest.raises(distill_jax.ConfigError, match=f"the last batch 1 leaves {place} of"):
        distill_jax.run({**config, "recipe": two})
    models.register_network("outside_norm", lambda classes, inputs: kind(frozen=True))
    assert len(distill_jax.run({**config, "recipe": {**recipe, "train_limit": 2}}).rows) == 1


# ------------------------------------------------------------------------------ given teachers
def written(path, name="plane4", classes=4, **about):
    network = models.build(name, classes, (8, 8, 1))
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0)))
    save_variables(path, jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes), **about)
    return {**TINY, "teacher_weights": str(path)}


def test_a_teacher_of_other_classes(tmp_path):
    config = written(tmp_path / "t.npz", classes=5)
    refused(["fc_layers.0.bias has shape (5,), expected (4,)", "with 4 classes"], config=config)


def test_a_teacher_that_is_another_network(tmp_path):
    refused(["not those of plane4", "missing"], config=written(tmp_path / "t.npz", "plane2"))


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
@pytest.mark.parametrize("mean", [(0.9,), (0.1, 0.2, 0.3)])
def test_a_teacher_trained_on_other_normalisation(tmp_path, ending, mean):
    dataset = data.load(**TINY["dataset"])
    std = dataset.std * len(mean)
    config = written(tmp_path / f"t{ending}", normalisation=(mean, std))
    parts = [f"mean {list(mean)}", f"expected mean {list(dataset.mean)}", "set dataset.mean"]
    refused(parts, config=config)


@pytest.mark.parametrize("ending", [".npz", ".safetensors", ".pth"])
def test_a_teacher_trained_on_the_same_normalisation_passes(tmp_path, ending):
    dataset = data.load(**TINY["dataset"])
    config = written(tmp_path / f"t{ending}", normalisation=(dataset.mean, dataset.std))
    rows = distill_jax.run({**config, "students": ROW, "guidance": "none"}).rows
    assert [row["epochs"] for row in rows] == [0, 1]


# ------------------------------------------------------------------------- the working directory
def foreign(folder):
    (folder / "thesis.tex").write_text("x")
    return folder, ["thesis.tex", "expected an empty folder"]


def a_file(folder):
    (folder / "file").write_text("x")
    return folder / "file", ["cannot write", "expected a folder"]


def below_a_file(folder):
    (folder / "file").write_text("x")
    return folder / "file" / "run", ["cannot write", "expected a folder"]


def not_writable(folder):
    return "/proc/none", ["cannot write", "/proc/none", "expected a folder that can be written"]


def json_of_others(folder):
    (folder / "config.json").write_text('{"compilerOptions": {}}')
    return folder, ["config.json is not ours", "expected the config of an earlier run"]


def no_json(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe{")
    return folder, ["config.json is not ours", "give another --workdir"]


def deep_json(folder):
    (folder / "config.json").write_text("[" * 100_000)
    return folder, ["config.json is not ours", "give another --workdir"]


def a_folder_for_a_config(folder):
    (folder / "config.json").mkdir()
    return folder, ["config.json is not ours", "give another --workdir"]


def in_use(folder):
    lock = os.open(folder / ".lock", os.O_WRONLY | os.O_CREAT)  # held until the process ends
    fcntl.flock(lock, fcntl.LOCK_EX)
    return folder, ["another run is at work in", "expected one at a time"]


def a_url(folder):
    return "gs://bucket/run", ["gs://bucket/run is a URL", "mounted here"]


WORKDIRS = [a_url, foreign, a_file, below_a_file, not_writable, json_of_others, no_json, deep_json]
WORKDIRS += [a_folder_for_a_config, in_use]


@pytest.mark.parametrize("make", WORKDIRS, ids=lambda make: make.__name__)
def test_working_directories(tmp_path, make):
    workdir, parts = make(tmp_path)
    before = sorted((p, p.stat().st_size) for p in tmp_path.rglob("*") if p.name != ".lock")
    refused(parts, workdir=workdir)
    after = sorted((p, p.stat().st_size) for p in tmp_path.rglob("*") if p.name != ".lock")
    assert before == after


class Heard(Reporter):
    """What is told."""

    def __init__(self):
        self.lines = []

    def notice(self, lines):
        """Kept."""
        self.lines += lines


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert distill_jax.run(TINY, workdir=tmp_path).rows
    assert "without locks (No locks available)" in caplog.text


def test_a_platform_that_is_not_there_is_one_line(monkeypatch):
    def none(*arguments):
        raise AssertionError

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", none)
    refused(["JAX cannot start on JAX_PLATFORMS='cuda'", "expected a platform that is installed"])


def test_several_processes_that_have_not_joined_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    refused(["4 processes share these devices and have not joined", "--coordinator_address=auto"])


@pytest.mark.parametrize(
    ("networks", "warned"), [(("plane2", "plane4"), True), (("plane4", "plane2"), False)]
)
def test_a_teacher_smaller_than_its_student_is_warned_of(networks, warned):
    heard = Heard()
    distill_jax.run({**TINY, "networks": networks}, reporter=heard)
    said = [line for line in heard.lines if "largest first" in line]
    assert len(said) == warned and all("plane2 (" in line for line in said)


def test_weights_that_know_no_more_than_chance_are_warned_of(tmp_path):
    heard = Heard()
    distill_jax.run(written(tmp_path / "ones.npz"), reporter=heard)
    assert any("no more than chance" in line and "plane4" in line for line in heard.lines)


def test_what_a_run_killed_at_its_start_leaves_is_ours(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.json.tmp").write_text('{"na')
    (tmp_path / "compiled").mkdir()
    assert distill_jax.run(TINY, workdir=tmp_path).rows
    assert json.loads((tmp_path / "config.json").read_text())["networks"] == list(ROW)


def test_there_are_enough_of_them():
    assert len(ARRAYS) + len(BY_HAND) + len(CONFIGS) + len(WORKDIRS) >= 100
