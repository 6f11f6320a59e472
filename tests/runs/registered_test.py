"""What users register is part of what a folder is of: another thing under its name is refused."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import distill_jax
from distill_jax import data, methods, models
from distill_jax.runs.workdir import WorkdirError
from distill_jax.train import optim

CONFIG = {
    "networks": ("mine_teacher", "plane2"),
    "guidance": ("direct",),
    "recipe": {"epochs": 1, "batch_size": 12, "optimizer": "mine_sgd"},
    "methods": {"kd": 1.0, "mine_loss": 1.0},
}


def dataset():
    return data.load("synthetic:8x8x1:4:48:32", valid_fraction=0.25)


def linear(classes, inputs):
    """A pair (init, apply) of one dense layer."""
    size = inputs.size // inputs.shape[0]

    def init(key):
        return {"params": {"w": 0.1 * jax.random.normal(key, (size, classes))}}

    def apply(variables, x):
        return x.reshape(len(x), -1) @ variables["params"]["w"]

    return init, apply


def cosine(classes, inputs):
    """Another pair with the same shapes."""
    init, apply = linear(classes, inputs)
    return init, lambda variables, x: jnp.cos(apply(variables, x))


def squares(student, teacher, labels, hyper):
    return ((student.logits - teacher.logits) ** 2).sum(-1)


def distances(student, teacher, labels, hyper):
    return jnp.abs(student.logits - teacher.logits).sum(-1)


def sgd(schedule, hyper):
    return optax.sgd(schedule)


def momentum(schedule, hyper):
    return optax.sgd(schedule, 0.9)


def doubled(schedule, hyper):
    """Another optimizer whose state looks the same."""
    return optax.sgd(lambda step: 2 * schedule(step))


def register(network=linear, loss=squares, optimizer=sgd, version="1"):
    models.register_network("mine_teacher", network, version)
    methods.register_method("mine_loss", loss, version, needs=("logits",))
    optim.register_optimizer("mine_sgd", optimizer, version)


@pytest.fixture(scope="module", autouse=True)
def registries():
    """Leaves the names that there were."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.registry, "_REGISTERED", dict(models.registry._REGISTERED))
        patch.setattr(methods.registry, "_registered", dict(methods.registry._registered))
        patch.setattr(optim, "_registered", dict(optim._registered))
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory, registries):
    """A folder that has used all three, and its rows."""
    register()
    folder = tmp_path_factory.mktemp("done")
    return folder, distill_jax.run(CONFIG, workdir=folder, dataset=dataset()).rows


