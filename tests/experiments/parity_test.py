"""The authors' outputs, case by case, and a comparison that notices a wrong one."""

import json
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from marks import slow

from experiments import golden
from experiments.parity import __main__ as parity
from experiments.parity import methods
from experiments.parity.cases import Case, files, network_name, read_case

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {case.name: case for case in map(read_case, files(GOLDEN))}


LARGE = (
    "plane8",
    "plane10",
    "resnet20",
    "cifarresnet18",
    "hint",
    "factor",
    "y_method_reviewkd",
    "dml_plane4",
    "rd_",
)
SLOW = [name for name in CASES if any(part in name for part in LARGE)]


@pytest.mark.parametrize("name", [*(x for x in CASES if x not in SLOW), *slow(*SLOW)])
def test_the_case_holds(name):
    verdict = parity.judge(CASES[name])
    assert verdict.holds, list(verdict.lines())
    assert verdict.missing == () and verdict.stored >= 2


METHODS = [name for name in CASES if name.startswith("method_")]


@pytest.mark.parametrize("name", slow(*METHODS))
def test_a_method_is_its_authors_to_the_noise_of_float64(name):
    case = CASES[name]
    with jax.enable_x64(True):
        found = list(parity.check_of(case)(case, "float64"))
    assert not [one for one in found if not one.error <= one.bound]
    assert {one.what for one in found} == set(case.results())


