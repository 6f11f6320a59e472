"""The GPU row in miniature: parts that cannot take the others along, lines, and tables."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import types

import cli
import marks
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from distill_jax import data, models
from experiments.benchmark import flops, measure, trained_row
from experiments.gpu_row import __main__ as gpu_row
from experiments.gpu_row import images, lines, parts, summary
from experiments.gpu_row.job import Setting


@pytest.fixture
def out(tmp_path):
    return tmp_path / "found.jsonl"


@pytest.fixture
def setting(out, tmp_path):
    return Setting(str(out), time.monotonic(), str(tmp_path), smoke=True)


@pytest.fixture
def child(tmp_path, monkeypatch):
    """A module for jobs: one ends well, one fails, one never ends and has started another."""
    (tmp_path / "child.py").write_text(
        "import os, subprocess, sys, time\n"
        "def well(lines, setting, **options):\n"
        "    lines.add(name='well', told=os.environ.get('TOLD'), **options)\n"
        "def fails(lines, setting):\n"
        "    sys.exit('no luck')\n"
        "def hangs(lines, setting):\n"
        "    other = subprocess.Popen(['sleep', '600'])\n"
        "    lines.add(name='hanging', pids=[os.getpid(), other.pid])\n"
        "    time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def command(*arguments):
    """The exit code of the command with these flags."""
    with flagsaver.flagsaver():
        return gpu_row.main(flags.FLAGS(["command", *arguments]))


def written(out):
    return [json.loads(text) for text in out.read_text().splitlines()]


def is_there(pid):
    """Whether a process runs; one that has ended and that nobody has asked for does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition):
    for _ in range(600):
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("it never came to that")


# ------------------------------------------------------------------------------ parts and processes
def test_a_job_that_hangs_is_ended_with_all_it_started_and_the_rest_goes_on(child, setting, out):
    groups = (
        (parts.Job("child:hangs"), parts.Job("child:well", {"number": 1})),
        (parts.Job("child:well", {"number": 2}),),
    )
    parts.run("one", parts.Part(10.0, groups), setting)
    parts.run("two", parts.Part(60.0, groups[1:]), setting)
    found = written(out)
    (hanging,) = [line for line in found if line["name"] == "hanging"]
    assert not any(is_there(pid) for pid in hanging["pids"])
    stopped = [(line["part"], line["name"]) for line in found if "stopped" in line]
    assert stopped == [("one", "child:hangs"), ("one", "child:well")]  # the second never began
    well = [(line["part"], line["number"]) for line in found if line["name"] == "well"]
    assert well == [("one", 1), ("two", 2)]
    assert [line["part"] for line in found if line["name"] == "end"] == ["one", "two"]


def test_what_fails_is_told_and_every_job_has_the_variables(child, setting, out):
    own = Setting(**{**vars(setting), "env": {"TOLD": "yes"}, "variant": "after"})
    jobs = parts.Job("child:fails"), parts.Job("child:well")
    parts.run("one", parts.Part(60.0, (jobs,)), own)
    failed, well = sorted(written(out)[:2], key=lambda line: line["name"])
    assert (failed["failed"], failed["tail"]) == (1, "no luck")
    assert well["told"] == "yes" and well["env"] == {"TOLD": "yes"} and well["variant"] == "after"


def test_lines_survive_a_kill_and_nothing_is_left_behind(child, setting, out):
    code = (
        "import sys, json; from experiments.gpu_row import parts; "
        "from experiments.gpu_row.job import Setting; "
        "parts.run('one', parts.Part(600.0, ((parts.Job('child:hangs'),),)), "
        "Setting(**json.loads(sys.argv[1])))"
    )
    argument = json.dumps(vars(setting))
    process = subprocess.Popen([sys.executable, "-c", code, argument], cwd=measure.ROOT)
    (line,) = wait_for(lambda: out.exists() and written(out))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(is_there(pid) for pid in line["pids"]))
    assert written(out) == [line]


