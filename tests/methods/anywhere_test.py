"""Every method on any number of devices, with teachers dropped, in half precision, and resumed.

All methods that take the same networks teach one student at once, each with its own terms and
variables, so that few programs serve all. A new one is with the first of them, unless its networks
are told below.
"""

import dataclasses
import functools
import math
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from ending import Killed, Steps
from random_variables import random_variables

import distill_jax
from distill_jax import models
from distill_jax.interop.files import save_variables
from distill_jax.methods import METHODS
from distill_jax.train import trainer

SHAPE, CLASSES = (8, 8, 3), 4
# The networks of methods, largest first, and who teaches whom.
ANY = (("plane6", "plane4", "plane2"), "dense+drop")
ALIKE = (("plane2#3", "plane2#2", "plane2"), "dense+drop")
POOLED = (("resnet8#2", "resnet8", "plane2"), "dense+drop")
PHASED = (("plane6", "plane4#2", "plane2"), "dense+drop")
REMEMBERED = (("plane6#2", "plane4", "plane2"), "dense+drop")
BRANCHED = (("plane6", "plane4", "evolving:plane2"), "dense+drop")
PEERED = (("plane6", "plane4", "okddip:plane2"), "dense+drop")
MUTUAL = (("plane4", "plane2"), "mutual")
MUTUAL_EXITS = (("dks:plane4", "dks:plane2"), "mutual")
AUGMENTED = (("plane6#3", "plane4", "plane2"), "dense+drop")
OWN_VIEWS = (("plane4#2", "plane2"), "mutual")
PLACES = {
    **dict.fromkeys(("at", "nst", "vid", "fsp", "kdsvd", "ab", "reviewkd"), ALIKE),
    "ft": PHASED,
    "crd": REMEMBERED,
    "ca_mkd": POOLED,
    **dict.fromkeys(("teskd", "byot", "dks"), BRANCHED),
    **dict.fromkeys(("one", "okddip"), PEERED),
    "dml": MUTUAL,
    "dcm": MUTUAL_EXITS,
    **dict.fromkeys(("cs_kd", "ps_kd", "ddgsd"), AUGMENTED),
    "kdcl": OWN_VIEWS,
}
QUICK = ("kd", "fitnet", "rkd", "ctkd", "srrl")  # with variables, and with the whole batch
LINKS = ("n3", "l2")  # of networks that show embeddings: tests/data/triples_test.py
GROUPS = {
    place: tuple(x for x in METHODS if x not in LINKS and PLACES.get(x, ANY) == place)
    for place in dict.fromkeys((ANY, *PLACES.values()))
}
CASES = [(ANY, QUICK), *GROUPS.items()]
SETTINGS = {
    "two devices": {"devices": 2},
    "four devices": {"devices": 4},
    "pmap": {"devices": 2, "parallel": "pmap"},
    "bfloat16": {"dtype": "bfloat16"},
}
WEIGHT = 0.01  # of each method: together they are not to run away with the student
BASE = {
    "dataset": {"name": "synthetic:8x8x3:4:64:16", "valid_fraction": 0.25},
    "recipe": {"epochs": 2, "batch_size": 16, "learning_rate": 1e-3, "kd_weight": 0.5},
    "dropping": {"number": 1},
    "selection": "last",
}


@functools.cache
def weights_of(name):
    """A file of a teacher's weights."""
    file = Path(tempfile.mkdtemp()) / "weights.npz"
    shapes = models.build(name.partition("#")[0], CLASSES, SHAPE).shapes
    save_variables(file, random_variables(shapes, sum(map(ord, name))))
    return file


def run(place, methods, reporter=None, workdir=None, **changes):
    (*teachers, _), guidance = place
    config = {**BASE, "networks": place[0], "guidance": (guidance,), **changes}
    # The labels count in the place of those that methods bring.
    weights = dict.fromkeys(methods, WEIGHT) | {"ce": 1.0}
    if place in (BRANCHED, PEERED):  # the last one has branches, and no other
        config["overrides"] = {place[0][-1]: {"methods": {**weights, "kd": WEIGHT}}}
        weights = {"kd": WEIGHT, "ce": 1.0}
    if place in (AUGMENTED, OWN_VIEWS):
        config["recipe"] = {**BASE["recipe"], "augment": "crop_flip"}
    if guidance != "mutual" and "teacher_weights" not in changes:
        files = {name: weights_of(name) for name in teachers}
        config["teacher_weights"] = ",".join(f"{name}={file}" for name, file in files.items())
    if place == PHASED:
        config["phases"] = ({"methods": dict.fromkeys(methods, 1.0), "epochs": 1},)
    return distill_jax.run({**config, "methods": weights}, reporter=reporter, workdir=workdir)