def write(folder, case, **arrays):
    stored = {**case.arrays, **arrays, "meta": json.dumps(case.meta)}
    np.savez(folder / f"{case.name}.npz", **stored)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs the command on a folder that cases were written to: its exit code and its lines."""

    def run():
        monkeypatch.setattr(parity, "GOLDEN", types.SimpleNamespace(value=str(tmp_path)))
        code = parity.main([])
        return code, capsys.readouterr().out.splitlines()

    return run


def test_files_that_hold_are_counted_and_the_command_is_content(tmp_path, command):
    write(tmp_path, CASES["method_mse_logits"])
    write(tmp_path, CASES["method_bss"])
    code, lines = command()
    assert code == 0 and lines[-1] == "2 files, 2 hold"
    assert lines[1].split() == ["method_bss", "6", "of", "6", *lines[1].split()[4:6], "holds"]
    assert all(len(line) <= 80 for line in lines)


def test_a_wrong_reference_breaks_a_file_and_fails_the_command(tmp_path, command):
    case = CASES["method_mse_logits"]
    write(tmp_path, CASES["method_bss"])
    write(tmp_path, case, **{"base:loss:mse": case.arrays["base:loss:mse"] * (1 + 1e-4)})
    code, lines = command()
    assert code == 1 and lines[-1] == "2 files, 1 hold"
    assert "BROKEN" in lines[2] and lines[3].startswith("  base:loss:mse: error 1.0e-04, bound")


def test_a_weight_that_is_not_the_authors_breaks_a_file(tmp_path, command, monkeypatch):
    def heavier(numbers, inputs, state):
        computed = mse(numbers, inputs, state)
        return computed._replace(losses={k: 1.001 * x for k, x in computed.losses.items()})

    mse = methods.METHODS["mse_logits"]
    monkeypatch.setitem(methods.METHODS, "mse_logits", heavier)
    write(tmp_path, CASES["method_mse_logits"])
    code, lines = command()
    assert code == 1 and lines[-1] == "1 files, 0 hold"
    assert "base:grad:mse:student_logits: error 1.0e-03" in "".join(lines)


@pytest.mark.parametrize(
    ("added", "of", "fails"),
    [
        ("base:loss:other", "base:loss:mse", True),
        ("base:grad:mse:feature", "base:grad:mse:student_logits", True),
        ("base:gparam:mse:fc.weight", "base:grad:mse:student_logits", True),
        ("base:bufafter:bn.running_mean", "base:loss:mse", True),
        ("base:out:weights", "base:loss:mse", False),
    ],
)
def test_what_is_stored_and_not_compared_is_named(tmp_path, command, added, of, fails):
    case = CASES["method_mse_logits"]
    write(tmp_path, case, **{added: case.arrays[of]})
    code, lines = command()
    assert code == int(fails) and " 4 of 5 " in lines[1]
    assert lines[1].split()[-1] == ("INCOMPLETE" if fails else "holds")
    said = "left uncompared" if fails else "intermediate results not compared"
    assert lines[2] == f"  {said}: {added}"
    assert lines[-1] == f"1 files, {int(not fails)} hold"


def test_every_column_of_a_trajectory_has_to_be_compared():
    case = CASES["trajectory_method_dgkd_stochastic"]
    compared = {"losses total", "losses ce", "losses kl_0", "losses kl_1", "losses kl_2"}
    others = {"final_eval_logits", "final_norms", "final_delta_norms", "step1_grads"}
    assert set(case.results()) == compared | others


def test_the_noise_and_the_float64_of_a_column_are_its_own():
    losses = np.array([[1.0, 100.0], [2.0, 200.0]], np.float32)
    meta = {"columns": ["total", "kd"], "noise_columns": [0.0, 1e-3], "noise": {}}
    case = Case("c", meta, {"losses": losses, "f64_losses": losses + 1.0})
    assert case.compare("losses kd", losses[:, 1]) == ("losses kd", 0.0, 0.03)
    wide = case.compare("losses total", (losses[:, 0] + 1.0).astype(np.float64))
    assert wide == ("losses total", 0.0, 1e-5)


def test_files_that_nothing_answers_are_named_counted_and_fail_the_command(tmp_path, command):
    case = CASES["method_mse_logits"]
    write(tmp_path, case._replace(name="b", meta={**case.meta, "method": "brand_new"}))
    write(tmp_path, Case("c", {"kind": "else"}, {"a": np.zeros(3)}))
    np.savez(tmp_path / "d.npz", a=np.zeros(3))
    (tmp_path / "e.npz").write_bytes(b"no archive")
    write(tmp_path, case._replace(name="f", meta={"cases": {"x": {}}, "method": "rkd"}))
    write(tmp_path, case._replace(name="g"))
    code, lines = command()
    assert code == 1 and lines[-1] == "6 files, 1 hold"
    rows = {line[0]: line for line in lines[1:-1] if line[1] == " " and line[0] != " "}
    assert rows["b"].endswith(" brand_new is not known here")
    assert rows["c"].endswith(" a file of its kind is not known here")
    assert rows["d"].endswith("FAILED") and "FAILED" in rows["e"]
    assert rows["f"].endswith("INCOMPLETE") or rows["f"].endswith("FAILED")
    assert rows["g"].endswith("holds")


def test_a_folder_without_cases_is_an_error(tmp_path, command, capsys):
    assert command() == (1, [])
    with pytest.raises(ValueError, match="no golden case"):
        files(tmp_path)


def test_the_generator_is_that_of_the_cases():
    assert np.allclose(golden.weights("conv1.weight", (2, 1, 1, 1), 0).std(), 1.2, atol=1.0)
    assert golden.weights("bn.running_var", (100,), 0).min() >= 1.0
    assert golden.images(2, 1).shape == (2, 32, 32, 3)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("plane2", "plane2"),
        ("wrn_40_2", "wrn_40_2"),
        ("MobileNetV2", "mobilenetv2"),
        ("ShuffleV1", "shufflenetv1"),
        ("ResNet50", "resnet50_cifar"),
        ("resnet_our.cifarresnet18", "evolving:cifar_resnet18"),
        ("resnext_our.cifarresnext50", "evolving:cifar_resnext50"),
        ("senet_our.cifarsenet34", "evolving:cifar_senet34"),
        ("vgg_our.vgg16_bn", "evolving:cifar_vgg16"),
        ("resnext_our.resnext18", "evolving:cifar_resnext18"),
        ("senet_our.seresnet18", "evolving:cifar_senet18"),
    ],
)
def test_names_of_the_authors_networks(theirs, ours):
    assert network_name(theirs) == ours


def test_networks_of_a_thousand_classes_are_imagenets():
    assert network_name("resnet_our.resnet34", 1000) == "evolving:imagenet_resnet34"
