"""Refusals of public functions are raised from the call of them; mistakes in the code are not."""

import traceback

import numpy as np
import pytest

import distill_jax
from distill_jax import data
from distill_jax.refusals import refuses

IMAGES = np.zeros((8, 4, 4, 1), np.uint8), np.arange(8) % 2
CALLS = {
    "run": lambda folder: distill_jax.run({"networks": ("plane3", "planx")}),
    "run, later": lambda folder: distill_jax.run(
        {"dataset": {"name": "synthetic:8x8x1:4:48:32"}, "recipe": {"batch_size": 1000}}
    ),
    "run, data": lambda folder: distill_jax.run({"dataset": {"name": "digit"}}),
    "run, workdir": lambda folder: distill_jax.run({}, workdir=folder / "file"),
    "resolve": lambda folder: distill_jax.resolve({"epochs": 3}),
    "load": lambda folder: data.load("digit"),
    "from_arrays": lambda folder: data.from_arrays(IMAGES, IMAGES, classes=1),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_refusal_shows_the_call_and_one_line(call, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises((ValueError, distill_jax.WorkdirError)) as caught:
        CALLS[call](tmp_path)
    frames = traceback.extract_tb(caught.value.__traceback__)[1:]  # the first is of this test
    assert [frame.filename.rsplit("/", 1)[-1] for frame in frames] == [
        "tracebacks_test.py",
        "refusals.py",
    ]
    text = "".join(traceback.format_exception(caught.value))
    assert "direct cause" not in text and "another exception" not in text


def test_other_errors_keep_their_traceback():
    @refuses(ValueError)
    def outer(kind):
        def inner():
            raise kind("why")

        inner()

    for kind, depth in ((TypeError, 4), (ValueError, 2)):
        with pytest.raises(kind) as caught:
            outer(kind)
        assert len(traceback.extract_tb(caught.value.__traceback__)) == depth
