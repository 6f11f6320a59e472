"""Phases that prepare: what moves in them, what is handed on, the configs of docs/methods.md."""

import dataclasses
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

import distill_jax
from distill_jax import data
from distill_jax.methods import FT
from distill_jax.methods.factors import Paraphrasing
from distill_jax.runs import plan as plan_lib
from distill_jax.runs import runner
from distill_jax.runs.config import resolve
from distill_jax.train import fit, trainer
from distill_jax.train.options import ReplicaInputs, TrainOptions
from distill_jax.train.reporter import Reporter

COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **about: COMPILED.append(event) if "backend_compile" in event else None
)
DATASET = {"name": "synthetic:8x8x1:4:48:32", "valid_fraction": 0.25}
TINY = {
    "dataset": DATASET,
    "networks": ("plane4", "plane4#2", "plane2"),
    "guidance": ("plane2<plane4+plane4#2",),
    "recipe": {"epochs": 2, "batch_size": 12},
    "methods": {"ft": 20.0},
    "phases": ({"methods": {"ft": 1.0}, "epochs": 2, "learning_rate": 0.01},),
    "checkpoint_every": "3 steps",
}
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "methods.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
BLOCKS += [text.replace("fsp", "ab") for text in BLOCKS if "fsp" in text]


def plan_of(**changes):
    config = {**TINY, **changes}
    return plan_lib.make_plan(resolve(config), data.load(**config["dataset"]), "data")


def phases_of(**changes):
    return [stage for stage in plan_of(**changes).stages.values() if stage.phase]


def of_resnets(*phases, methods, **changes):
    return phases_of(
        dataset={**DATASET, "name": "synthetic:8x8x3:4:48:32"},
        networks=("resnet14", "resnet8"),
        guidance=("direct",),
        methods=methods,
        phases=phases,
        **changes,
    )


# ------------------------------------------------------------------------- what moves in a phase
def fixed(stage):
    """The modules of a network that a phase leaves alone, each once."""
    return {re.sub(r"\\", "", pattern).split(".")[0] for pattern in stage.recipe.optim.frozen}


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        ({"fsp": 1.0, "ce": 0.0}, {"fc"}),
        ({"ab": 1.0, "ce": 0.0}, {"fc"}),
        ({"fitnet": 1.0, "ce": 0.0}, {"layer3", "fc"}),
        ({"fsp": 1.0, "fitnet": 0.0, "ce": 0.0}, {"fc"}),
        ({"fitnet": 1.0}, set()),
        ({"kd": 1.0}, set()),
    ],
    ids=lambda value: "+".join(sorted(value)),
)
def test_a_phase_moves_what_its_terms_depend_on(methods, expected):
    (phase,) = of_resnets({"methods": methods}, methods={"ce": 1.0})
    assert fixed(phase) == expected


def test_what_a_user_freezes_stays_so_and_a_main_stage_moves_all():
    config = {"methods": {"fsp": 1.0, "ce": 0.0}, "frozen": ("conv1.*",)}
    (phase,) = of_resnets(config, methods={"ce": 1.0})
    assert fixed(phase) == {"conv1", "fc"}
    main = list(plan_of().stages.values())[-1]
    assert not main.phase and not main.recipe.optim.frozen


def test_the_first_phase_that_names_ft_trains_its_paraphrasers():
    ft = {"methods": {"ft": 1.0}}
    first, second = phases_of(phases=(ft, {"methods": {"ft": 20.0, "ce": 0.5}}))
    assert first.methods == (("ft", Paraphrasing()),)
    assert [name for name, _ in second.methods] == ["ce", "ft"]
    assert second.methods[1][1] == FT() and not second.recipe.optim.frozen
    before, first = phases_of(phases=({"methods": {"kd": 1.0}}, ft))
    assert not before.recipe.optim.frozen and first.methods == (("ft", Paraphrasing()),)


# ------------------------------------------------------------------------------------------ runs
class Stopper(Reporter):
    """Stops a run after some dispatches, and knows what it trained."""

    def __init__(self, dispatches=10**9):
        self.left, self.started = dispatches, []

    def stage_started(self, stages, step, steps, histories):
        self.started += [(stage.network.name, stage.phase, step) for stage in stages]

    def progress(self, step, images_per_second):
        self.left -= 1