@functools.cache
def whole(place, methods):
    """A run on one device."""
    return run(place, methods)


def curves(results):
    """{(network, seed): {name: its value in each epoch}} of what was trained."""
    return {
        key[1:]: {name: [epoch[name] for epoch in history] for name in history[0]}
        for key, history in results.histories.items()
        if history
    }


def assert_close(results, expected, rtol, atol):
    """Asserts that every term, loss and statistic is that of another run."""
    given, wanted = curves(results), curves(expected)
    assert given.keys() == wanted.keys() and given
    for key, names in wanted.items():
        for name in sorted(names.keys() - {"images_per_second"}):
            if "accuracy" not in name:
                np.testing.assert_allclose(
                    given[key][name], names[name], rtol, atol, err_msg=f"{key} {name}"
                )


def digests(results):
    return {(row["network"], row["seed"]): row["state_digest"] for row in results.rows}


def parameters(*cases, quick=()):
    """Cases with what they are called; all are slow but those of a few methods, `quick` of them."""
    return [
        pytest.param(
            *case,
            marks=() if case[1] == QUICK and set(case[2:]) <= set(quick) else pytest.mark.slow,
            id=" ".join([*case[1], *case[2:]]),
        )
        for case in cases
    ]


def test_every_method_has_its_place():
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(
        set(METHODS) - {*LINKS}
    )
    assert set(PLACES) <= set(METHODS)


@pytest.mark.parametrize(
    ("place", "methods", "setting"),
    parameters(*((*x, setting) for x in CASES for setting in SETTINGS), quick=["two devices"]),
)
def test_methods_teach_the_same_on_other_devices_and_nearly_in_half_precision(
    place, methods, setting
):
    results, expected = run(place, methods, **SETTINGS[setting]), whole(place, methods)
    half = setting == "bfloat16"
    assert_close(results, expected, *((0.3, 0.05) if half else (5e-4, 1e-5)))
    for key, (_, variables) in expected.networks.items():
        mine = results.networks[key][1]
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(variables), strict=True):
            assert a.dtype == b.dtype and np.isfinite(a).all()
            np.testing.assert_allclose(a, b, *((0.1, 0.05) if half else (1e-3, 2e-5)))


@pytest.mark.parametrize(("place", "methods"), parameters(*CASES))
def test_a_run_with_methods_that_was_killed_ends_with_the_bytes_of_one_that_was_not(
    place, methods, tmp_path, monkeypatch
):
    monkeypatch.setattr(trainer, "DISPATCH_SECONDS", 0.0)  # one step a dispatch
    for steps in (2, 3):
        with pytest.raises(Killed):
            run(place, methods, Steps(steps), tmp_path, checkpoint_every="1 steps")
    results = run(place, methods, None, tmp_path, checkpoint_every="1 steps")
    assert digests(results) == digests(whole(place, methods))
    for key, names in curves(whole(place, methods)).items():
        found = curves(results)[key]
        assert {**found, "images_per_second": 0} == {**names, "images_per_second": 0}


@pytest.mark.parametrize(("place", "methods"), parameters(*GROUPS.items()))
def test_seeds_that_train_at_once_are_what_they_are_alone(place, methods):
    one, other = whole(place, methods), run(place, methods, seeds=(1,))
    both = run(place, methods, seeds=(0, 1), population=2, devices=2)
    # Not to the bit: XLA orders some methods' sums otherwise in the program of several.
    alone = dataclasses.replace(one, histories={**one.histories, **other.histories})
    assert_close(both, alone, 5e-4, 1e-5)


def _of_branches(name):
    """Whether a network without branches has no such curve."""
    return any(x in name for x, y in METHODS.items() if y.trains_branches) or "branch" in name


@pytest.mark.parametrize(("place", "methods"), parameters(*GROUPS.items()))
def test_what_a_method_taught_teaches_the_next_of_a_chain(place, methods):
    (first, *_), guidance = place
    if guidance == "mutual":
        pytest.skip("no chain: they teach each other")
    given = f"{first}={weights_of(first)}"
    chain = run(place, methods, guidance=("chain",), students=place[0][1:], teacher_weights=given)
    trained = curves(chain)
    assert [name for name, _ in trained] == list(place[0][1:])
    known = [x for x in curves(whole(place, methods))[place[0][-1], 0] if x.startswith("train_")]
    terms = {x for x in known if not x.startswith("train_kept")}  # nobody is dropped in a chain
    for (network, _), names in trained.items():
        own = {name for name in terms if network == place[0][-1] or not _of_branches(name)}
        assert own <= set(names)
        assert all(math.isfinite(x) for values in names.values() for x in values)
