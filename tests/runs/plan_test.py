"""Ids of stages: digests of all that determines a stage, and of nothing else."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from distill_jax import data, methods
from distill_jax.methods import Method, Term
from distill_jax.methods.fitnet import FitNet
from distill_jax.runs import plan as plan_lib
from distill_jax.runs.config import resolve
from distill_jax.runs.ids import _recipe_spec, digest_of
from distill_jax.train import optim
from distill_jax.train.optim import OptimOptions
from distill_jax.train.sharding import Topology
from distill_jax.train.stage import Recipe

TINY = {
    "dataset": {"name": "synthetic:8x8x1:4:48:32", "valid_fraction": 0.25},
    "networks": ("plane4", "plane2"),
    "guidance": ("direct",),
    "recipe": {"epochs": 2, "batch_size": 12},
}


def plan_of(**changes):
    config = {**TINY, **changes}
    return plan_lib.make_plan(resolve(config), data.load(**config["dataset"]), "data")


def id_of(**changes):
    """The id of the student's stage."""
    return plan_of(**changes).results["direct", "plane2", 0]


# ------------------------------------------------------------------------------------------ specs
def test_a_spec_holds_what_is_not_at_its_default():
    plan = plan_of()
    teacher, student = plan.specs.values()
    assert teacher == {
        "network": ["plane4", "float32"],
        "data": "data",
        "recipe": {"epochs": 2, "batch_size": 12, "optim": {"learning_rate": 0.01}},
        "methods": [{"name": "ce"}],
        "seed": 0,
        "teachers": (),
    }
    numbers = {"temperature": 4.0, "kd_weight": 0.5}
    assert student["recipe"] == {**teacher["recipe"], **numbers}
    assert [method["name"] for method in student["methods"]] == ["ce", "kd"]
    assert student["methods"][1] == {"name": "kd", "options": {"options": {"teachers": "mean"}}}
    assert student["teachers"] == tuple(list(plan.stages)[:1])


def test_a_field_added_at_its_default_leaves_every_spec_alone():
    @dataclasses.dataclass(frozen=True)
    class LaterOptim(OptimOptions):
        added: int = 0

    @dataclasses.dataclass(frozen=True)
    class LaterRecipe(Recipe):
        added: tuple = ()

    @dataclasses.dataclass(frozen=True)
    class LaterFitNet(FitNet):
        added: float = 1.0

    for fields in ({}, {"epochs": 3, "kd_weight": 0.5, "temperature": 2.0}):
        for taught in (True, False):
            later = LaterRecipe(**fields, optim=LaterOptim(learning_rate=0.3))
            now = Recipe(**fields, optim=OptimOptions(learning_rate=0.3))
            assert _recipe_spec(later, taught) == _recipe_spec(now, taught)
    changed = LaterRecipe(optim=LaterOptim(added=1), added=(1,))
    assert _recipe_spec(changed, True) == {"optim": {"added": 1}, "added": (1,)}
    for options in ({}, {"hint_layer": 1}):
        later, now = LaterFitNet(**options), FitNet(**options)
        assert methods.identity_of("fitnet", later) == methods.identity_of("fitnet", now)


# -------------------------------------------------------------------------------------------- ids
def test_ids_of_earlier_runs_are_found_again():
    assert id_of() == "da74c78680779056"
    recipe = {**TINY["recipe"], "label_smoothing": 0.0}
    assert id_of(recipe=recipe) == id_of()
    assert id_of(recipe={**recipe, "label_smoothing": 0.1}) != id_of()


def test_ids_differ_by_method_weight_option_and_phase():
    kd, fitnet = {"kd": 1.0}, {"kd": 1.0, "fitnet": 1.0}
    variants = [
        {},
        {"methods": {"kd": 0.5}},
        {"methods": {"fitnet": 1.0}},
        {"methods": fitnet},
        {"methods": {**fitnet, "fitnet": 2.0}},
        {"methods": {**kd, "ce": 1.0}},
        {"methods": fitnet, "method_options": {"fitnet": {"hint_layer": 1}}},
        {"methods": fitnet, "method_options": {"fitnet": {"teacher_layer": 1}}},
        {"overrides": {"plane2": {"methods": {"ce": 2.0}}}},
        {"phases": ({"epochs": 1},)},
        {"phases": ({"epochs": 1}, {"epochs": 1})},
        {"phases": ({"epochs": 1, "trainable": ("conv_layers.*",)},)},
    ]
    assert len({id_of(**changes) for changes in variants}) == len(variants)
    # What is written out at its default, or concerns nobody, makes no other stage.
    assert id_of(methods=kd) == id_of(method_options={"fitnet": {"hint_layer": 1}}) == id_of()