def recorded(config, **options):
    """The rows of a run, and inputs and result of each of its stages."""
    trained, train = [], fit.train

    def recording(inputs, dataset, options):
        results = train(inputs, dataset, options)
        pairs = zip(inputs, results, strict=True)
        trained.extend((one.stages[0], result) for one, (result,) in pairs)
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.fit, "train", recording)
        rows = distill_jax.run(config, progress=False, **options).rows
    return rows, trained


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(rows, (inputs, result) of the phase and of the training after it, folder) of a run."""
    folder = tmp_path_factory.mktemp("whole")
    rows, [*_, phase, main] = recorded(TINY, workdir=folder)
    return rows, phase, main, folder


def timeless(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def same(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def first_state(inputs):
    replica = trainer.Replica(ReplicaInputs((inputs,)), data.load(**DATASET))
    return replica.first_state()


def test_the_phase_trains_paraphrasers_and_leaves_the_student_as_it_was_drawn(whole):
    _, (phase, prepared), *_ = whole
    drawn = first_state(phase)
    assert same(drawn.variables("plane2"), prepared.whole["network"])
    before = drawn.method_variables("plane2")["ft"]["params"]
    after = prepared.whole["methods"]["ft"]["params"]
    assert before.keys() == after.keys() == {"0", "1"}
    moved = jax.tree.map(lambda x, y: not np.array_equal(x, y), before, after)
    assert jax.tree.all(moved)
    losses = [record["train_ft_paraphraser"] for record in prepared.history]
    assert losses[1] < losses[0]


def test_the_training_takes_the_encoders_and_does_not_move_them(whole):
    _, (_, prepared), (main, result), _ = whole
    encoders = {k: x["encoder"] for k, x in prepared.whole["methods"]["ft"]["params"].items()}
    state = first_state(main)
    assert same(state.method_variables("plane2")["ft"]["paraphraser"], encoders)
    assert state.params["methods"]["plane2"]["ft"].keys() == {"0", "1"}
    # The same training, that hands on what it has.
    handing = main._replace(stage=dataclasses.replace(main.stage, phase=True))
    replica = ReplicaInputs((handing._replace(plain_accuracy=None),))
    ((again,),) = fit.train([replica], data.load(**DATASET), TrainOptions())
    assert again.record["state_digest"] == result.record["state_digest"]
    left = again.whole["methods"]["ft"]
    assert same(left["paraphraser"], encoders)
    assert not same(left["params"], state.method_variables("plane2")["ft"]["params"])
    assert jax.tree.structure(result.variables) == jax.tree.structure(main.stage.network.shapes)


def test_a_run_stopped_in_the_phase_or_after_it_ends_with_the_same_bytes(
    whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(trainer, "DISPATCH_SECONDS", 0.0)  # one step a dispatch
    rows, *_ = whole
    started = []
    for dispatches in (16, 3, 4):  # of two teachers' 6 each, the phase's 6 and 6
        stopper = Stopper(dispatches)
        with pytest.raises(fit.Interrupted):
            distill_jax.run(
                TINY, workdir=tmp_path, reporter=stopper, stop=lambda s=stopper: s.left <= 0
            )
        started += stopper.started
    assert timeless(distill_jax.run(TINY, workdir=tmp_path, progress=False).rows) == timeless(rows)
    assert any(phase and step for _, phase, step in started)


def test_the_training_goes_on_from_a_finished_phase_on_disk(whole, tmp_path):
    rows, *_, folder = whole
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "stages" / f"plane2-{rows[0]['stage']}")
    reporter = Stopper()
    again = distill_jax.run(TINY, workdir=tmp_path / "run", reporter=reporter).rows
    assert timeless(again) == timeless(rows)
    assert reporter.started == [("plane2", False, 0)]


def test_two_devices_train_what_one_does(whole):
    _, (_, prepared), (_, result), _ = whole
    _, [*_, (phase, one), (_, other)] = recorded({**TINY, "devices": 2})
    assert same(first_state(phase).variables("plane2"), one.whole["network"])
    for mine, theirs in ((one, prepared), (other, result)):
        assert [x["train_loss"] for x in mine.history] == pytest.approx(
            [x["train_loss"] for x in theirs.history], rel=1e-4
        )
    for k, own in one.whole["methods"]["ft"]["params"].items():
        theirs = prepared.whole["methods"]["ft"]["params"][k]
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), own, theirs)


# -------------------------------------------------------------------------------------- the page
@pytest.mark.parametrize("block", BLOCKS, ids=lambda text: text.split('"')[5])
def test_the_configs_of_the_page_run(block):
    config = distill_jax.default_config()
    exec(block, {"config": config})
    published = resolve(config).phases
    assert all(phase["epochs"] == 30 for phase in published)
    config.phases = tuple({**phase, "epochs": 1} for phase in config.phases)
    config.dataset.update(DATASET)
    config.recipe.update(epochs=1, batch_size=12)
    config.guidance = ("direct",)
    config.networks = ("plane2", "plane2#2")
    rows, [_, (phase, prepared), (main, _)] = recorded(config)
    assert rows[0]["network"] == "plane2#2" and main.stage.start == phase.stage.id
    # The classifier is in no term of any of these phases, and weight decay leaves it alone.
    drawn, after = first_state(phase).variables("plane2#2"), prepared.whole["network"]
    assert same(drawn["params"]["fc_layers.0"], after["params"]["fc_layers.0"])
    assert same(drawn, after) == ("ft" in dict(phase.stage.methods))


# -------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"phases": ()}, ["method 'ft' for plane2 teaches after a phase that prepares it"]),
        (
            {"phases": ({"methods": {"kd": 1.0}},)},
            ["method 'ft' for plane2 teaches after a phase", "{'methods': {'ft': 1}"],
        ),
        (
            {"phases": ({**TINY["phases"][0], "method_options": {"ft": {"rate": 0.25}}},)},
            ["paraphrasers to factors of", "expected"],
        ),
        ({"method_options": {"ft": {"rate": 0.01}}}, ["rate 0.01 of the channels", "leaves none"]),
        (
            {"phases": ({"methods": {"fsp": 1.0, "ce": 0.0}},), "methods": {"ce": 1.0}},
            ["'fsp' for plane2 taught by plane4", "8×8×16, 4×4×16, the teacher's", "4×4×32"],
        ),
        ({"guidance": "mutual", "networks": ("plane4", "plane2")}, ["none of its methods does so"]),
        (
            {"phases": ({"methods": {"kd": 0.0, "ce": 0.0}},), "methods": {"kd": 1.0}},
            ["leave nothing to train in plane2"],
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[0][:30],
)
def test_what_cannot_be_prepared_is_refused_before_anything_is_compiled(changes, parts):
    before = len(COMPILED)
    with pytest.raises(distill_jax.ConfigError) as caught:
        distill_jax.run({**TINY, **changes}, progress=False)
    assert all(part in str(caught.value) for part in parts)
    assert len(COMPILED) == before
