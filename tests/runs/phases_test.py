"""Methods with adapters, and the phases that prepare a stage: planned, resumed, mended."""

import json
import shutil

import jax
import numpy as np
import pytest

import distill_jax
from distill_jax import data
from distill_jax.runs import plan as plan_lib
from distill_jax.runs import runner
from distill_jax.runs.config import resolve
from distill_jax.train import fit, trainer
from distill_jax.train.options import ReplicaInputs
from distill_jax.train.replica import Replica
from distill_jax.train.reporter import Reporter

TINY = {
    "dataset": {"name": "synthetic:8x8x1:4:48:32", "valid_fraction": 0.25},
    "networks": ("plane4", "plane2"),
    "guidance": ("direct",),
    "recipe": {"epochs": 2, "batch_size": 12},
    "methods": {"kd": 1.0, "fitnet": 10.0},
    "method_options": {"fitnet": {"hint_layer": 1}},
    "phases": (
        {"methods": {"fitnet": 1.0, "ce": 0.0}, "epochs": 1, "trainable": ("conv_layers.*",)},
    ),
    "checkpoint_every": "3 steps",
}


def plan_of(**changes):
    config = {**TINY, **changes}
    return plan_lib.make_plan(resolve(config), data.load(**config["dataset"]), "data")


def names(stage):
    return [name for name, _ in stage.methods], stage.weights


# ------------------------------------------------------------------------------------------ plans
def test_a_phase_is_a_stage_before_the_one_that_starts_from_it():
    plan = plan_of()
    teacher, phase, main = plan.stages.values()
    assert (teacher.network.name, phase.network, main.network.name) == (
        "plane4",
        main.network,
        "plane2",
    )
    assert (phase.phase, phase.start, main.phase, main.start) == (True, "", False, phase.id)
    assert phase.teachers == main.teachers and plan.teachers[phase.id] == (teacher.id,)
    assert names(phase) == (["ce", "fitnet"], (0.0, 1.0))
    assert names(main) == (["ce", "kd", "fitnet"], (1.0, 1.0, 10.0))
    assert (phase.recipe.epochs, phase.recipe.selection) == (1, "last")
    assert phase.recipe.optim.trainable == ("conv_layers.*",)
    assert (main.recipe.epochs, main.recipe.optim.trainable) == (2, ())
    assert plan.results["direct", "plane2", 0] == main.id


def test_phases_follow_each_other_and_only_the_taught_have_them():
    plan = plan_of(phases=({"epochs": 1}, {"epochs": 3}), guidance=("none", "direct"))
    alone, teacher, first, second, main = plan.stages.values()
    assert not (alone.phase or teacher.phase or main.phase) and first.phase and second.phase
    assert (first.start, second.start, main.start) == ("", first.id, second.id)
    assert plan.plain[main.id] == alone.id


def test_swept_weights_leave_a_phase_with_methods_of_its_own_alone():
    plan = plan_of(sweep={"methods.kd": (0.5, 2.0), "methods.fitnet": (3.0,)})
    (phase,) = (stage for stage in plan.stages.values() if stage.phase)  # shared by both
    assert names(phase) == (["ce", "fitnet"], (0.0, 1.0))
    weights = [stage.weights for stage in plan.stages.values() if stage.start]
    assert weights == [(1.0, 0.5, 3.0), (1.0, 2.0, 3.0)]
    # Without methods of its own a phase has the experiment's.
    plan = plan_of(phases=({"epochs": 1},), sweep={"methods.kd": (0.5, 2.0)})
    phases = [stage.weights for stage in plan.stages.values() if stage.phase]
    assert phases == [(1.0, 0.5, 10.0), (1.0, 2.0, 10.0)]


def test_options_of_a_phase_leave_those_of_an_override_to_other_methods():
    own = {"method_options": {"dkd": {"beta": 2.0}}}
    phase = {"epochs": 1, "method_options": {"fitnet": {"hint_layer": 0}}}
    methods = {"dkd": 1.0, "fitnet": 1.0}
    plan = plan_of(overrides={"plane2": own}, phases=(phase,), methods=methods)
    found = [dict(stage.methods) for stage in plan.stages.values() if stage.teachers]
    assert [own["dkd"].beta for own in found] == [2.0, 2.0]
    assert [own["fitnet"].hint_layer for own in found] == [0, 1]


