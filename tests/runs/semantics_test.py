"""What a training computes, held to the number that stands for it in every stage's id."""

import json
import pathlib

import numpy as np
import pytest

import distill_jax
from distill_jax.runs.ids import FORMAT

RECORDED = pathlib.Path(__file__).parents[1] / "golden" / "semantics.json"
BASE = {
    "dataset": {"name": "synthetic:8x8x1:4:48:32", "valid_fraction": 0.25},
    "networks": ("plane4", "plane2"),
    "devices": 1,
    "recipe": {"epochs": 2, "batch_size": 12, "augment": "crop_flip", "learning_rate": 0.02},
}
TRAININGS = {
    "kd": {"guidance": ("direct",)},
    "drop": {
        "networks": ("plane6", "plane4", "plane2"),
        "guidance": ("dense+drop",),
        "dropping": {"kind": "bernoulli", "survival": 0.5},
    },
    "dml": {"guidance": ("mutual",)},
    "teskd": {"networks": ("evolving:plane4",), "guidance": ("none",)},
    "fitnet": {"guidance": ("direct",), "methods": {"kd": 1.0, "fitnet": 1.0}},
}


def trajectory(name):
    """The losses and accuracies of the last network's epochs."""
    results = distill_jax.run({**BASE, **TRAININGS[name]})
    (*_, history) = results.histories.values()
    return [[x["train_loss"], x["train_accuracy"], x["valid_loss"]] for x in history]


@pytest.mark.cpu
@pytest.mark.parametrize("name", TRAININGS)
def test_the_same_config_trains_as_it_did_when_the_number_was_raised(name):
    """To record anew: `python tests/runs/semantics_test.py`, with FORMAT of runs/ids.py raised."""
    recorded = json.loads(RECORDED.read_text())
    assert recorded["format"] == FORMAT, "record the trajectories of the raised number"
    # By rounding, which versions of JAX do otherwise, an example of the 36 may change its side.
    found, expected = (np.array(x) for x in (trajectory(name), recorded[name]))
    np.testing.assert_allclose(found[:, 1], expected[:, 1], rtol=0, atol=1.01 / 36)
    np.testing.assert_allclose(
        found[:, ::2],
        expected[:, ::2],
        rtol=1e-3,
        err_msg="trainings of these configs have changed: raise FORMAT in runs/ids.py, so that no "
        "finished stage is taken for what it is not, and record anew",
    )


if __name__ == "__main__":
    found = {name: trajectory(name) for name in TRAININGS}
    RECORDED.write_text(json.dumps({"format": FORMAT, **found}, indent=1) + "\n")
