"""The authors' outputs, case by case, and a comparison that notices a wrong one."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from marks import slow

from experiments import golden
from experiments.parity import __main__ as parity
from experiments.parity.cases import Case, network_name, read_cases

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {case.name: case for case in read_cases(GOLDEN)}


LARGE = ("plane8", "plane10", "resnet20", "cifarresnet18", "hint", "rd_")
SLOW = [name for name in CASES if any(part in name for part in LARGE)]


@pytest.mark.parametrize("name", [*(x for x in CASES if x not in SLOW), *slow(*SLOW)])
def test_the_case_holds(name):
    case = CASES[name]
    single, double, verdict = parity.check_case(case, parity.check_of(case))
    broken = [found for found in single if not found.error <= found.bound]
    assert verdict != "BROKEN", broken
    assert len(single) >= 2


METHODS = [name for name in CASES if name.startswith("method_")]


@pytest.mark.parametrize("name", slow(*METHODS))
def test_a_method_is_its_authors_to_the_noise_of_float64(name):
    case = CASES[name]
    with jax.enable_x64(True):
        found = list(parity.check_of(case)(case, "float64"))
    assert not [one for one in found if not one.error <= one.bound]
    assert len(found) == sum(
        f":{kind}:" in key for key in case.arrays for kind in ("loss", "grad", "gparam", "bufafter")
    )


def write(folder, case, **arrays):
    stored = {**case.arrays, **arrays, "meta": json.dumps(case.meta)}
    np.savez(folder / f"{case.name}.npz", **stored)


def test_a_wrong_reference_is_broken_and_fails_the_command(tmp_path):
    case = CASES["trajectory_scratch_plane2"]
    write(tmp_path, case, loss=case.arrays["loss"] * (1 + 1e-4))
    table, fine = parity.run(tmp_path)
    assert not fine and table.row_count == 1


def test_an_unknown_kind_is_listed_and_breaks_nothing(tmp_path):
    write(tmp_path, Case("other", {"kind": "else"}, {"a": np.zeros(3)}))
    table, fine = parity.run(tmp_path)
    assert fine and "not known here" in list(table.columns[6].cells)


def test_a_folder_without_cases_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no golden case"):
        read_cases(tmp_path)


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
