"""Runs through the Python API and the command line: each stage once, resumable, readable."""

import collections
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cli
import jax
import numpy as np
import pytest
from marks import slow

import distill_jax
from distill_jax import ConfigError, data, models
from distill_jax.runs.checkpoint import Checkpoints
from distill_jax.train import checks, fit, inference, programs, sharding, trainer
from distill_jax.train import stage as stage_lib
from distill_jax.train.reporter import Reporter

ROOT = Path(__file__).parents[2]
TINY = {
    "dataset": {"name": "synthetic:8x8x3:4:96:32", "valid_fraction": 0.25},
    "networks": ("plane6", "plane4", "plane2"),
    "guidance": ("none", "direct", "chain", "dense"),
    "recipe": {"epochs": 2, "batch_size": 24},
}


class Recorder(Reporter):
    """Counts stages and stops training after some dispatches."""

    def __init__(self, dispatches=10**9):
        self.started, self.ended, self.left = [], [], dispatches

    def stage_started(self, stages, step, steps, histories):
        self.started += [(stage.network.name, step) for stage in stages]

    def progress(self, step, images_per_second):
        self.left -= 1

    def stage_ended(self, stage, record):
        self.ended.append(stage.id)


def config(**changes):
    return {**TINY, **changes}


def command(workdir, *arguments, config="quickstart.py:smoke", **environment):
    return subprocess.run(
        [sys.executable, "-m", "distill_jax", "train", f"--config=configs/{config}"]
        + [f"--workdir={workdir}", *arguments],
        cwd=ROOT,
        env={
            k: v
            for k, v in {**os.environ, "XLA_FLAGS": cli.flags(), **environment}.items()
            if v is not None
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


def forked(workdir, *arguments, config="quickstart.py:smoke", **options):
    """The same in a process that starts sooner."""
    given = f"--config={ROOT / 'configs' / config}", f"--workdir={workdir}", *arguments
    return cli.run(*given, **options)


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


# ------------------------------------------------------------------------------------- Python API
@pytest.fixture(scope="module")
def whole():
    return distill_jax.run(config())


def test_a_run_without_workdir_gives_rows_networks_and_histories(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [row["guidance"] for row in whole.rows] == ["none", "direct", "chain", "dense"]
    by = {row["guidance"]: row for row in whole.rows}
    assert by["dense"]["teachers"] == ["plane6", "plane4"] and by["none"]["teachers"] == []
    network, variables = whole.networks["dense", "plane2", 0]
    dataset = data.load(**TINY["dataset"])
    (metrics,) = inference.evaluate([(network, variables)], dataset.test, dataset)
    assert metrics["accuracy"] == by["dense"]["test_accuracy"]
    history = whole.histories["dense", "plane2", 0]
    assert [record["epoch"] for record in history] == [1, 2]
    assert by["dense"]["valid_accuracy"] == max(record["valid_accuracy"] for record in history)
    assert not list(tmp_path.iterdir())


def test_each_distinct_stage_is_trained_once_and_a_second_run_trains_nothing(whole, tmp_path):
    first, second = Recorder(), Recorder()
    rows = distill_jax.run(config(), workdir=tmp_path, reporter=first).rows
    # plane6; plane4 and plane2 each alone or taught: 2 plane4 and 4 plane2 of which chain and
    # dense share their assistant.
    names = sorted(name for name, _ in first.started)
    assert names == ["plane2"] * 4 + ["plane4"] + ["plane6"]
    again = distill_jax.run(config(), workdir=tmp_path, reporter=second).rows
    assert second.started == [] and again == rows
    digests = [row["state_digest"] for row in rows]
    assert digests == [row["state_digest"] for row in whole.rows]
    distill_jax.run(config(guidance="plane6>plane2,dense"), workdir=tmp_path, reporter=second)
    assert second.started == []  # the path is what "direct" was
    stored = json.loads((tmp_path / "results.json").read_text())
    assert {row["guidance"] for row in stored} == {"plane6>plane2", "dense"}
    needed = {"guidance", "network", "teachers", "seed", "parameters", "valid_accuracy"}
    needed |= {"test_accuracy", "last_test_accuracy", "epochs", "seconds", "state_digest"}
    assert needed <= stored[0].keys()


def test_a_teacher_is_run_on_a_split_once_however_many_it_teaches(monkeypatch):
    runs, outputs_on_split = collections.Counter(), inference.outputs_on_split

    def counted(pairs, split, *rest):
        runs.update((network.name, len(split.labels)) for network, _ in pairs)
        return outputs_on_split(pairs, split, *rest)

    monkeypatch.setattr(inference, "outputs_on_split", counted)
    # Of the last epoch, so that no other is scored.
    rows = distill_jax.run(config(guidance=("direct", "chain", "dense"), selection="last")).rows
    assert [set(row["kl"]) for row in rows] == [{"plane6"}, {"plane4"}, {"plane6", "plane4"}]
    valid, test = 24, 32
    # Its two epochs or its own score, then once as the teacher of three and of two.
    assert runs["plane6", valid] == runs["plane4", valid] == 2 + 1
    assert runs["plane6", test] == runs["plane4", test] == 1 + 1
    assert (runs["plane2", valid], runs["plane2", test]) == (3 * 2, 3 * 1)  # it has three stages


def test_a_stage_on_one_device_traces_its_step_once(monkeypatch):
    traced, make = [], programs.make_train_step

    def counted(**options):
        step = make(**options)

        def train_step(*arguments):
            traced.extend(student.name for student in options["students"])
            return step(*arguments)

        return train_step

    monkeypatch.setattr(programs, "make_train_step", counted)
    # Seven classes, as no other test has: else its programs might be at hand.
    small = {"name": "synthetic:8x8x3:7:96:32", "valid_fraction": 0.25}
    distill_jax.run(config(dataset=small, guidance="direct", networks="plane4,plane2"))
    assert traced == ["plane4", "plane2"]


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": (1,)},
        {"recipe": {**TINY["recipe"], "learning_rate": 0.03}},
        {"recipe": {**TINY["recipe"], "kd_weight": 0.4}},
        {"guidance": ("dense+drop",)},
        *slow(
            {"dataset": {**TINY["dataset"], "split_seed": 1}},
            {"overrides": {"plane6": {"epochs": 1}}},
            {"loss": {"kl_reduction": "element_mean"}},
        ),
    ],
)
def test_whatever_matters_makes_another_stage(whole, change):
    base = {"guidance": ("dense",)}
    other = distill_jax.run(config(**{**base, **change})).rows[0]
    reference = next(row for row in whole.rows if row["guidance"] == "dense")
    assert other["stage"] != reference["stage"]
    assert other["state_digest"] != reference["state_digest"]


def test_what_concerns_only_teachers_leaves_plain_training_as_it_is(whole):
    plain = whole.rows[0]["stage"]
    changed = {**TINY["recipe"], "kd_weight": 0.1, "temperature": 9.0}
    row = distill_jax.run(config(guidance="none", recipe=changed, protocol="paper")).rows[0]
    assert row["stage"] == plain


def test_an_interrupted_run_ends_with_the_bytes_of_one_that_was_not(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "DISPATCH_SECONDS", 0.0)  # one step a dispatch
    for dispatches in (1, 2, 5, 3, 1, 4):
        stopper = Recorder(dispatches)
        with pytest.raises(fit.Interrupted):
            distill_jax.run(
                config(), workdir=tmp_path, reporter=stopper, stop=lambda s=stopper: s.left <= 0
            )
    resumed = Recorder()
    rows = distill_jax.run(config(), workdir=tmp_path, reporter=resumed).rows
    assert resumed.started[0][1] > 0  # in the middle of a stage
    expected = [row["state_digest"] for row in whole.rows]
    assert [row["state_digest"] for row in rows] == expected
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    seen = [(row["stage"], row["epoch"]) for row in map(json.loads, lines)]
    assert len(seen) == len(set(seen)) == 2 * 6


def test_selection_takes_the_best_epoch_or_the_last():
    recipe = {**TINY["recipe"], "epochs": 6, "learning_rate": 0.3}
    for selection, key in (("validation", "valid_accuracy"), ("test", "test_accuracy")):
        result = distill_jax.run(config(guidance="none", recipe=recipe, selection=selection))
        history = result.histories["none", "plane2", 0]
        best = max(record[key] for record in history)
        assert result.rows[0][key] == best
    official = distill_jax.run(config(guidance="none", recipe=recipe, protocol="official"))
    assert official.rows[0]["selection"] == "test"
    assert official.rows[0]["state_digest"] == result.rows[0]["state_digest"]
    last = distill_jax.run(config(guidance="none", recipe=recipe, selection="last")).rows[0]
    assert last["test_accuracy"] == last["last_test_accuracy"] and last["best_epoch"] == 6


def test_low_data_limits_the_student_and_not_its_teacher():
    recipe = stage_lib.Recipe(batch_size=4)
    dataset = data.load(**TINY["dataset"])
    limited = dataset.limited(1, 0)
    assert np.array_equal(np.sort(limited.train.labels), np.arange(4))
    result = distill_jax.run(
        config(
            guidance="direct",
            recipe={"epochs": 1, "batch_size": 4, "train_limit": 1},
            overrides={"plane6": {"train_limit": 0}},
        )
    )
    assert result.histories["direct", "plane2", 0][0]["step"] == 1
    assert stage_lib.steps_per_epoch(len(dataset.train.labels), recipe) == 18


def test_the_partial_batch_is_kept_where_asked():
    recipe = {"epochs": 1, "batch_size": 50}
    for last_batch, steps in (("drop", 1), ("keep", 2)):
        result = distill_jax.run(
            config(guidance="none", recipe={**recipe, "last_batch": last_batch})
        )
        assert result.histories["none", "plane2", 0][0]["step"] == steps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"networks": ("plane6", "plane3x")}, "plane3x"),
        ({"networks": ("plane8", "plane2")}, "plane8 has 4 pools"),
        ({"recipe": {"batch_size": 1000}}, "1000 is larger than the 72"),
        ({"devices": 3, "recipe": {"batch_size": 32}}, "32 is not divisible by 3"),
        ({"dataset": {**TINY["dataset"], "valid_fraction": 0.0}}, "needs a validation split"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_starts(change, message):
    recorder = Recorder()
    with pytest.raises(ConfigError, match=message):
        distill_jax.run(config(**change), reporter=recorder)
    assert recorder.started == []


def test_a_teacher_of_other_classes_is_refused():
    dataset = data.load(**TINY["dataset"])
    student, teacher = (models.build("plane2", c, (8, 8, 3)) for c in (4, 5))
    stage = stage_lib.Stage(student, (teacher,), stage_lib.Recipe(batch_size=8), 0)
    with pytest.raises(ValueError, match="5 classes"):
        checks.check(stage, dataset, sharding.Topology())


# ----------------------------------------------------------------------------------- checkpoints
def test_a_flipped_bit_falls_back_to_the_save_before_it(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, {"a": np.full(64, step, np.float32)}, {"step": step})
    assert checkpoints.steps() == [2, 3]  # two are kept
    template = {"a": np.zeros(64, np.float32)}
    assert checkpoints.restore(template)[1] == {"step": 3}
    for file in (tmp_path / "3" / "arrays").rglob("*"):
        if file.is_file() and file.parent.name == "d" and file.stat().st_size:
            raw = bytearray(file.read_bytes())
            raw[len(raw) // 2] ^= 1
            file.write_bytes(raw)
    arrays, meta = checkpoints.restore(template)
    assert meta == {"step": 2} and arrays["a"][0] == 2
    assert "going back" in caplog.text


# ----------------------------------------------------------------------------------- command line
def test_the_command_prints_the_table_and_writes_its_files(tmp_path):
    own = {"JAX_COMPILATION_CACHE_DIR": None}  # so that it keeps its own
    done = command(tmp_path, **own)
    assert done.returncode == 0, done.stderr
    for word in (
        "none",
        "direct",
        "chain",
        "dense",
        "full data",
        "accuracy %",
        "seed 0",
    ):
        assert word in done.stdout
    assert "Error" not in done.stderr and "I1" not in done.stderr
    for name in ("results.json", "metrics.jsonl", "config.json"):
        assert (tmp_path / name).stat().st_size
    assert any((tmp_path / "compiled").iterdir())
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["loss"]["kl_reduction"] == "" and saved["resolved"]["loss"]["kl_reduction"]
    assert json.loads((tmp_path / "run.json").read_text())["config_file"].endswith("py:smoke")
    again = command(tmp_path, **own)
    assert again.returncode == 0 and "epochs," not in again.stdout
    assert (
        again.stdout.splitlines()[1:]
        == done.stdout.splitlines()[-len(again.stdout.splitlines()) + 1 :]
    )


SMALL = ["--config.networks=plane4,plane2", "--config.dataset.name=synthetic:8x8x3:4:96:32"]


def test_a_sweep_is_given_on_the_command_line(tmp_path):
    swept = "--config.sweep={'kd_weight': (0.1, 0.9)}"
    given = [*SMALL, "--config.guidance=direct", swept]
    done = forked(tmp_path, *given, config="takd_plain.py:smoke")
    assert not done.returncode, done.stderr
    labels = {row["guidance"] for row in json.loads((tmp_path / "results.json").read_text())}
    assert labels >= {"direct, kd_weight=0.1", "direct, kd_weight=0.9"}


LONG = ["--config.guidance=none,direct", "--config.recipe.epochs=16", "--config.devices=1"]


def interrupted(workdir, number, lines):
    """Starts the command and sends it a signal when `lines` epochs are written; the exit code."""
    program = [sys.executable, "-m", "distill_jax.main", "--config=configs/quickstart.py:smoke"]
    running = subprocess.Popen(
        [*program, f"--workdir={workdir}", "--config.checkpoint_every=3 steps", *LONG],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": cli.flags()},
        stdout=subprocess.PIPE,
        text=True,
        # Else the tests' own is inherited, which nohup has ignored.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    metrics = workdir / "metrics.jsonl"
    while running.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= lines:
            break
        time.sleep(0.02)
    running.send_signal(number)
    output, _ = running.communicate(timeout=120)
    return running.returncode, output


@pytest.mark.slow
def test_a_killed_and_a_terminated_run_end_with_the_bytes_of_an_untouched_one(tmp_path):
    torn, whole = tmp_path / "torn", tmp_path / "whole"
    assert interrupted(torn, signal.SIGKILL, 5)[0] == -signal.SIGKILL
    assert list(torn.glob("stages/*/progress/*"))
    kin = signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT
    for number, lines in zip(kin, (14, 18, 21, 24), strict=True):
        code, output = interrupted(torn, number, lines)
        assert code == 128 + number and "the same command goes on" in output
    for workdir in (torn, whole):
        done = command(workdir, "--config.checkpoint_every=3 steps", *LONG)
        assert done.returncode == 0, done.stderr
    digests, metrics = [], []
    for workdir in (torn, whole):
        rows = json.loads((workdir / "results.json").read_text())
        digests.append([row["state_digest"] for row in rows])
        lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        metrics.append([line | dict.fromkeys(cli.MEASURED) for line in lines])
    assert digests[0] == digests[1] and metrics[0] == metrics[1]


@pytest.mark.parametrize(
    ("networks", "guidance", "labels"),
    [
        ("plane4,plane2", "none,plane4>plane2", ["none", "plane4>plane2"]),
        *slow(("('plane4','plane2')", "plane2<plane4", ["plane2<plane4"])),
    ],
)
def test_rows_and_guidance_are_given_as_plain_text(tmp_path, networks, guidance, labels):
    given = [f"--config.networks={networks}", f"--config.guidance={guidance}"]
    done = forked(tmp_path, SMALL[1], *given, config="takd_plain.py:smoke")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["guidance"] for row in rows] == labels


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.recipe.epohcs=3"], "epochs"),
        (["--config.recipe.temperature=0"], "temperature is a number above 0, got 0.0"),
        (["--config.recipe.kd_weight=1.5"], "kd_weight is between 0 and 1, got 1.5"),
        (["--config.guidance=dens"], "did you mean 'dense'"),
        (["--config.networks=plane6,plane22"], "did you mean 'plane2'"),
        (["--config.recipe.epochs=many"], "many"),
        (["--config.dataset.name=cifar10", "--config.dataset.data_dir=/nowhere"], "/nowhere"),
        (["--config.checkpoint_every=often"], "'often'"),
        (["--config.methods={'kdd': 1.0}"], "unknown method 'kdd'; did you mean 'kd'?"),
        (["more"], "expected values as --config.FIELD=VALUE, got 'more'"),
    ],
)
def test_bad_arguments_end_with_one_clear_line(tmp_path, arguments, message):
    done = forked(tmp_path, *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "stages").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("dgkd_plain.py:smok", "did you mean 'smoke'? There are cifar10, cifar100, smoke"),
        ("teskd_cifar100.py:vgg16,vgg18", "unknown 'vgg18'; did you mean 'vgg16'?"),
        ("nowhere.py", f"there is no file {ROOT / 'configs' / 'nowhere.py'}"),
    ],
)
def test_a_wrong_config_file_or_argument_of_one_ends_with_one_line(tmp_path, config, message):
    done = forked(tmp_path / "run", config=config)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "run").exists()


