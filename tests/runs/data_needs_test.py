"""Runs with mixed images and views: devices, a stop, seeds at once, and what is said of them."""

import functools

import jax
import numpy as np
import pytest
from marks import slow

import distill_jax
from distill_jax.train import trainer
from distill_jax.train.fit import Interrupted
from distill_jax.train.reporter import Reporter

BASE = {
    "dataset": {"name": "synthetic:8x8x3:4:64:16", "valid_fraction": 0.25},
    "networks": ("plane2", "plane2#2"),
    "guidance": ("direct",),
    "selection": "last",
    "devices": 1,
}
RECIPE = {
    "epochs": 2,
    "batch_size": 16,
    "learning_rate": 0.01,
    "augment": "inception_crop",
    "mixup": 0.4,
    "cutmix": 1.0,
}


class Heard(Reporter):
    """What is noticed, and when to stop."""

    def __init__(self, left=10**9):
        self.left, self.lines = left, []

    def progress(self, step, examples_per_second):
        self.left -= 1

    def notice(self, lines):
        self.lines += lines


def run(workdir=None, reporter=None, stop=None, recipe=None, **changes):
    config = {**BASE, "recipe": {**RECIPE, **(recipe or {})}, **changes}
    return distill_jax.run(config, workdir=workdir, reporter=reporter or Heard(), stop=stop)


@functools.cache
def whole():
    return run()


def assert_close(mine, theirs):
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, 2e-3, 1e-5)


@pytest.mark.parametrize(
    "setting", [{"devices": 2}, *slow({"devices": 4}, {"devices": 2, "parallel": "pmap"})]
)
def test_mixed_images_are_the_same_on_any_number_of_devices(setting):
    results = run(**setting)
    for key, (_, variables) in whole().networks.items():
        assert_close(results.networks[key][1], variables)


def test_a_run_with_mixed_images_that_was_stopped_ends_with_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "DISPATCH_SECONDS", 0.0)  # one step a dispatch
    heard = Heard(8)
    with pytest.raises(Interrupted):
        run(tmp_path, heard, lambda: heard.left <= 0)
    ended = [row["state_digest"] for row in run(tmp_path).rows]
    assert ended == [row["state_digest"] for row in whole().rows]


@pytest.mark.slow
def test_seeds_with_mixed_images_that_train_at_once_are_what_they_are_alone():
    both = run(seeds=(0, 1), population=2, devices=2)
    for seed in (0, 1):
        for key, (_, variables) in run(seeds=(seed,)).networks.items():
            assert_close(both.networks[key][1], variables)


def test_views_that_are_all_equal_are_warned_of():
    heard = Heard()
    recipe = {"augment": "none", "mixup": 0.0, "cutmix": 0.0, "epochs": 1}
    run(None, heard, recipe=recipe, guidance=("mutual",), methods={"kdcl": 1.0})
    said = "warning: kdcl gives each network a view of its own, but augment is 'none', which makes"
    assert [line for line in heard.lines if said in line]