# ------------------------------------------------------------------------------------------- runs
class Stopper(Reporter):
    """Stops a run after some dispatches, and knows which stages it trained."""

    def __init__(self, dispatches=10**9):
        self.left, self.started = dispatches, []

    def stage_started(self, stages, step, steps, histories):
        self.started += [(stage.id, step) for stage in stages]

    def progress(self, step, images_per_second):
        self.left -= 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, its rows, inputs and results of every stage) of a run that nobody touched."""
    folder, trained, train = tmp_path_factory.mktemp("whole"), [], fit.train

    def recorded(inputs, dataset, options):
        results = train(inputs, dataset, options)
        for replica, (result,) in zip(inputs, results, strict=True):
            (stage,) = replica.stages
            trained.append((stage, result))
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.fit, "train", recorded)
        rows = distill_jax.run(TINY, workdir=folder).rows
    return folder, rows, trained


def timeless(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def same(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_a_stage_starts_from_the_weights_and_adapters_of_its_phase(whole):
    _, _, [_, (phase, prepared), (main, result)] = whole
    assert phase.stage.phase and main.stage.start == phase.stage.id
    assert same(main.start, prepared.whole)
    dataset = data.load(**TINY["dataset"])
    state = Replica(ReplicaInputs((main,)), dataset).first_state()
    assert same(state.variables("plane2"), prepared.whole["network"])
    assert same(state.method_variables("plane2"), prepared.whole["methods"])
    # What the phase was not to train is as it was drawn; what it was to train is not.
    drawn = Replica(ReplicaInputs((phase,)), dataset).first_state()
    before, after = drawn.params["networks"]["plane2"], prepared.whole["network"]["params"]
    assert same(before["fc_layers.0"], after["fc_layers.0"])
    moved = [name for name in before if not same(before[name], after[name])]
    assert moved and all(name.startswith("conv_layers.") for name in moved)
    assert not same(drawn.method_variables("plane2"), prepared.whole["methods"])
    # What is deployed is the network alone.
    assert jax.tree.structure(result.variables) == jax.tree.structure(main.stage.network.shapes)
    assert result.whole == {}


def test_a_run_stopped_in_a_phase_or_after_it_ends_with_the_same_bytes(
    whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(trainer, "DISPATCH_SECONDS", 0.0)  # one step a dispatch
    _, rows, _ = whole
    started = []
    for dispatches in (7, 4):  # of 6, 3 and 6 steps
        stopper = Stopper(dispatches)
        with pytest.raises(fit.Interrupted):
            distill_jax.run(
                TINY, workdir=tmp_path, reporter=stopper, stop=lambda s=stopper: s.left <= 0
            )
        started += stopper.started
    assert timeless(distill_jax.run(TINY, workdir=tmp_path).rows) == timeless(rows)
    assert len({stage_id for stage_id, _ in started}) == 3 and any(step for _, step in started)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert len([(line["stage"], line["epoch"]) for line in lines]) == 2 + 1 + 2


def copied(whole, tmp_path):
    """A copy of the whole run's folder, and the places of the phase and of what starts from it."""
    folder, rows, [_, (phase, _), (main, _)] = whole
    shutil.copytree(folder, tmp_path / "run")
    places = (tmp_path / "run" / "stages" / f"plane2-{x.stage.id}" for x in (phase, main))
    return tmp_path / "run", rows, *places


def test_a_finished_phase_is_read_for_what_starts_from_it(whole, tmp_path):
    folder, rows, _, main = copied(whole, tmp_path)
    shutil.rmtree(main)
    reporter = Stopper()
    assert timeless(distill_jax.run(TINY, workdir=folder, reporter=reporter).rows) == timeless(rows)
    assert [stage_id for stage_id, _ in reporter.started] == [rows[0]["stage"]]


@pytest.mark.parametrize("missing", [True, False], ids=["main to train", "main finished"])
def test_a_damaged_phase_is_trained_again_to_the_same_bytes(whole, tmp_path, missing, caplog):
    folder, rows, phase, main = copied(whole, tmp_path)
    for path in (phase / "weights").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:5])
    if missing:
        shutil.rmtree(main)
    reporter = Stopper()
    assert timeless(distill_jax.run(TINY, workdir=folder, reporter=reporter).rows) == timeless(rows)
    assert len(reporter.started) == 1 + missing
    assert f"{phase} was finished and is damaged" in caplog.text
