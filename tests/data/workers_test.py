"""Worker processes: what they decode is what this process would, and they end with it."""

import io
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import distill_jax
from distill_jax import data
from distill_jax.data import streamed

N, SIDE = 22, 16
SCRIPT = pathlib.Path(__file__).parents[1] / "decoding.py"
CONFIG = {
    "networks": ("plane2",),
    "guidance": ("none",),
    "selection": "last",
    "recipe": {"epochs": 2, "batch_size": 8, "last_batch": "keep", "augment": "flip"},
}


def jpegs(n=N):
    """Pictures of different sizes."""
    files = []
    for i in range(n):
        file = io.BytesIO()
        pixels = np.random.default_rng(i).integers(0, 256, (20 + i % 9, 34 - i % 7, 3), np.uint8)
        Image.fromarray(pixels).save(file, "JPEG")
        files.append(file.getvalue())
    return files


def images_of(files):
    return streamed.Streamed(files, "many", np.arange(len(files)), side=SIDE, margin=4)


def reading_of(files, **changes):
    return data.Reading(images_of(files), 8, seed=3, epochs=2, last_batch="keep", **changes)


def decoded_here(files):
    """What each step of two epochs sees, a smaller last batch too, as threads decode it."""
    split = data.Split(images_of(files), np.zeros(len(files), int))
    batches = []
    for epoch in (0, 1):
        order, rest = data.epoch_order(len(files), 8, seed=3, epoch=epoch, last_batch="keep")
        images = data.at_epoch(split, 3, epoch).images
        batches += [np.asarray(images[rows]) for rows in (*order, rest)]
    return batches


def children():
    """The processes that this one has started, by grain or for it."""
    found = pathlib.Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    lines = {pid: command_of(pid) for pid in found}
    return [pid for pid, line in lines.items() if "spawn_main" in line]


def command_of(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # it has ended
        return ""


@pytest.mark.parametrize("group", [1, 3, 32])
def test_what_is_read_is_what_training_sees_in_its_order(monkeypatch, group):
    monkeypatch.setattr("distill_jax.data.workers.GROUP", group)
    files = jpegs()
    reading = reading_of(files)
    assert reading.steps == 3 and len(reading) == 6 * reading.groups
    groups = [reading[i] for i in range(len(reading))]
    assert max(map(len, groups)) <= group
    np.testing.assert_array_equal(np.concatenate(groups), np.concatenate(decoded_here(files)))


def test_processes_share_every_batch():
    files = jpegs(24)
    own = [reading_of(files, process=i, processes=2) for i in (0, 1)]
    for step, batch in enumerate(decoded_here(files)[:3]):  # of the first epoch
        both = np.concatenate([one[step * one.groups] for one in own])
        np.testing.assert_array_equal(both, batch)


def test_workers_decode_from_a_step_on_and_end_where_an_image_is_damaged():
    pytest.importorskip("grain")
    files = jpegs()
    expected = np.concatenate(decoded_here(files)[2:4])
    _, last = data.epoch_order(N, 8, seed=3, epoch=0, last_batch="keep")
    order, _ = data.epoch_order(N, 8, seed=3, epoch=1)
    damaged = next(i for i in order[1] if i not in last)
    files[damaged] = files[damaged][:100]
    workers = data.Workers(reading_of(files), 2, step=2)  # the damaged one was seen before that
    try:
        out = np.zeros((8 * 2 - 2, SIDE, SIDE, 3), np.uint8)  # a last batch of 6, and one of 8
        workers.read(out)
        np.testing.assert_array_equal(out, expected)
        with pytest.raises(data.DataError, match=f"^image {damaged} of many cannot be read"):
            workers.read(np.zeros((8, SIDE, SIDE, 3), np.uint8))
    finally:
        workers.close()
    assert not children()
    with pytest.raises(data.DataError, match="are closed"):
        workers.read(out)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_number_of_workers_changes_nothing(number):
    pytest.importorskip("grain")
    files, expected = jpegs(), np.concatenate(decoded_here(jpegs()))
    workers = data.Workers(reading_of(files), number)
    out = np.zeros_like(expected)
    workers.read(out)
    workers.close()
    np.testing.assert_array_equal(out, expected)


def dataset_of():
    files = jpegs(40)
    train, test = files[:N], files[N:]
    pairs = ((images_of(part), np.arange(len(part)) % 4) for part in (train, test))
    return data.from_arrays(*pairs, classes=4, name="tiny", valid_fraction=0.0)


@pytest.mark.slow
def test_training_ends_with_the_same_bytes_stopped_and_gone_on_too(monkeypatch, tmp_path):
    pytest.importorskip("grain")
    digests = [
        row["state_digest"]
        for workers in (0, 2)
        for row in distill_jax.run({**CONFIG, "workers": workers}, dataset=dataset_of()).rows
    ]
    assert digests[0] == digests[1] and not children()
    monkeypatch.setattr("distill_jax.train.trainer.DISPATCH_SECONDS", 0.0)
    asked = iter([False] * 5 + [True] * 9)  # once between stages, then after each step
    config = {**CONFIG, "workers": 2}
    with pytest.raises(distill_jax.runs.runner.fit.Interrupted):
        distill_jax.run(config, dataset=dataset_of(), workdir=tmp_path, stop=lambda: next(asked))
    assert not children()
    (row,) = distill_jax.run({**config, "workers": 1}, dataset=dataset_of(), workdir=tmp_path).rows
    assert row["state_digest"] == digests[0]


def test_a_number_below_zero_is_refused():
    with pytest.raises(distill_jax.ConfigError, match="workers is 0 or more, got -1"):
        distill_jax.run({**CONFIG, "workers": -1}, dataset=dataset_of())


def test_without_grain_it_is_named_before_anything_else(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(data.DataError, match=r"workers is 2 and grain .*distill_jax\[workers\]"):
        distill_jax.run({**CONFIG, "workers": 2}, dataset=dataset_of())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_no_worker_outlives_the_run(how):
    pytest.importorskip("grain")
    process = subprocess.Popen(
        [sys.executable, SCRIPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    workers = process.stdout.readline().split()
    assert len(workers) == 2 and all("spawn_main" in command_of(pid) for pid in workers)
    if how == "killed":
        process.kill()
    else:  # as a terminal's Ctrl-C does, which tells the workers too
        os.killpg(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=300)
    if how == "interrupted":
        assert process.returncode == 0 and "interrupted True" in out, errors
        assert "Traceback" not in errors
    end = time.monotonic() + 60
    while any("spawn_main" in command_of(pid) for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.1)