def test_a_torn_line_is_left_out_and_said(out, capsys):
    out.write_text('{"part": "parity", "variant": "", "name": "end", "seconds": 3}\n{"part": "st')
    lines.end_torn_line(str(out))
    lines.Lines(str(out), 0.0, part="steps", variant="").add(
        name="end", seconds=4.0, error=float("nan")
    )
    found, torn = lines.read([str(out)])
    assert [line["part"] for line in found] == ["parity", "steps"] and torn == 1
    assert found[1]["error"] is None
    assert command(f"--show={out}") == 0
    text = capsys.readouterr().out
    assert "1 lines are left out" in text and "parity 3, steps 4" in text


# ------------------------------------------------------------------------------------- the command
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stray", "--out=x"], "unexpected argument 'stray'"),
        ([], "--out is missing"),
        (["--out=/nowhere/x.jsonl"], "there is no folder /nowhere"),
        (["--out=x", "--only=stepps"], "no stepps; there are versions, steps"),
        (["--out=x", "--limit=-1"], "--limit=-1: expected seconds"),
        (["--out=x", "--peer=torch"], "--peer is a flag of experiments.benchmark"),
        (["--out=x", "--only=steps", "--env=NAME"], "--env=NAME: expected --env=NAME=VALUE"),
        (["--show=/nowhere/x.jsonl"], "No such file"),
    ],
)
def test_a_wrong_command_is_refused_before_anything_is_measured(
    arguments, said, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parts, "run", None)
    assert command(*arguments) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and said in stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--only=row"], "cifar10 was not found"), (["--only=row4", "--set=recipe.epoch=2"], "epoch")],
)
def test_data_and_fields_are_asked_for_first(arguments, said, out, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parts, "run", None)
    assert command(f"--out={out}", f"--data_dir={tmp_path}", *arguments) == 1
    stderr = capsys.readouterr().err
    assert said in stderr and "Traceback" not in stderr


