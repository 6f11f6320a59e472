"""A run that is ended anywhere, by any signal, and started again ends with the same bytes."""

import collections
import contextlib
import functools
import itertools
import os
import shutil
import signal
import time

import cli
import numpy as np
import pytest
from marks import slow

CONFIG = """
from distill_jax import default_config

def get_config():
    config = default_config()
    config.dataset.update(name="synthetic:8x8x1:4:48:32", valid_fraction=0.25)
    config.networks, config.guidance = ("plane4", "plane2"), ("direct+drop",)
    config.dropping.update(kind="bernoulli", survival=0.5)
    config.recipe.update(epochs=2, batch_size=12, augment="crop_flip")
    config.checkpoint_every = "1 step"
    return config
"""
# What a method trains and keeps besides is saved and restored too, and so are phases.
FITNET = """
    config.methods = {"kd": 1.0, "fitnet": 1.0}
    config.method_options = {"fitnet": {"hint_layer": 1}}
    config.phases = ({"methods": {"fitnet": 1.0, "ce": 0.0}, "epochs": 1},)
    return config
"""
CONFIGS = {
    "dropping": CONFIG,
    "fitnet": CONFIG.replace("    return config\n", FITNET.lstrip("\n")),
    "cycle": CONFIG.replace('"direct+drop"', '"mutual"'),
}
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STEPS = 1 + 12  # how often a whole run changes its folder, at the very least


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Of a config, by name: what a run gives that nobody touched.

    (arguments, outcome, folder of compiled programs, changes).
    """

    @functools.cache
    def run(name):
        folder = tmp_path_factory.mktemp("whole")
        (folder / "config.py").write_text(CONFIGS[name])
        arguments = [f"--config={folder / 'config.py'}"]
        process = cli.start([*arguments, f"--workdir={folder / 'run'}"], folder / "log")
        changes = sum(1 for _ in changes_of(folder / "run", process))
        assert cli.ended(process) == 0, (folder / "log").read_text()
        return arguments, cli.outcome(folder / "run"), folder / "run" / "compiled", changes

    return run


def changes_of(workdir, process):
    """Yields what is in a folder (paths and sizes) whenever that has changed, while a run lasts."""
    before = None
    while process.is_alive():
        found = sorted(_files(workdir))
        if found != before:
            before = found
            yield found
        time.sleep(0.005)


def _files(workdir):
    for place, folders, files in os.walk(workdir):
        if "compiled" in folders:
            folders.remove("compiled")
        for name in (*folders, *files):
            path = os.path.join(place, name)
            with contextlib.suppress(OSError):  # gone since
                yield path, os.stat(path).st_size


def doing(found):
    """What a run was at, by what it left."""
    paths = [path for path, _ in found]
    unfinished = [path for path in paths if "orbax-checkpoint-tmp" in path]
    if any("weights" in path for path in unfinished):
        return "saving the last weights"
    if unfinished:
        return "saving"
    if any(path.endswith("results.json") for path in paths):
        return "at the end"
    stages = [path for path in paths if os.path.basename(os.path.dirname(path)) == "stages"]
    ended = [path for path in paths if path.endswith("result.json")]
    if not stages:
        return "starting"
    if len(stages) == len(ended):
        return "between stages"
    return "in the first stage" if len(stages) == 1 else "in the last stage"


@pytest.mark.parametrize(
    ("name", "kills"),
    [("dropping", 4), *slow(("dropping", 30), ("fitnet", 6), ("cycle", 6))],
)
def test_a_run_ended_anywhere_and_started_again_ends_with_the_same_bytes(
    whole, name, kills, tmp_path, record_property
):
    arguments, expected, compiled, changes = whole(name)
    assert changes > STEPS
    rng, ended = np.random.default_rng(0), []
    for attempt in itertools.count():
        if len(ended) == kills:
            break
        workdir, log = tmp_path / str(attempt), tmp_path / f"{attempt}.log"
        workdir.mkdir()
        shutil.copytree(compiled, workdir / "compiled")
        code = None
        while code != 0:
            process = cli.start([*arguments, f"--workdir={workdir}"], log)
            if len(ended) == kills:
                assert cli.ended(process) == 0, log.read_text()
                break
            number = SIGNALS[rng.integers(len(SIGNALS))]
            seen = end_somewhere(workdir, process, number, rng, changes)
            code = cli.ended(process)
            if code == 0:
                break
            ended.append((number.name, doing(sorted(_files(workdir)))))
            # Before the command has begun to listen, a signal ends it as it ends any process.
            allowed = {128 + number, -number} if seen <= 1 else {128 + number}
            allowed = {-number} if number == signal.SIGKILL else allowed
            assert code in allowed, (ended[-1], log.read_text())
        assert cli.outcome(workdir) == expected, ended
        shutil.rmtree(workdir)
    record_property("ended", str(collections.Counter(ended)))
    print(collections.Counter(ended))


def end_somewhere(workdir, process, number, rng, changes):
    """Sends a signal after a random number of changes to the folder, and a random moment more."""
    wanted, moment = rng.integers(changes // 5), rng.uniform(0, 0.1)
    seen = 0
    for seen, _ in enumerate(changes_of(workdir, process), 1):
        if seen > wanted:
            break
    time.sleep(moment)
    if process.is_alive():
        os.kill(process.pid, number)
    return seen


def test_a_full_disk_ends_with_words_and_loses_nothing(whole, tmp_path):
    arguments, expected, compiled, _ = whole("dropping")
    workdir, log = tmp_path / "run", tmp_path / "log"
    workdir.mkdir()
    shutil.copytree(compiled, workdir / "compiled")
    process = cli.start([*arguments, f"--workdir={workdir}"], log)
    for found in changes_of(workdir, process):
        if doing(found) == "in the first stage":
            break
    os.kill(process.pid, signal.SIGTERM)
    assert cli.ended(process) == 128 + signal.SIGTERM
    kept = sorted(workdir.glob("stages/*/progress/*"))
    assert kept
    # Enough for all that is printed, and for no checkpoint.
    process = cli.start([*arguments, f"--workdir={workdir}"], tmp_path / "full", limit=2**15)
    assert cli.ended(process) == 1
    message = (tmp_path / "full").read_text().splitlines()[-1]
    assert message.startswith("error: could not write the checkpoint") and "earlier" in message
    assert set(kept) <= set(workdir.glob("stages/*/progress/*"))
    process = cli.start([*arguments, f"--workdir={workdir}"], log)
    assert cli.ended(process) == 0
    assert cli.outcome(workdir) == expected