@pytest.mark.parametrize(
    "chosen",
    [
        {"kd": 1.0},
        {"tfkd_self": 1.0},
        {"tfkd_reg": 1.0, "dkd": 1.0},
        {"label_smoothing": 1.0, "tfkd_self": 2.0, "kd": 1.0},
        {"tfkd_self": 1.0, "ce": 0.5},
    ],
)
def test_what_a_taught_network_is_alone_is_what_guidance_none_trains(chosen):
    plan = plan_of(methods=chosen, guidance=("none", "direct"))
    taught, alone = (plan.results[guidance, "plane2", 0] for guidance in ("direct", "none"))
    assert plan.plain[taught] == alone


@dataclasses.dataclass(frozen=True)
class Half(Method):
    """Adds nothing, half of the time."""

    number: float = 0.5

    def terms(self, variables, context):
        return {"half": Term(context.labels * 0.0, self.number)}, variables


def one_loss(student, teacher, labels, hyper):
    return ((student.logits - teacher.logits) ** 2).sum(-1)


def other_loss(student, teacher, labels, hyper):
    return ((student.logits - teacher.logits) ** 2).mean(-1)


def test_ids_differ_by_what_a_registered_method_is(monkeypatch):
    monkeypatch.setattr(methods.registry, "_registered", {})
    things = [
        *((one_loss, "1"), (one_loss, "2"), (other_loss, "1")),
        *((Half(), "1"), (Half(0.25), "1"), (Half(), "3")),
    ]
    ids = []
    for thing, version in (*things, *things):
        methods.register_method("mine", thing, version)
        ids.append(id_of(methods={"mine": 1.0}))
    assert len(set(ids)) == len(things) and ids == 2 * ids[: len(things)]
    methods.register_method("mine", Half())
    numbers = {"methods": {"mine": 1.0}, "method_options": {"mine": {"number": 2.0}}}
    assert id_of(**numbers) not in ids


def test_the_numbers_of_kd_are_part_of_what_a_registered_method_may_read_alone(monkeypatch):
    class Alone(Half):
        taught = False

    monkeypatch.setattr(methods.registry, "_registered", {})
    methods.register_method("mine", Alone())
    recipes = [{**TINY["recipe"], "temperature": t} for t in (2.0, 3.0)]
    for own, count in ({"mine": 1.0}, 2), ({"kd": 1.0}, 1):
        plans = [plan_of(methods=own, guidance=("none",), recipe=recipe) for recipe in recipes]
        assert len({plan.results["none", "plane2", 0] for plan in plans}) == count


def test_ids_differ_by_what_a_registered_optimizer_is(monkeypatch):
    monkeypatch.setattr(optim, "_registered", {})
    ids = []
    for build, version in (
        (lambda schedule, hyper: optax.sgd(schedule), "1"),
        (lambda schedule, hyper: optax.sgd(schedule, 0.9), "1"),
        (lambda schedule, hyper: optax.sgd(schedule), "2"),
    ):
        optim.register_optimizer("mine", build, version)
        ids.append(id_of(recipe={**TINY["recipe"], "optimizer": "mine"}))
    assert len(set(ids)) == 3


# ------------------------------------------------------------------------------------------- data
def numbered(count):
    rng = np.random.default_rng(count)
    return rng.integers(0, 256, (count, 6, 5, 3), np.uint8), np.arange(count, dtype=np.int32) % 5


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_a_digest_of_data_moves_with_every_part(part):
    def build(classes=5, change=None, **options):
        pairs = {"train": numbered(60), "valid": numbered(20), "test": numbered(40)}
        if change is not None:
            flat = pairs[part][change].reshape(-1)
            flat[7] = (flat[7] + 1) % 5
        return data.from_arrays(**pairs, classes=classes, **options)

    whole = digest_of(build(mean=(0.5,) * 3, std=(0.2,) * 3))
    assert len(whole) == 64
    assert whole == digest_of(build(mean=(0.5,) * 3, std=(0.2,) * 3, name="other"))
    digests = {whole, digest_of(build()), digest_of(build(classes=6))}
    for change in (0, 1):
        digests.add(digest_of(build(change=change, mean=(0.5,) * 3, std=(0.2,) * 3)))
    assert len(digests) == 5


def test_a_digest_of_data_moves_where_examples_go_to_another_split():
    images, labels = numbered(100)
    digests = set()
    for cut in (60, 59):
        pairs = (images[:cut], labels[:cut]), (images[cut:], labels[cut:])
        dataset = data.from_arrays(
            *pairs, classes=5, valid_fraction=0, mean=(0.5,) * 3, std=(1,) * 3
        )
        digests.add(digest_of(dataset))
    assert len(digests) == 2