CONFIGS = [
    *("quickstart", "takd_plain", "takd_resnet", "dgkd_plain", "dgkd_resnet", "teskd_cifar100"),
    *("teskd_cifar10_resnet20", "teskd_imagenet_resnet18", "evolved_dgkd_cifar10"),
    *("compare_cifar100", "takd_sst2", "dgkd_sst2", "dgkd_fb15k237", "finetune_folder"),
]
VARIANTS = [f"{kd}_{family}:cifar100" for kd in ("takd", "dgkd") for family in ("plain", "resnet")]
VARIANTS += [f"teskd_cifar100:{name}" for name in ("resnet34", "senet18", "resnext18", "vgg16")]


def get_config(name, arguments):
    path, scope = ROOT / "configs" / f"{name}.py", {}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    return scope["get_config"](arguments)


def test_every_config_is_tested():
    assert sorted(CONFIGS) == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_resolves_whole_and_with_smoke(name):
    whole, small = (distill_jax.resolve(get_config(name, text)) for text in ("", "smoke"))
    assert small.name == f"{whole.name}-smoke"


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_runs_with_smoke(name, tmp_path):
    done = forked(tmp_path, config=f"{name}.py:smoke", quickly=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows and all(np.isfinite(row["test_accuracy"]) for row in rows)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_argument_of_a_config_gives_an_experiment_of_its_own(variant):
    name, _, argument = variant.partition(":")
    experiment = distill_jax.resolve(get_config(name, argument))
    assert argument in experiment.name and experiment.dataset["name"] == "cifar100"
    if name == "teskd_cifar100":
        assert experiment.networks == (f"cifar_{argument}", f"evolving:cifar_{argument}")
    small = distill_jax.resolve(get_config(name, f"{argument},smoke"))
    assert small.dataset["name"].startswith("synthetic:32x32x3:100:")
    assert small.name == f"{experiment.name}-smoke"
