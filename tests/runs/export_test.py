"""Networks of a run as files: what is read back, what the card says, what is refused."""

import json
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from jax import export

import distill_jax
from distill_jax import main
from distill_jax.interop import programs
from distill_jax.interop.files import load_variables
from distill_jax.interop.torch_weights import WeightsError
from distill_jax.runs.card import accuracy_over_seeds, write_card

CONFIG = {
    "networks": ("plane4", "plane2"),
    "guidance": ("none", "direct"),
    "seeds": (0, 1),
    "dataset": {"name": "synthetic:8x8x1:4:96:32"},
    "recipe": {"epochs": 1, "batch_size": 12},
}
RANDOM = np.random.default_rng(1)
IMAGES = RANDOM.integers(0, 256, (5, 8, 8, 1)).astype(np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run, and what it gave."""
    folder = tmp_path_factory.mktemp("run")
    return folder, distill_jax.run(CONFIG, workdir=folder, progress=False)


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the folder to be changed."""
    return shutil.copytree(
        run[0], tmp_path / "run", ignore=shutil.ignore_patterns("compiled", "exported")
    )


def exported(capsys, folder, *arguments):
    """The lines that the command prints, and the file that it writes."""
    assert main.main(["export", str(folder), *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    return lines, folder.__class__(lines[0])


def refused(capsys, *arguments):
    """The one line with which a command ends."""
    assert main.main(list(map(str, arguments))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def facts(file):
    return json.loads(file.with_name(f"{file.name}.json").read_text())


@pytest.mark.parametrize("form", ["safetensors", "pth", "npz"])
def test_weights_are_those_of_the_run_and_the_card_says_whose(run, capsys, tmp_path, form):
    folder, results = run
    out = tmp_path / "deep" / f"x.{form}"
    arguments = ("direct", "--seed=1", f"--format={form}", f"--out={out}")
    lines, file = exported(capsys, folder, *arguments)
    assert "differ by at most 0," in lines[-1] and file == out
    network, variables = results.networks["direct", "plane2", 1]
    jax.tree.map(np.testing.assert_array_equal, load_variables(file, network), variables)
    taught = [row for row in results.rows if row["guidance"] == "direct"]
    card, accuracies = facts(file), [row["test_accuracy"] for row in taught]
    # Two convolutions of 16 channels with BatchNorm, and 2 x 2 x 16 features to 4 classes.
    assert card["parameters"] == (9 + 1 + 2) * 16 + (9 * 16 + 1 + 2) * 16 + (64 + 1) * 4
    assert (card["teachers"], card["seed"], card["bytes"]) == (["plane4"], 1, file.stat().st_size)
    assert card["test_accuracy"] == accuracies[1] and card["accuracy"]["seeds"] == 2
    half = 12.706204736 * abs(accuracies[1] - accuracies[0]) / 2  # t of one degree, sd / sqrt 2
    assert card["accuracy"]["mean"] == pytest.approx(np.mean(accuracies))
    assert card["accuracy"]["half_interval"] == pytest.approx(half)
    text = file.with_name(f"{file.name}.md").read_text()
    assert f"| {100 * accuracies[1]:.2f} %, seed 1 |" in text and "plane4 (direct)" in text
    interval = f"{100 * np.mean(accuracies):.2f} ± {100 * half:.2f} %, mean and half of its 95 %"
    assert f"| over seeds | {interval} interval, n = 2 |" in text
    write_card(file, {**card, "accuracy": accuracy_over_seeds(taught[:1])})
    text = file.with_name(f"{file.name}.md").read_text()
    assert f"| over seeds | {100 * accuracies[0]:.2f} %, one seed |" in text


def test_a_program_takes_any_batch_on_any_platform(run, capsys):
    folder, results = run
    _, file = exported(capsys, folder, "direct", "--format=stablehlo", "--normalise=yes")
    program = export.deserialize(bytearray(file.read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    wanted = results.logits(IMAGES, "direct", "plane2", 0)
    for n in (1, 5):
        np.testing.assert_allclose(program.call(IMAGES[:n]), wanted[:n], rtol=1e-5, atol=1e-5)
    text, layers = program.mlir_module(), 2
    # JAX writes each down once, or once a platform.
    assert text.count("stablehlo.convolution(") in (layers, layers * 3)
    assert set(re.findall(r"custom_call @(\w+)", text)) <= {"shape_assertion"}


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda x: x.reshape(len(x), -1), "TypeError: '_DimExpr' object cannot be"),
        (lambda x: x if x.shape[0] > 4 else -x, "InconclusiveDimensionOperation: Symbolic"),
    ],
)
def test_a_network_that_takes_one_size_of_batch_alone_is_refused(forward, reason):
    """A module of the user's may ask for the size as a number."""
    spec = jax.ShapeDtypeStruct((1, 2, 2), np.float32)
    with pytest.raises(WeightsError, match=reason) as caught:
        programs.to_stablehlo(forward, spec)
    assert str(caught.value).startswith("the network cannot be traced for a batch of any size: ")
    assert "\n" not in str(caught.value)


def test_a_program_that_does_not_normalise_takes_what_the_network_sees(run, capsys):
    folder, results = run
    _, file = exported(capsys, folder, "none", "--format=stablehlo", "--network=plane2")
    forward, spec = programs.from_stablehlo(file.read_bytes())
    network, variables = results.networks["none", "plane2", 0]
    assert (spec.shape, spec.dtype) == ((1, 8, 8, 1), np.float32)
    seen = np.random.default_rng(2).standard_normal((3, 8, 8, 1)).astype(np.float32)
    wanted = network.apply(variables, seen)[0].logits
    np.testing.assert_allclose(forward(seen), wanted, rtol=1e-5, atol=1e-5)


def test_onnx_gives_the_same_logits(run, capsys):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("jax2onnx")
    folder, results = run
    _, file = exported(capsys, folder, "direct", "--format=onnx", "--normalise=yes")
    session = runtime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    wanted = results.logits(IMAGES, "direct", "plane2", 0)
    for n in (1, 5):
        (logits,) = session.run(None, {given.name: IMAGES[:n]})
        np.testing.assert_allclose(logits, wanted[:n], rtol=1e-5, atol=1e-5)


def test_data_that_a_run_was_given_is_not_taken_from_its_config(tmp_path, capsys):
    images, labels = RANDOM.integers(0, 256, (24, 8, 8, 1)).astype(np.uint8), np.arange(24) % 4
    given = distill_jax.data.from_arrays((images, labels), (images, labels), classes=4, name="own")
    config = {**CONFIG, "networks": ("plane2",), "guidance": ("none",), "seeds": (0,)}
    distill_jax.run(config, workdir=tmp_path / "run", dataset=given, progress=False)
    line = refused(capsys, "evaluate", f"--weights={tmp_path}/run:none/plane2/0")
    assert "run was trained on own, and its config names synthetic:8x8x1:4:96:32" in line
    _, file = exported(capsys, tmp_path / "run", "none")
    assert facts(file)["dataset"] == "own"
    again = distill_jax.run(config, workdir=tmp_path / "run", dataset=given, progress=False)
    assert again.rows[0]["seed"] == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("dense",), "has no 'dense': expected 'none', 'direct'"),
        (("direct", "--network=plane4"), "has no 'plane4' of 'direct': expected 'plane2'"),
        (("direct", "--seed=7"), "has no seed 7: expected 0, 1"),
        (("direct", "--seed=x"), "--seed=x: expected an integer"),
        (("direct", "--format=zip"), "zip"),
        (("direct", "--out=none/x.pth"), "ends as a file of another format than safetensors"),
        (("direct", "--normalise=yes"), "safetensors holds weights alone, which normalise nothing"),
    ],
)
def test_what_is_not_there_is_refused_in_a_line(run, capsys, arguments, expected):
    assert expected in refused(capsys, "export", run[0], *arguments)
    assert not (run[0] / "exported" / "none").exists()