@pytest.mark.parametrize("other", ["select_by", "code"])
def test_a_digest_of_data_moves_with_what_chooses_the_weights(other):
    def build(select_by="accuracy", worst=lambda logits, labels: (0.0, 1.0)):
        spec = jax.ShapeDtypeStruct((6, 5, 3), np.uint8)
        metrics = {"worst": worst, "top": lambda logits, labels: (1.0, 1.0)}
        task = data.Task(spec, 5, metrics=metrics, select_by=select_by)
        return digest_of(data.from_arrays(numbered(60), numbered(40), task=task))

    if other == "select_by":
        assert len({build(), build("worst"), build("top"), build("worst")}) == 3
    else:
        changed = lambda logits, labels: (1.0, 2.0)  # noqa: E731
        assert build("worst", changed) != build("worst")
        assert build("top", changed) == build("top") and build(worst=changed) == build()


def test_ids_differ_by_the_devices_where_batch_norms_see_each_its_share(monkeypatch):
    def ids(count, **recipe):
        experiment = resolve({**TINY, "recipe": {**TINY["recipe"], **recipe}})
        several = dataclasses.replace(experiment, topology=Topology("jit", count))
        dataset = data.load(**TINY["dataset"])
        return plan_lib.make_plan(several, dataset, "data").results

    assert ids(1) == ids(2) == ids(3)
    apart = [tuple(ids(n, sync_bn=False).values()) for n in (1, 2, 3)]
    assert len(set(apart)) == 3


@dataclasses.dataclass(frozen=True)
class Untaught(Method):
    """Needs no teacher, and looks at a number of the recipe."""

    needs = ()
    taught = False

    def terms(self, variables, context):
        return {"untaught": Term(context.labels * 0.0, context.hyper.temperature)}, variables


def test_ids_differ_by_numbers_that_a_users_method_may_look_at(monkeypatch):
    monkeypatch.setattr(methods.registry, "_registered", {})
    methods.register_method("untaught", Untaught())

    def plain(temperature, **weights):
        recipe = {**TINY["recipe"], "temperature": temperature}
        plan = plan_of(guidance=("none",), methods=weights, recipe=recipe)
        return plan.results["none", "plane2", 0]

    assert plain(2.0, kd=1.0) == plain(3.0, kd=1.0)
    assert plain(2.0, untaught=1.0) != plain(3.0, untaught=1.0)


def test_ids_differ_by_the_order_of_teachers_that_a_users_method_may_tell_apart(monkeypatch):
    monkeypatch.setattr(methods.registry, "_registered", {})
    methods.register_method("half", Half())
    methods.register_method("one_loss", one_loss, needs=("logits",))

    def taught(*teachers, name):
        rows = {"networks": (*teachers, "plane2"), "guidance": ("plane2<plane3+plane4",)}
        return next(iter(plan_of(**rows, methods={name: 1.0}).results.values()))

    for name, alike in (("kd", True), ("one_loss", True), ("half", False)):
        both = taught("plane3", "plane4", name=name), taught("plane4", "plane3", name=name)
        assert (both[0] == both[1]) == alike


def test_the_weight_of_the_labels_counts_beside_methods_that_need_no_teacher():
    def weights(**methods):
        plan = plan_of(guidance=("none",), methods=methods)
        stage = plan.stages[plan.results["none", "plane2", 0]]
        return dict(zip([name for name, _ in stage.methods], stage.weights, strict=True))

    assert weights(cs_kd=2.0, ce=0.25) == {"ce": 0.25, "cs_kd": 2.0}
    assert weights(kd=1.0, ce=0.25) == {"ce": 1.0}  # it is weighed against `kd`
    assert weights(kd=1.0, cs_kd=2.0, ce=0.25) == {"ce": 1.0, "cs_kd": 2.0}
    swept = plan_of(
        guidance=("none",), methods={"cs_kd": 1.0, "ce": 1.0}, sweep={"methods.ce": (0.5, 1.0)}
    )
    assert len(swept.stages) == 2
    both = plan_of(guidance=("none", "direct"), methods={"kd": 1.0, "cs_kd": 2.0, "ce": 0.25})
    taught = both.results["direct", "plane2", 0]
    assert both.plain[taught] == both.results["none", "plane2", 0]


@pytest.mark.parametrize(
    ("guidance", "named", "left_out"),
    [
        ("mutual", {"dml": 1.0, "at": 1.0}, "'at'"),
        ("mutual", {"at": 1.0}, ""),
        ("direct", {"kd": 1.0, "dml": 1.0}, ""),  # as the default has it
        ("none", {"at": 1.0}, ""),
    ],
)
def test_a_method_that_nobody_hears_is_warned_of(guidance, named, left_out):
    changes = {"guidance": (guidance,), "methods": named}
    lines = plan_lib.warnings(plan_of(**changes), resolve({**TINY, **changes}))
    assert len(lines) == bool(left_out) and all(left_out in line for line in lines)