def test_registered_names_are_used_and_noted(done):
    folder, rows = done
    assert rows[0]["teachers"] == ["mine_teacher"]
    noted = json.loads((folder / "config.json").read_text())["resolved"]["registered"]
    names = {kind: list(table) for kind, table in noted.items()}
    assert names == {
        "networks": ["mine_teacher"],
        "methods": ["mine_loss"],
        "optimizers": ["mine_sgd"],
    }
    register()  # the same once more
    assert distill_jax.run(CONFIG, workdir=folder, dataset=dataset()).rows == rows


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({"network": cosine}, ["registered.networks.mine_teacher.repr is "]),
        ({"loss": distances}, ["registered.methods.mine_loss.repr is "]),
        ({"optimizer": momentum}, ["registered.optimizers.mine_sgd.repr is "]),
        (
            {"version": "2"},
            [
                f"registered.{name}.version is '1' there and '2' here"
                for name in ("networks.mine_teacher", "methods.mine_loss", "optimizers.mine_sgd")
            ],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_thing_under_a_used_name_is_refused_by_name(done, change, lines):
    folder, _ = done
    register(**change)
    with pytest.raises(WorkdirError, match="holds another experiment") as caught:
        distill_jax.run(CONFIG, workdir=folder, dataset=dataset())
    for line in lines:
        assert line in str(caught.value)
    assert str(caught.value).count(" there and ") == len(lines)


def test_names_may_come_and_go_and_stay_taken(tmp_path):
    """Controls are no other experiment, whatever they use; but what a name has meant, it means."""
    register()
    config = {**CONFIG, "networks": ("plane2",), "guidance": ("none",), "methods": {"kd": 1.0}}
    config["recipe"] = {**CONFIG["recipe"], "optimizer": "sgd"}
    control = {**config, "controls": {"mine": {"optimizer": "mine_sgd"}}}
    for wanted in (config, control, config):
        distill_jax.run(wanted, workdir=tmp_path, dataset=dataset())
    register(optimizer=momentum)
    distill_jax.run(config, workdir=tmp_path, dataset=dataset())
    with pytest.raises(WorkdirError, match=r"registered\.optimizers\.mine_sgd\.repr is"):
        distill_jax.run(control, workdir=tmp_path, dataset=dataset())


def test_a_name_registered_anew_is_trained_anew():
    """In one process, where what was compiled for the name before is still at hand."""
    config = {**CONFIG, "networks": ("plane2",), "guidance": ("none",), "methods": {"kd": 1.0}}
    digests = []
    for optimizer in (sgd, doubled, sgd):
        register(optimizer=optimizer)
        rows = distill_jax.run(config, dataset=dataset()).rows
        digests.append(rows[0]["state_digest"])
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda schedule, hyper: 3, "its builder gives 3: expected an optax.GradientTransf"),
        (lambda schedule: optax.sgd(schedule), "cannot be run: TypeError: .*2 were given"),
        (lambda schedule, hyper: optax.lbfgs(schedule), "cannot be run: TypeError: .*'value_fn'"),
        (
            lambda schedule, hyper: optax.sgd(0.2 if hyper.weight_decay > 0 else 0.1),
            "cannot be run: TracerBoolConversionError: .* its numbers are traced",
        ),
    ],
)
def test_an_optimizer_that_cannot_be_run_is_refused_before_training(build, message, tmp_path):
    register(optimizer=build)
    with pytest.raises(distill_jax.ConfigError, match=f"optimizer 'mine_sgd'.*{message}"):
        distill_jax.run(CONFIG, workdir=tmp_path / "run", dataset=dataset())
    assert not (tmp_path / "run").exists()


@dataclasses.dataclass(frozen=True)
class Given(methods.Method):
    """A method that gives what it is told to, and has a number that it keeps."""

    give: Callable[[dict, methods.Context], Any]

    def init(self, key, shapes):
        return {"params": {"w": jnp.ones(2)}, "memory": {"n": jnp.zeros(())}}

    def terms(self, variables, context):
        return self.give(variables, context)


def value(context):
    return {"mine": methods.Term(jnp.mean(context.student.logits**2, -1))}


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda v, c: value(c), "gives dict: expected two dicts"),
        (lambda v, c: (value(c), None), r"gives \['dict', 'NoneType'\]: expected two dicts"),
        (lambda v, c: ({"mine": c.labels}, v), "gives mine as .*Tracer: expected a Term"),
        (lambda v, c: (value(c), {"params": v["params"]}), r"keeps {} of its variables: expected"),
        (
            lambda v, c: (value(c), {**v, "memory": {"n": c.labels}}),
            r"keeps .*int32 \(\d+,\).* expected what it was given, {'memory': {'n': float32 \(\)}}",
        ),
        (lambda v, c: (value(c), v["other"]), "by mine_loss cannot be computed: KeyError: 'other'"),
        (
            lambda v, c: (value(c) if c.epoch > 0 else {}, v),
            "by mine_loss cannot be computed: TracerBoolConversionError",
        ),
    ],
)
def test_a_method_whose_terms_are_none_is_refused_before_training(give, message, tmp_path):
    register()
    methods.register_method("mine_loss", Given(give))
    with pytest.raises(distill_jax.ConfigError, match=message):
        distill_jax.run(CONFIG, workdir=tmp_path / "run", dataset=dataset())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("needs", [("features",), "feature"])
def test_needs_that_are_no_outputs_are_refused(needs):
    @dataclasses.dataclass(frozen=True)
    class Needing(Given):
        pass

    Needing.needs = needs
    with pytest.raises(ValueError, match="needs of method 'mine_loss' are .*: expected a tuple"):
        methods.register_method("mine_loss", Needing(lambda v, c: (value(c), v)))