def test_the_parts_run_in_their_order_and_the_tables_are_printed(out, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(parts, "run", lambda name, part, setting, limit: ran.append((name, limit)))
    out.write_text("")
    assert command(f"--out={out}", "--only=parity,steps", "--limit=7") == 0
    assert ran == [("steps", 7.0), ("parity", 7.0)]


LEFT_OUT = ("tensorflow", "tensorflow_datasets", "sklearn", "safetensors", "pandas", "PIL", "torch")


@pytest.mark.parametrize(
    "part", ["row", *marks.slow(*(part for part in parts.PARTS if part != "row"))]
)
def test_a_part_in_miniature_without_what_a_gpu_image_lacks(part, out, tmp_path, monkeypatch):
    for name in LEFT_OUT:
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('no', name='{name}')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", cli.flags())
    flag = f"--env=XLA_FLAGS={cli.flags()}"
    assert command("--smoke", f"--out={out}", f"--only={part}", "--limit=600", flag) == 0
    found = written(out)
    assert not [line for line in found if "failed" in line or "stopped" in line]
    missing = {line["missing"] for line in found if "missing" in line}
    assert missing == ({"torch is not installed"} if part == "steps" else set())
    if part == "row4":
        cold, warm = (line["parts"]["compilation"] for line in found if line.get("done"))
        assert warm < cold
    if part == "row":
        (done,) = [line for line in found if line.get("done")]
        assert sum(done["parts"].values()) == pytest.approx(done["wall"], abs=0.5)
        assert done["flops"]["tables"] > 0 and len(done["test_accuracy"]) == 1
        for name in ("start", "data", "set-up", "training", "evaluation", "compilation"):
            assert done["parts"][name] > 0, name
        assert [line["from_step"] for line in found if "from_step" in line] == [0, 0]
    if part == "digests":
        digests = {json.dumps(line["digests"]) for line in found if "digests" in line}
        resumed = [line["from_step"] for line in found if line["name"] == "resumed"]
        assert len(digests) == 1 and len(resumed) == 2 and all(resumed)


# ------------------------------------------------------------------------------- what is counted
def test_operations_are_those_of_what_was_run():
    """Steps that look teachers up do not compute them, and their tables are made once."""
    student, teacher = (models.build(name, 10, (32, 32, 3)) for name in ("plane2", "plane4"))
    recipe = types.SimpleNamespace(batch_size=8)
    stage = types.SimpleNamespace(network=student, teachers=(teacher,), recipe=recipe)
    splits = {"train": 20, "valid": 5, "test": 7}
    sized = {k: types.SimpleNamespace(labels=np.zeros(n)) for k, n in splits.items()}
    timeline = trained_row.Timeline(0.0, lambda **told: None)
    timeline.steps, timeline.stages = 2, [(stage, 6, True)]
    found = trained_row.operations(timeline, types.SimpleNamespace(**sized))
    own, taught = flops.forward(student), flops.forward(teacher)
    assert found == {
        "steps": 6 * 8 * 3 * own,
        "tables": 20 * taught,
        "evaluation": (3 * 5 + 7) * own,
    }
    timeline.stages = [(stage, 6, False)]
    found = trained_row.operations(timeline, types.SimpleNamespace(**sized))
    assert (found["steps"], found["tables"]) == (6 * 8 * (3 * own + taught), 0)


def test_halves_of_cifar10_are_what_the_loader_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(images, "EACH", 100)
    rng = np.random.default_rng(0)
    pictures, labels = [], rng.integers(0, 10, 600).astype(np.uint8)
    for half in range(2):
        tiles = rng.integers(0, 256, (3, 10, 10, 32, 32, 3)).astype(np.uint8)
        pictures.append(tiles.reshape(-1, 32, 32, 3))
        blobs = []
        for tile in tiles:
            file = io.BytesIO()
            Image.fromarray(tile.swapaxes(1, 2).reshape(320, 320, 3)).save(file, "png")
            blobs.append(file.getvalue())
        np.savez(
            tmp_path / f"{'ab'[half]}.npz",
            blob=np.frombuffer(b"".join(blobs), np.uint8),
            sizes=np.array([len(blob) for blob in blobs]),
            labels=labels[300 * half : 300 * half + 300],
            meta=json.dumps({"part": "ab"[half]}),
        )
    folder = tmp_path / "data"
    assert images.main([str(tmp_path / "b.npz"), str(folder)]) == 0
    assert "still lacks data_batch_1.bin, data_batch_2.bin, data_batch_3" in capsys.readouterr().out
    assert images.main([str(tmp_path / "a.npz"), str(folder)]) == 0
    assert "is complete" in capsys.readouterr().out
    loaded = data.load("cifar10", data_dir=str(folder), valid_fraction=0.0)
    np.testing.assert_array_equal(loaded.test.images, pictures[1][200:])
    np.testing.assert_array_equal(loaded.test.labels, labels[500:])
    train = sorted(image.tobytes() for image in loaded.train.images)
    assert train == sorted(image.tobytes() for image in np.concatenate(pictures)[:500])
    np.savez(tmp_path / "c.npz", blob=np.zeros(1))
    assert images.main([str(tmp_path / "c.npz"), str(folder)]) == 1
    assert "error: " in capsys.readouterr().err


# -------------------------------------------------------------------------------------- the tables
def step(name, seconds, **more):
    case = {"members": 1}
    found = {"seconds": [seconds] * 3, "ms": 1e3 * seconds, "images_per_second": 1.0, "case": case}
    return {"name": name, **found, "tflops": 1e-3 / seconds, **more}


def row(attempt, wall, seeds, **more):
    return {
        "name": "row",
        "seeds": seeds,
        "dataset": "cifar10",
        "attempt": attempt,
        "wall": wall,
    } | more


def found_lines():
    """Lines as the parts write them, by part."""
    done = {"done": True, "parts": {"training": 50.0}, "flops": {"steps": 5e15}}
    parity = {"arrays": 2, "broken": 0, "worst": "x", "bound": 1e-5, "seconds": 1.0}
    return {
        "steps": [
            step("plain", 0.001, peer="torch.compile"),
            step("ResNet, teachers is slow", 0.003, peer="torch.compile"),
            step("alone", 0.001, peer="gone", losses_differ=0.5),
            step("torch.compile", 0.0025),
            {"name": "gone", "missing": "torch is not installed"},
        ],
        "populations": [step("1", 0.001, peer="1"), step("5", 0.0025, peer="1")],
        "digests": [
            {"name": name, "deterministic": fixed, "digests": [digest]}
            for fixed, digests in ((False, "aba"), (True, "ccd"))
            for name, digest in zip(("run 1", "run 2", "resumed"), digests, strict=True)
        ],
        "row4": [
            {"name": "cold", "first_step": 12.25},
            {"name": "cold", "wall": 30.5, "done": True, "parts": {"compilation": 9.5}},
            {"name": "warm", "first_step": 3.25},
        ],
        "parity": [
            {"name": "a", "precision": "highest", "error": 1e-6, "verdict": "holds", **parity},
            {"name": "b", "precision": "highest", "error": None, "verdict": "BROKEN", **parity},
            {"name": "b", "precision": "default", "error": 1e-3, "verdict": "BROKEN", **parity},
        ],
        "row": [
            row(1, 40.0, 1, epoch=3),
            row(2, 60.0, 1, resumed=True, test_accuracy=[0.7228], **done),
            row(4, 5.0, 1, test_accuracy=[0.7228], **done),
            {"name": "experiments:whole", "failed": -9, "tail": "all\nis lost"},
            {"name": "end", "seconds": 61.0},
        ],
        "row5": [row(3, 150.0, 5, test_accuracy=[0.7] * 5, **done)],
    }


def test_a_file_alone_is_shown_with_the_targets(out, capsys):
    for variant in ("", "after"):
        for part, every in found_lines().items():
            to = lines.Lines(str(out), 0.0, part=part, variant=variant)
            for line in every:
                to.add(**line)
    assert command(f"--show={out}") == 0
    text = capsys.readouterr().out
    assert text.count("variant after") == 1
    for rows in (
        r"plain +│ +1 │ +2.50 │ +met │",
        r"slow +│ +3 │ +0.83 │ NOT met │",
        r"alone +│ +1 │ +│ +│",
        r"gone: torch is not installed",
        r"alone: its first losses DIFFER FROM ours, 5e-01",
        r"│ 5 +│ 2.5 │ +2.50 │ NOT met │ +0.50 │",
        r"│ no +│ +differ │ +│ +same │ +met │",
        r"│ yes +│ +same │ +met │ +differ │ NOT met │",
        r"cold +│ +12.2 │ +9.5 │ +30.5 │",
        r"warm +│ +3.2 │ +- │ +- │",
        r"highest +│ +2 │ +1 │ NOT met │ +1.0e-06 │ +0.1 │",
        r"default +│ +1 │ +0 │ +│ +1.0e-03 │ +1e\+02 │",
        r"b: x BROKEN, None of 1.0e-05",
        r"row of 1 seeds, cifar10, 2 processes: 100.0 s\n.*under 120 s: met",
        r"row of 5 seeds, cifar10, 1 processes: 150.0 s\n.*1.50 times that of one.*: met",
        r"5 PFLOP, 33.3 TFLOP/s over all of it",
        r"row, experiments:whole : failed: -9 is lost",
        r"seconds of each part: row 61",
    ):
        assert re.search(rows, text), rows
    widest = max(len(line) for line in text.splitlines() if line[:1] in "┏│└")
    assert widest <= 80


@pytest.mark.parametrize(
    ("more", "said"),
    [({"epoch": 3}, "not at its end"), ({"resumed": True, "done": True}, "no target applies")],
)
def test_a_row_that_is_not_whole_says_so(more, said):
    line = {"part": "row", "variant": "", "at": 1.0, **row(1, 40.0, 1, **more)}
    texts = [text for text in summary.tables([line]) if isinstance(text, str)]
    assert said in texts[-1]