def test_a_network_that_is_not_trained_yet_is_refused(copied, capsys):
    rows = json.loads((copied / "results.json").read_text())
    (copied / "results.json").write_text(json.dumps(rows[:-1]))
    assert "direct/plane2/1 is not trained yet; to go on:" in refused(
        capsys, "export", copied, "direct", "--seed=1"
    )
    rows[-1]["failed"] = "a loss that is not finite"
    (copied / "results.json").write_text(json.dumps(rows))
    assert "direct/plane2/1 could not be trained: a loss that" in refused(
        capsys, "export", copied, "direct", "--seed=1"
    )


def test_without_jax2onnx_it_says_what_to_install(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    assert "expected pip install 'distill_jax[onnx]'" in refused(
        capsys, "export", run[0], "direct", "--format=onnx"
    )


def test_what_reads_back_as_another_network_is_not_written(copied, capsys, monkeypatch):
    _, file = exported(capsys, copied, "direct", "--format=safetensors")
    before = file.read_bytes()
    monkeypatch.setattr(
        distill_jax.runs.export,
        "load_variables",
        lambda *_: distill_jax.load(copied).networks["none", "plane2", 1][1],
    )
    line = refused(capsys, "export", copied, "direct", "--format=safetensors")
    assert "is not written: read back, its logits differ by" in line
    assert file.read_bytes() == before and len(list(file.parent.iterdir())) == 3


def test_files_are_measured_in_turns_and_named(run, capsys):
    folder, _ = run
    files = [
        exported(capsys, folder, "none", f"--format={form}")[1] for form in ("npz", "stablehlo")
    ]
    assert main.main(["measure", *map(str, files), "--log=json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["file"] for one in found] == [str(file) for file in files]
    assert [one["bytes"] for one in found] == [file.stat().st_size for file in files]
    assert len({(one["parameters"], one["flops"], one["test_accuracy"]) for one in found}) == 1
    assert all(one["seconds_for_one"] > 0 and one["examples_per_second"] > 0 for one in found)
    assert main.main(["measure", str(files[1])]) == 0
    table = capsys.readouterr().out
    assert "FLOPs" in table and max(map(len, table.splitlines())) <= 80


def test_a_program_is_measured_without_a_card(run, capsys, tmp_path):
    _, file = exported(capsys, run[0], "none", "--format=stablehlo")
    alone = shutil.copy(file, tmp_path / "alone.stablehlo")
    assert main.main(["measure", str(alone), "--log=json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["parameters"] is None and json.loads(line)["seconds_for_one"] > 0


def test_files_that_cannot_be_measured_are_named(run, capsys, tmp_path):
    _, file = exported(capsys, run[0], "none", "--format=npz")
    alone, damaged = tmp_path / "alone.npz", tmp_path / "x.stablehlo"
    shutil.copy(file, alone)
    damaged.write_bytes(b"no program")
    assert f"{alone}: no alone.npz.json beside it says" in refused(capsys, "measure", alone)
    assert f"{damaged}: is damaged, or no program" in refused(capsys, "measure", damaged)
    assert "expected a file that export wrote" in refused(capsys, "measure", tmp_path / "x.tar")
    (tmp_path / "alone.npz.json").write_text('{"network": 3}')
    assert "alone.npz.json is damaged" in refused(capsys, "measure", alone)


def test_a_file_that_is_written_anew_never_has_the_card_of_the_one_before(
    copied, capsys, monkeypatch
):
    _, file = exported(capsys, copied, "none", "--format=npz")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(distill_jax.runs.export, "write_card", killed)
    with pytest.raises(KeyboardInterrupt):
        main.main(["export", str(copied), "none", "--format=npz"])
    assert [path.name for path in file.parent.iterdir()] == [file.name]
