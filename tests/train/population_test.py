"""Populations equal separate runs, cached outputs their teachers; steps that are not finite."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow

import distill_jax
from distill_jax import ConfigError, data, models
from distill_jax.interop.files import save_variables
from distill_jax.train import fit, options, replica, sharding, trainer
from distill_jax.train.reporter import Reporter
from distill_jax.train.stage import Recipe, Stage

TINY = {
    "dataset": {"name": "synthetic:8x8x3:4:96:32", "valid_fraction": 0.25},
    "networks": ("plane4", "plane2"),
    "guidance": ("direct",),
    "recipe": {"epochs": 2, "batch_size": 24, "kd_weight": 0.7, "temperature": 3.0},
}
MEASURED = {"seconds", "preflight"}


class Recorder(Reporter):
    """Which stages started together, and when to stop."""

    def __init__(self, dispatches=10**9):
        self.started, self.left, self.lines = [], dispatches, []

    def stage_started(self, stages, step, steps, histories):
        self.started.append(([(stage.network.name, stage.seed) for stage in stages], step))

    def progress(self, step, images_per_second):
        self.left -= 1

    def notice(self, lines):
        self.lines += lines


def run(*, dispatches=10**9, workdir=None, **changes):
    recorder = Recorder(dispatches)
    results = distill_jax.run(
        {**TINY, **changes},
        reporter=recorder,
        workdir=workdir,
        stop=lambda: recorder.left <= 0,
    )
    return results, recorder


def timeless(results):
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in results.rows]


# ------------------------------------------------------------------------------------ populations
@pytest.mark.cpu  # under vmap, as on a GPU, sums have another order
@pytest.mark.parametrize(
    ("changes", "together"),
    [
        ({"devices": 2}, 2),  # one a device, by the program of one
        ({"devices": 2, "population": 4, "guidance": ("dense+drop",)}, 4),
        ({"population": 3, "recipe": {**TINY["recipe"], "train_limit": 12}}, 3),
        *slow(({"population": 4, "recipe": {**TINY["recipe"], "augment": "crop_flip"}}, 4)),
    ],
)
def test_a_population_is_to_the_bit_its_replicas_trained_alone(changes, together):
    seeds = (0, 1, 2, 3)[:together]
    changes = {"seeds": seeds, "dropping": {"teacher_droppable": False, "number": 0}, **changes}
    alone, one_by_one = run(**{**changes, "population": 1, "devices": 1})
    at_once, recorder = run(**changes)
    assert [len(stages) for stages, _ in one_by_one.started] == [1] * (2 * together)
    assert [len(stages) for stages, _ in recorder.started] == [together] * 2
    assert timeless(at_once) == timeless(alone)
    for key, history in alone.histories.items():
        for mine, theirs in zip(at_once.histories[key], history, strict=True):
            assert mine.pop("valid_loss") == pytest.approx(theirs.pop("valid_loss"), rel=1e-6)
            assert {**mine, "images_per_second": 0} == {**theirs, "images_per_second": 0}


def test_dispatches_grow_from_epoch_to_epoch_and_each_brings_back_one_fetch(monkeypatch):
    monkeypatch.setattr(trainer, "DISPATCH_SECONDS", 1e9)  # as if they took no time
    fetched, seen = [], []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(x) or get(x))
    monkeypatch.setattr(
        Recorder, "progress", lambda self, step, rate: seen.append((step, len(fetched)))
    )
    run(networks=("plane2",), guidance=("none",), recipe={"epochs": 3, "batch_size": 8})
    steps, fetches = zip(*seen, strict=True)
    assert steps == (1, 3, 7, 9) + (17, 18) + (27,)  # 9 steps an epoch
    assert np.diff(fetches)[:3].tolist() == [1, 1, 1]


@pytest.mark.slow
def test_replicas_under_vmap_train_as_they_would_alone(monkeypatch):
    # Networks of no other test here, whose compiled programs must not be shared.
    options = {"networks": ("plane5", "plane3"), "seeds": (0, 1), "dropping": {"number": 0}}
    alone, _ = run(**options, guidance=("dense+drop",), population=1, teacher_logits="graph")
    monkeypatch.setattr(sharding.Topology, "backend", "gpu")
    monkeypatch.setitem(sharding.VMAP_FROM, "gpu", 2)
    at_once, recorder = run(**options, guidance=("dense+drop",), teacher_logits="graph")
    assert [len(stages) for stages, _ in recorder.started] == [2, 2]
    for key, history in alone.histories.items():
        for mine, theirs in zip(at_once.histories[key], history, strict=True):
            for name in ("train_loss", "train_kl", "valid_loss"):
                assert mine[name] == pytest.approx(theirs[name], rel=2e-4)


@pytest.mark.parametrize(
    ("platform", "asked", "most", "expected"),
    [
        ("cpu", 8, 0, 1),
        ("cpu", 4, 3, 3),
        ("gpu", 7, 0, 1),  # fewer than 8 under vmap take longer than one after the other
        ("gpu", 12, 0, 8),
        ("gpu", 7, 5, 5),
        ("tpu", 1, 0, 1),
        ("tpu", 3, 0, 3),
    ],
)
def test_as_many_train_at_once_as_pays_or_as_are_asked_for(
    monkeypatch, platform, asked, most, expected
):
    monkeypatch.setattr(sharding.Topology, "backend", platform)
    assert sharding.Topology().population(asked, most) == expected


@pytest.mark.devices
def test_replicas_left_over_train_by_themselves():
    _, recorder = run(seeds=(0, 1, 2), devices=2, guidance=("none",))
    assert [len(stages) for stages, _ in recorder.started] == [2, 1]


def test_swept_values_are_rows_of_their_own_and_train_at_once():
    sweep = {"kd_weight": (0.1, 0.9), "temperature": (2.0, 6.0)}
    swept, recorder = run(sweep=sweep, population=4, guidance=("none", "direct"))
    labels = [row["guidance"] for row in swept.rows]
    assert labels == ["none"] + [
        f"direct, kd_weight={w}, temperature={t}" for w in (0.1, 0.9) for t in (2.0, 6.0)
    ]
    assert max(len(stages) for stages, _ in recorder.started) == 4
    for row in swept.rows[1:]:
        _, weight, temperature = (part.partition("=")[2] for part in row["guidance"].split(", "))
        changed = {"kd_weight": float(weight), "temperature": float(temperature)}
        alone, _ = run(recipe={**TINY["recipe"], **changed}, guidance=("direct",))
        assert alone.rows[0]["state_digest"] == row["state_digest"]
        assert alone.rows[0]["stage"] == row["stage"]  # a later run finds what the sweep trained
    gains = [line for line in distill_jax.report.summarise(swept.rows) if line["gain"] is not None]
    assert len(gains) == 4


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"kd_wieght": (0.1,)}, "did you mean 'kd_weight'"),
        ({"kd_weight": ()}, "one value or more"),
        ({"kd_weight": (0.1, 0.1)}, "all different"),
        ({"kd_weight": (1.5,)}, "between 0 and 1, got 1.5"),
        ({"temperature": ("hot",)}, "sweep.temperature is a float, got 'hot'"),
    ],
)
def test_sweeps_that_cannot_be_are_refused(sweep, message):
    with pytest.raises(ConfigError, match=message):
        run(sweep=sweep)


def test_an_interrupted_population_ends_as_if_never_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "DISPATCH_SECONDS", 0.0)  # one step a dispatch
    options = {"seeds": (0, 1), "population": 2, "checkpoint_every": "1 steps"}
    whole, _ = run(**options)
    for dispatches in (3, 2):
        with pytest.raises(fit.Interrupted):
            run(**options, workdir=tmp_path, dispatches=dispatches)
    # One replica lost its newest checkpoint, as a kill between two saves leaves it.
    folders = sorted(tmp_path.glob("stages/plane4-*/progress"))
    steps = sorted(int(path.name) for path in folders[0].iterdir())
    (folders[0] / str(steps[-1])).rename(tmp_path / "lost")
    results, recorder = run(**options, workdir=tmp_path)
    assert recorder.started[0] == ([("plane4", 0), ("plane4", 1)], steps[0])
    assert timeless(results) == timeless(whole)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    seen = [(line["stage"], line["epoch"]) for line in lines]
    assert len(seen) == len(set(seen)) == 2 * 2 * 2


def test_a_population_goes_on_as_it_was_placed_whatever_is_asked_for_then(tmp_path):
    options = {"guidance": ("none",), "seeds": (0, 1), "checkpoint_every": "1 steps"}
    with pytest.raises(fit.Interrupted):
        run(**options, population=2, workdir=tmp_path, dispatches=2)
    _, recorder = run(**options, population=1, workdir=tmp_path)
    assert recorder.started[0][0] == [("plane2", 0), ("plane2", 1)] and recorder.started[0][1] > 0


def test_a_replica_that_is_ahead_goes_on_by_itself(tmp_path):
    options = {"guidance": ("none",), "checkpoint_every": "1 steps"}
    with pytest.raises(fit.Interrupted):
        run(**options, workdir=tmp_path, dispatches=2)
    results, recorder = run(**options, seeds=(0, 1), population=2, workdir=tmp_path)
    assert [len(stages) for stages, _ in recorder.started] == [1, 1] and recorder.started[0][1] > 0
    assert timeless(results) == timeless(run(**options, seeds=(0, 1))[0])


# ------------------------------------------------------------------------ cached teachers' outputs
@pytest.mark.parametrize("devices", [1, *slow(2)])
@pytest.mark.parametrize("guidance", [*slow("dense"), "dense+drop"])
def test_the_cache_gives_what_teachers_in_the_graph_give(guidance, devices):
    options = {
        "networks": ("plane6", "plane4", "plane2"),
        "guidance": (guidance,),
        "devices": devices,
        "parallel": "pmap",
    }
    (graph, table), (key, *_) = (
        [run(**options, teacher_logits=how)[0] for how in ("graph", "table")],
        [(guidance, "plane2", 0)],
    )
    for mine, theirs in zip(table.histories[key], graph.histories[key], strict=True):
        for name in ("train_loss", "train_kl", "train_ce", "valid_loss"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-4)
        assert mine.get("train_kept") == theirs.get("train_kept")
    gaps = jax.tree.map(
        lambda a, b: np.max(np.abs(a - b)), table.networks[key][1], graph.networks[key][1]
    )
    assert max(jax.tree.leaves(gaps)) < 1e-3


def test_a_cache_of_other_images_would_be_noticed(monkeypatch):
    graph, _ = run(teacher_logits="graph")
    cache = replica.Replica.teacher_cache

    def roll(self, topology):
        return jax.tree.map(lambda x: np.roll(x, 1, axis=0), cache(self, topology))

    monkeypatch.setattr(replica.Replica, "teacher_cache", roll)
    rolled, _ = run(teacher_logits="table")
    key = ("direct", "plane2", 0)
    kl = [results.histories[key][-1]["train_kl"] for results in (graph, rolled)]
    assert abs(kl[0] - kl[1]) > 0.02 * kl[0]


def test_with_a_cache_no_step_runs_a_teacher(monkeypatch):
    ran = []
    apply = models.Network.apply

    def counted(self, variables, images, **options):
        ran.append((self.name, len(images), options.get("train", False)))
        return apply(self, variables, images, **options)

    monkeypatch.setattr(models.Network, "apply", counted)
    # Another batch size than any other test's, so that every program is traced here.
    for how, batch, in_the_step in (("graph", 18, True), ("table", 9, False)):
        ran.clear()
        run(teacher_logits=how, recipe={**TINY["recipe"], "batch_size": batch})
        assert (("plane4", batch, False) in ran) == in_the_step
        assert ("plane2", batch, True) in ran


@pytest.mark.parametrize(
    ("teacher_logits", "augment", "epochs", "expected"),
    [
        ("auto", "none", 2, True),
        ("auto", "none", 1, False),
        ("auto", "crop_flip", 2, False),
        ("graph", "none", 2, False),
        ("table", "none", 1, True),
    ],
)
def test_when_there_is_a_cache(teacher_logits, augment, epochs, expected):
    dataset = data.load(**TINY["dataset"])
    student, teacher = (models.build(name, 4, (8, 8, 3)) for name in ("plane2", "plane4"))
    recipe = Recipe(epochs=epochs, augment=augment)
    taught, alone = (Stage(student, teachers, recipe, 0) for teachers in ((teacher,), ()))
    assert options.caches_teachers([taught], dataset, teacher_logits) == expected
    assert not options.caches_teachers([alone], dataset, teacher_logits)


def test_a_cache_for_images_that_change_is_refused():
    with pytest.raises(ConfigError, match="never change, but augment is 'crop_flip'.*'graph'"):
        run(teacher_logits="table", recipe={**TINY["recipe"], "augment": "crop_flip"})


def test_a_cache_that_no_memory_would_hold_is_refused(monkeypatch):
    def memory(size):
        monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": size}.get)

    size = 72 * 4 * 4  # bytes of one teacher's logits: images, classes, float32
    memory(size - 1)
    with pytest.raises(ConfigError, match="'table' would take 0.0 GiB.*'graph' or 'auto'"):
        run(teacher_logits="table")
    memory(size)
    student, teacher = (models.build(name, 4, (8, 8, 3)) for name in ("plane2", "plane4"))
    dataset = data.load(**TINY["dataset"])
    assert options.caches_teachers([Stage(student, (teacher,), Recipe(), 0)], dataset, "table")


# ------------------------------------------------------------------------ steps that are not finite
@pytest.fixture
def spoilt_teacher(tmp_path):
    """A file of a plane4 whose weights are finite, and whose logits are not."""
    variables = models.build("plane4", 4, (8, 8, 3)).init(jax.random.key(0))
    layer = variables["params"]["fc_layers.0"]
    layer["kernel"] = jnp.full_like(layer["kernel"], 3e38)
    save_variables(tmp_path / "teacher.npz", variables)
    return {"teacher_weights": str(tmp_path / "teacher.npz")}


@pytest.mark.parametrize("how", ["graph", "table"])
def test_a_spoilt_teacher_is_named_at_the_first_step(spoilt_teacher, how):
    with pytest.raises(trainer.NotFiniteError) as caught:
        run(**spoilt_teacher, teacher_logits=how)
    message = str(caught.value)
    assert "plane2, seed 0: step 1 of 6 is not finite" in message
    assert "teacher 1 (plane4)" in message and "term kl" in message and "skip N" in message


LARGE = {**TINY["recipe"], "learning_rate": 1e30, "momentum": 0.0}


def test_halting_keeps_the_last_good_state_and_goes_on_from_it(tmp_path):
    options = {"guidance": ("none",), "recipe": LARGE, "selection": "last"}
    with pytest.raises(trainer.NotFiniteError, match="step 2 of 6.*gradients"):
        run(**options, workdir=tmp_path)
    (saved,) = tmp_path.glob("stages/plane2-*/progress/*")
    assert saved.name == "1"  # the state before the second step, weights finite
    with pytest.raises(trainer.NotFiniteError, match="step 2 of 6"):
        run(**options, workdir=tmp_path)
    results, recorder = run(**options, workdir=tmp_path, nonfinite="skip 5")
    assert recorder.started[0][1] == 1
    assert results.rows[0]["skipped_steps"] == 5 and results.rows[0]["test_accuracy"] >= 0
    (_, variables), *_ = results.networks.values()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(variables))
    assert results.histories["none", "plane2", 0][-1]["step"] == 6


def test_one_step_more_than_may_be_skipped_halts():
    with pytest.raises(trainer.NotFiniteError, match="step 6 of 6.*after 4 such steps"):
        run(guidance=("none",), recipe=LARGE, nonfinite="skip 4")


@pytest.mark.parametrize("text", ["skip", "skip -1", "skip x", "halt 3", "ignore", ""])
def test_policies_that_cannot_be_read_are_refused(text):
    with pytest.raises(ConfigError, match="nonfinite is 'halt' or 'skip N'"):
        run(nonfinite=text)


def test_skipping_does_not_touch_what_is_finite():
    assert timeless(run(nonfinite="skip 3")[0]) == timeless(run()[0])


def test_halting_of_one_replica_leaves_the_others_their_steps(tmp_path):
    options = {"guidance": ("none",), "sweep": {"learning_rate": (0.01, 1e30)}, "population": 2}
    recipe = {**TINY["recipe"], "momentum": 0.0}
    with pytest.raises(trainer.NotFiniteError, match="step 2 of 6"):
        run(**options, recipe=recipe, workdir=tmp_path)
    options["sweep"] = {"learning_rate": (0.01,)}
    good, _ = run(**options, recipe=recipe, workdir=tmp_path)
    fresh, _ = run(**options, recipe=recipe)
    assert timeless(good) == timeless(fresh)
