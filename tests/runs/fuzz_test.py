"""Random rows, configs and masks: what holds for every one of them."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import distill_jax
from distill_jax import data, graph
from distill_jax.runs import plan as plan_lib
from distill_jax.runs.config import ConfigError, Experiment, default_config, resolve
from distill_jax.runs.ids import digest_of
from distill_jax.train.dropping import Dropping, keep_mask

ROW = ("plane6", "plane4", "plane2")
BASE = {
    "dataset": {"name": "synthetic:8x8x1:4:48:32", "valid_fraction": 0.25},
    "networks": ROW,
    "guidance": ("dense",),
    "recipe": {"epochs": 2, "batch_size": 12},
}
QUICK = settings(deadline=None, max_examples=60)


# ------------------------------------------------------------------------------------------- rows
@given(st.lists(st.sampled_from("abcdef"), max_size=7), st.sampled_from(["a>b", "b<a", "chain"]))
def test_chains_are_trained_or_refused_in_words(along, also):
    names = tuple("abcdef")
    for spec in (">".join(along), also + ";" + "+".join(along), "<".join(along)):
        try:
            row = graph.from_spec(spec, names)
        except graph.GraphError as error:
            assert str(error)
            continue
        planned = [name for one in graph.plan(row) for name in one.networks]
        assert len(set(planned)) == len(planned) and set(planned) <= set(names)
    possible = len(along) > 1 and len(set(along)) == len(along)
    try:
        row = graph.path(names, along)
        assert possible and row.matrix().sum() == len(along) - 1
    except graph.GraphError:
        assert not possible


# -------------------------------------------------------------------------------------------- ids
@functools.cache
def dataset(**changes):
    return data.load(**{**BASE["dataset"], **changes})


def ids(config, given=None):
    """(network, teachers' names) -> id, of all stages of a config; seeds one at a time."""
    used = dataset() if given is None else given
    plan = plan_lib.make_plan(resolve(config), used, digest_of(used))
    return {
        (stage.network.name, *(teacher.name for teacher in stage.teachers)): stage_id
        for stage_id, stage in plan.stages.items()
    }


def changed(path, value):
    config = {**BASE, "recipe": dict(BASE["recipe"])}
    place = config
    for name in path[:-1]:
        place = place.setdefault(name, {})
    place[path[-1]] = value
    return config


positive = st.floats(0.001, 0.9).map(lambda x: round(x, 3))
MATTER = {
    ("seeds",): st.integers(1, 2**32 - 1).map(lambda x: (x,)),
    ("recipe", "epochs"): st.integers(3, 10**6),
    ("recipe", "batch_size"): st.integers(1, 11),
    ("recipe", "last_batch"): st.just("keep"),
    ("recipe", "augment"): st.sampled_from(["flip", "crop_flip"]),
    ("recipe", "train_limit"): st.integers(1, 9),
    ("recipe", "sync_bn"): st.just(False),
    ("recipe", "mixup"): positive,
    ("recipe", "cutmix"): positive,
    ("recipe", "label_smoothing"): positive,
    ("recipe", "ema"): positive,
    ("recipe", "optimizer"): st.just("adamw"),
    ("recipe", "learning_rate"): positive.filter(lambda x: x != 0.05),
    ("recipe", "momentum"): positive.filter(lambda x: x != 0.9),
    ("recipe", "nesterov"): st.just(True),
    ("recipe", "weight_decay"): positive,
    ("recipe", "schedule"): st.sampled_from(["cosine", "piecewise"]),
    ("recipe", "warmup_epochs"): positive,
    ("recipe", "clip_norm"): positive,
    ("recipe", "accumulate_steps"): st.integers(2, 9),
    ("recipe", "decayed"): st.just("kernels"),
    ("recipe", "trainable"): st.just(("fc.*",)),
    ("recipe", "frozen"): st.just(("conv1.*",)),
    ("dtype",): st.just("bfloat16"),
    ("selection",): st.sampled_from(["test", "last"]),
}
OF_TEACHERS = {  # matter where there is a teacher, and only there
    ("recipe", "temperature"): positive,
    ("recipe", "kd_weight"): positive.filter(lambda x: x != 0.5),
    ("loss", "kl_reduction"): st.just("element_mean"),
    ("loss", "cross_entropy"): st.sampled_from(["per_teacher", "per_kept_teacher"]),
    ("loss", "teachers"): st.just("sum"),
    ("methods",): st.sampled_from(
        [{"kd": 0.5}, {"kd": 1.0, "fitnet": 1.0}, {"kd": 1.0, "ce": 1.0}]
    ),
    ("phases",): st.sampled_from([({"epochs": 1},), ({"methods": {"fitnet": 1.0}},)]),
}
RESUMABLE = {
    ("name",): st.text(max_size=5),
    ("checkpoint_every",): st.integers(1, 999).map(lambda n: f"{n} steps"),
    ("devices",): st.integers(0, 4),
    ("workers",): st.integers(0, 4),
    ("tensorboard",): st.just(True),
    ("parallel",): st.sampled_from(["jit", "pmap"]),
    ("students",): st.sampled_from([("plane2", "plane4"), ROW]),
    ("controls",): st.just({"more": {"epochs": 9}}),
}


def change_of(table):
    return st.sampled_from(sorted(table)).flatmap(lambda p: st.tuples(st.just(p), table[p]))


@QUICK
@given(change_of(MATTER))
def test_what_matters_changes_every_id(change):
    assert not set(ids(changed(*change)).values()) & set(ids(BASE).values())


@QUICK
@given(change_of(OF_TEACHERS))
def test_what_matters_to_the_taught_changes_theirs_alone(change):
    before, after = ids(BASE), ids(changed(*change))
    assert before.keys() == after.keys()
    for stage, stage_id in before.items():
        taught = len(stage) > 1
        assert (after[stage] != stage_id) == taught, stage


@QUICK
@given(change_of(RESUMABLE))
def test_what_does_not_matter_changes_none(change):
    before, after = ids(BASE), ids(changed(*change))
    assert all(after[stage] == stage_id for stage, stage_id in before.items())


@QUICK
@given(st.sampled_from(ROW), change_of({p[1:]: s for p, s in MATTER.items() if p[0] == "recipe"}))
def test_an_override_changes_its_network_and_all_that_it_teaches(network, change):
    (field,), value = change
    before = ids(BASE)
    after = ids({**BASE, "overrides": {network: {field: value}}})
    for stage, stage_id in before.items():
        assert (after[stage] != stage_id) == (network in stage), stage


distill_jax.register_method("gap", lambda s, t, labels, hyper: (s.logits - t.logits)[:, 0])
NAMES = ("plane6", "plane4", "plane2", "plane2#2")


@st.composite
def graphs(draw):
    """Edges between networks, in any direction, as a matrix; the order in which a row has them."""
    bits = draw(st.lists(st.booleans(), min_size=16, max_size=16))
    return np.reshape(bits, (4, 4)), draw(st.permutations(range(4)))


def above(matrix, name):
    """The edges between a network and all that teach it, through whomever."""
    reached = {name}
    while more := {NAMES[j] for i, j in np.argwhere(matrix) if NAMES[i] in reached} - reached:
        reached |= more
    return name, frozenset(
        (NAMES[i], NAMES[j]) for i, j in np.argwhere(matrix) if NAMES[i] in reached
    )


@QUICK
@given(graphs(), graphs())
def test_ids_are_equal_where_all_that_teaches_is_whatever_the_order_of_the_row(one, other):
    known = {}
    for matrix, order in (one, other):
        row = tuple(NAMES[i] for i in order)
        config = {**BASE, "networks": row, "students": row, "methods": {"gap": 1.0}}
        config["guidance"] = (matrix[np.ix_(order, order)],)
        plan = plan_lib.make_plan(resolve(config), dataset(), "data")
        for (_, name, _), stage_id in plan.results.items():
            assert known.setdefault(above(matrix, name), stage_id) == stage_id
        for together in plan.together.values():
            assert all(plan.together[other] == together for other in together)
    assert len(set(known.values())) == len(known)


@QUICK
@given(st.integers(0, 2), st.data())
def test_one_bit_of_the_data_changes_every_id(part, draws):
    whole = dataset()
    arrays = [getattr(whole, name).images.copy() for name in ("train", "valid", "test")]
    place = draws.draw(st.integers(0, arrays[part].size - 1))
    arrays[part].flat[place] ^= 1 << draws.draw(st.integers(0, 7))
    other = dataclasses.replace(
        whole,
        **{
            name: data.Split(images, getattr(whole, name).labels)
            for name, images in zip(("train", "valid", "test"), arrays, strict=True)
        },
    )
    assert not set(ids(BASE, other).values()) & set(ids(BASE).values())


def test_ids_are_the_same_in_another_process():
    code = "import fuzz_test as f; print(*sorted(f.ids(f.BASE).values()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=os.path.dirname(__file__),
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == sorted(ids(BASE).values())


# ---------------------------------------------------------------------------------------- configs
DEFAULTS = default_config().to_dict()
PLACES = [(name,) for name in DEFAULTS] + [
    (section, name)
    for section, fields in DEFAULTS.items()
    if isinstance(fields, dict)
    for name in fields
]
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["dense", "plane2", "plane4>plane2", "last", "keep", "cosine", "5 steps"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(PLACES), anything), max_size=3))
def test_any_config_is_an_experiment_or_a_refusal_in_words(changes):
    config: dict = {}
    for path, value in changes:
        place = config
        for name in path[:-1]:
            place = place.setdefault(name, {})
            assume(isinstance(place, dict))
        place[path[-1]] = value
    try:
        experiment = resolve(config)
    except ConfigError as error:
        assert len(str(error)) > 10
    else:
        assert isinstance(experiment, Experiment)
        assert resolve(config) == experiment


# ------------------------------------------------------------------------------------------ masks
@functools.partial(jax.jit, static_argnums=(0, 2))
def mask_of(dropping, key, teachers, survival):
    return keep_mask(dropping, key, teachers, survival)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 3), st.integers(0, 2), st.booleans(), st.floats(0, 1), st.integers(0, 2**32 - 1)
)
def test_masks_drop_as_many_as_they_say_and_spare_whom_they_say(
    teachers, number, droppable, survival, seed
):
    key = jax.random.key(seed)
    for kind in ("none", "fixed", "bernoulli"):
        dropping = Dropping(kind, number if kind == "fixed" else 1, droppable)
        may_go = teachers - (not droppable)
        if kind == "fixed" and number > may_go:
            continue
        keep = np.asarray(mask_of(dropping, key, teachers, survival))
        assert keep.shape == (teachers,) and keep.dtype == bool
        assert droppable or keep[0]
        if kind == "fixed":
            assert (~keep).sum() == number
        if kind == "none" or (kind == "bernoulli" and survival == 1):
            assert keep.all()
        if kind == "bernoulli" and survival == 0:
            assert keep.sum() == (not droppable)
        assert np.array_equal(keep, mask_of(dropping, key, teachers, survival))
