"""What is saved is believed only where it is to the byte what was asked for."""

import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import distill_jax
from distill_jax import data
from distill_jax.runs.checkpoint import CheckpointError, Checkpoints, Damaged, Mismatch
from distill_jax.runs.workdir import WorkdirError

# What orbax had begun to read is still on its way when it gives up a damaged file.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ABOUT = {"recipe": {"learning_rate": 0.05, "epochs": 2}, "data": "abc", "teachers": ["t1"]}
TEMPLATE = {"params": np.zeros((3, 4), np.float32), "step": np.zeros((), np.int32)}


def arrays(step):
    return {"params": np.full((3, 4), step, np.float32), "step": np.int32(step)}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("pristine") / "progress"
    for step in (1, 2):
        Checkpoints(folder, ABOUT).save(step, arrays(step), {"history": [{"loss": 0.1 * step}]})
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    return pathlib.Path(shutil.copytree(pristine, tmp_path / "progress"))


def restored(folder, template=TEMPLATE, about=ABOUT):
    saved, meta = Checkpoints(folder, about).restore(template)
    step = int(saved["step"])
    assert np.array_equal(saved["params"], arrays(step)["params"])
    assert meta["history"] == [{"loss": 0.1 * step}]
    return step


# ----------------------------------------------------------------------------------------- damage
def flip_first(raw):
    return bytes([raw[0] ^ 1]) + raw[1:]


def flip_middle(raw):
    middle = len(raw) // 2
    return raw[:middle] + bytes([raw[middle] ^ 16]) + raw[middle + 1 :]


HARM = {
    "first bit": flip_first,
    "middle bit": flip_middle,
    "half of it": lambda raw: raw[: len(raw) // 2],
    "nothing in it": lambda raw: b"",
    "zeros": lambda raw: bytes(len(raw)),
    "not there": None,
}


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


@pytest.mark.parametrize("harm", HARM, ids=lambda name: name.replace(" ", "_"))
def test_any_harm_to_any_file_of_the_newest_goes_back_one_or_is_none(folder, harm, caplog):
    """Of every file of a checkpoint: harm is either seen, said and undone, or did not matter."""
    whole, back = folder.with_name("whole"), 0
    shutil.copytree(folder, whole)
    names = [path.relative_to(folder) for path in files(folder / "2")]
    for name in names:
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        path, change = folder / name, HARM[harm]
        path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))
        caplog.clear()
        step = restored(folder)
        warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert bool(warnings) == (step == 1), name
        if step == 1:
            back += 1
            assert "going back to the one before it" in warnings[0].getMessage()
            assert Checkpoints(folder, ABOUT).steps() == [1]
            assert (folder / "2.damaged").is_dir()  # set aside, not thrown away
    assert back >= 2, names  # at the very least of the arrays and of the metadata


def test_what_was_damaged_does_not_count_among_those_kept(folder):
    for path in files(folder / "2"):
        path.write_bytes(b"")
    checkpoints = Checkpoints(folder, ABOUT)
    checkpoints.restore(TEMPLATE)
    for step in (2, 3):
        checkpoints.save(step, arrays(step), {"history": [{"loss": 0.1 * step}]})
    assert checkpoints.steps() == [2, 3] and restored(folder) == 3


def test_where_none_can_be_believed_the_error_names_the_way_out(folder):
    for path in files(folder):
        path.write_bytes(b"")
    with pytest.raises(
        Damaged, match="(?s)no checkpoint of .*remove it to start .* anew:.*/2 .*/1 "
    ):
        Checkpoints(folder, ABOUT).restore(TEMPLATE)
    assert Checkpoints(folder / "none", ABOUT).restore(TEMPLATE) is None


def test_arrays_of_another_save_are_damage_though_each_file_is_whole(folder):
    shutil.rmtree(folder / "2" / "arrays")
    shutil.copytree(folder / "1" / "arrays", folder / "2" / "arrays")
    assert restored(folder) == 1
    assert (folder / "2.damaged").is_dir()


def test_metadata_that_was_changed_with_care_is_damage_too(folder):
    path = folder / "2" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["history"][0]["loss"] = 0.0
    path.write_text(json.dumps(meta))
    assert restored(folder) == 1


# --------------------------------------------------------------------------------------- mismatch
@pytest.mark.parametrize(
    ("template", "about", "lines"),
    [
        (
            {**TEMPLATE, "params": np.zeros((3, 5), np.float32)},
            ABOUT,
            ["['params'] is 'float32 (3, 4)' there and 'float32 (3, 5)' here"],
        ),
        (
            {**TEMPLATE, "params": np.zeros((3, 4), np.float16)},
            ABOUT,
            ["['params'] is 'float32 (3, 4)' there and 'float16 (3, 4)' here"],
        ),
        (
            {"weights": TEMPLATE["params"], "step": TEMPLATE["step"]},
            ABOUT,
            ["['params'] is 'float32 (3, 4)' there and 'absent' here", "['weights'] is 'absent'"],
        ),
        (
            TEMPLATE,
            {"recipe": {"learning_rate": 0.1, "epochs": 3}, "data": "abc", "teachers": ["t1"]},
            ["recipe.epochs is 2 there and 3 here", "recipe.learning_rate is 0.05 there and 0.1"],
        ),
        (TEMPLATE, {**ABOUT, "data": "abd"}, ["data is 'abc' there and 'abd' here"]),
        (TEMPLATE, {**ABOUT, "teachers": []}, ["teachers is ['t1'] there and [] here"]),
        (TEMPLATE, {**ABOUT, "seed": 1}, ["seed is 'absent' there and 1 here"]),
    ],
    ids=["shape", "type", "names", "recipe", "data", "teachers", "seed"],
)
def test_of_another_training_is_a_refusal_with_every_difference_and_no_fallback(
    folder, template, about, lines, caplog
):
    before = {path: path.read_bytes() for path in files(folder)}
    with pytest.raises(Mismatch, match="is of another training") as caught:
        Checkpoints(folder, about).restore(template)
    for line in lines:
        assert line in str(caught.value)
    assert str(caught.value).count(" there and ") == max(len(lines), str(caught.value).count("\n"))
    assert not caplog.records
    assert {path: path.read_bytes() for path in files(folder)} == before


# ------------------------------------------------------------------------- through the public cli
TINY = {
    "dataset": {"name": "synthetic:8x8x1:4:48:32", "valid_fraction": 0.25},
    "networks": ("plane4", "plane2"),
    "guidance": ("direct",),
    "recipe": {"epochs": 1, "batch_size": 12},
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a run that is done, and its rows."""
    folder = tmp_path_factory.mktemp("done")
    return folder, distill_jax.run(TINY, workdir=folder).rows


def timeless(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.fixture
def copied(done, tmp_path):
    return pathlib.Path(shutil.copytree(done[0], tmp_path / "run")), done[1]


def stage_of(folder, network):
    (place,) = (folder / "stages").glob(f"{network}-*")
    return place


def test_a_finished_stage_that_is_damaged_is_trained_again_to_the_same_bytes(copied, caplog):
    folder, rows = copied
    for path in files(stage_of(folder, "plane2") / "weights"):
        path.write_bytes(path.read_bytes()[:5])
    again = distill_jax.run(TINY, workdir=folder).rows
    assert timeless(again) == timeless(rows)
    assert "was finished and is damaged" in caplog.text and "trained again" in caplog.text


@pytest.mark.parametrize("content", [None, b"", b"{", b"[" * 100_000, b'{"record": {}}'])
def test_a_result_for_people_is_written_again_from_what_is_believed(copied, content):
    folder, rows = copied
    path = stage_of(folder, "plane2") / "result.json"
    before = path.read_text()
    path.unlink() if content is None else path.write_bytes(content)
    assert distill_jax.run(TINY, workdir=folder).rows == rows
    assert path.read_text() == before


def test_the_weights_of_another_stage_are_refused(copied):
    folder, _ = copied
    distill_jax.run({**TINY, "seeds": (1,)}, workdir=folder)
    first, second = sorted((folder / "stages").glob("plane2-*"))
    shutil.rmtree(second / "weights")
    shutil.copytree(first / "weights", second / "weights")
    for seed in (0, 1):
        try:
            distill_jax.run({**TINY, "seeds": (seed,)}, workdir=folder)
        except Mismatch as error:
            assert "seed is " in str(error)
            break
    else:
        pytest.fail("another seed's weights were taken")


CHANGES = [
    (
        {"recipe": {**TINY["recipe"], "learning_rate": 0.02}},
        ["learning_rates.plane4 is 0.01 there and 0.02 here"],
    ),
    ({"recipe": {"epochs": 2, "batch_size": 24}}, ["recipe.epochs is 1 there and 2", "batch_size"]),
    ({"networks": ("plane6", "plane2")}, ["networks is ['plane4', 'plane2'] there"]),
    ({"dataset": {**TINY["dataset"], "split_seed": 1}}, ["dataset.split_seed is 0", "data is '"]),
    ({"dataset": {**TINY["dataset"], "name": "synthetic:8x8x1:3:48:32"}}, ["dataset.name is"]),
    ({"loss": {"kl_reduction": "element_mean"}}, ["loss.kl_reduction is 'batch_mean' there"]),
    ({"selection": "last"}, ["selection is 'validation' there and 'last' here"]),
    ({"dtype": "bfloat16"}, ["dtype is 'float32' there and 'bfloat16' here"]),
    ({"overrides": {"plane4": {"epochs": 3}}}, ["overrides.plane4 is 'absent' there"]),
]


@pytest.mark.parametrize(("change", "lines"), CHANGES, ids=lambda x: "-".join(x))
def test_another_experiments_folder_is_refused_with_every_difference(copied, change, lines):
    folder, _ = copied
    before = {path: path.read_bytes() for path in files(folder)}
    with pytest.raises(WorkdirError, match="holds another experiment") as caught:
        distill_jax.run({**TINY, **change}, workdir=folder)
    for line in lines:
        assert line in str(caught.value)
    assert {path: path.read_bytes() for path in files(folder)} == before


def test_a_field_of_the_recipe_that_there_was_not_yet_is_at_its_default(copied):
    folder, rows = copied
    path = folder / "config.json"
    saved = json.loads(path.read_text())
    del saved["resolved"]["recipe"]["ema"]
    path.write_text(json.dumps(saved))
    with pytest.raises(WorkdirError, match=r"recipe.ema is 0.0 there and 0.9 here"):
        distill_jax.run({**TINY, "recipe": {**TINY["recipe"], "ema": 0.9}}, workdir=folder)
    assert distill_jax.run(TINY, workdir=folder).rows == rows


def test_data_that_was_given_is_known_by_its_content(copied):
    folder, rows = copied
    dataset = data.load(**TINY["dataset"])
    assert distill_jax.run(TINY, workdir=folder, dataset=dataset).rows == rows
    dataset.train.images[0, 0, 0, 0] ^= 1
    with pytest.raises(WorkdirError, match="data is '"):
        distill_jax.run(TINY, workdir=folder, dataset=dataset)


@pytest.mark.devices
def test_resumable_fields_may_differ(copied):
    folder, rows = copied
    resumable = {"name": "other", "checkpoint_every": "1 steps", "devices": 2, "parallel": "pmap"}
    again = distill_jax.run({**TINY, **resumable, "guidance": ("direct", "none")}, workdir=folder)
    assert timeless(again.rows)[0] == timeless(rows)[0]


# ------------------------------------------------------------------------------------- a full disk
FULL = """
import resource, sys
import numpy as np
from pathlib import Path
from distill_jax.runs.checkpoint import CheckpointError, Checkpoints, write_json
checkpoints = Checkpoints(Path(sys.argv[1]), {})
checkpoints.save(1, {"a": np.arange(1000, dtype=np.float32)}, {})
write_json(checkpoints.folder / "rows.json", [1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for write in (
    lambda: checkpoints.save(2, {"a": np.random.default_rng(0).random(100_000, np.float32)}, {}),
    lambda: write_json(checkpoints.folder / "rows.json", list(range(10_000))),
):
    try:
        write()
    except CheckpointError as error:
        print(error)
    else:
        sys.exit("it was written")
"""


def test_a_full_disk_keeps_every_earlier_save_and_fails_with_words(tmp_path):
    folder = tmp_path / "progress"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(folder)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert f"could not write the checkpoint {folder / '2'} (" in done.stdout
    assert "earlier checkpoints are as they were" in done.stdout
    assert f"could not write {folder / 'rows.json'}" in done.stdout
    assert sorted(os.listdir(folder)) == ["1", "rows.json"]  # nothing half-written is left
    assert json.loads((folder / "rows.json").read_text()) == [1]
    saved, _ = Checkpoints(folder, {}).restore({"a": jax.ShapeDtypeStruct((1000,), np.float32)})
    assert np.array_equal(saved["a"], np.arange(1000.0))


def test_a_save_that_fails_leaves_the_one_of_that_name(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, arrays(1), {})

    def full(*arguments, **named):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoints.save(2, arrays(2), {})
    assert checkpoints.steps() == [1] and checkpoints.restore(TEMPLATE)


# ----------------------------------------------------------------- saves that take another's place
def test_a_save_that_fails_leaves_the_one_of_its_name_as_it_was(tmp_path, monkeypatch):
    place, arrays = Checkpoints(tmp_path / "progress"), {"w": np.arange(3, dtype=np.float32)}
    place.save(7, arrays, {"n": 1})

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CompositeCheckpointHandler, "save", full)
        with pytest.raises(CheckpointError, match="earlier checkpoints are as they were"):
            place.save(7, {"w": -arrays["w"]}, {"n": 2})
    restored, meta = place.restore(arrays)
    assert meta == {"n": 1} and [p.name for p in place.folder.iterdir()] == ["7"]
    np.testing.assert_array_equal(restored["w"], arrays["w"])
    place.save(7, {"w": -arrays["w"]}, {"n": 3})
    assert place.restore(arrays)[1] == {"n": 3} and place.steps() == [7]


@pytest.mark.parametrize("renames", [1, 2])
def test_a_process_that_ends_while_a_save_takes_anothers_place_loses_none(
    tmp_path, monkeypatch, renames
):
    place, arrays = Checkpoints(tmp_path / "progress"), {"w": np.arange(3, dtype=np.float32)}
    place.save(7, arrays, {"n": 1})
    replace, left = os.replace, [renames]

    def killed(*names):
        if "progress" in str(names[1]) and not str(names[1]).endswith("-tmp"):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        replace(*names)

    with monkeypatch.context() as patch:
        patch.setattr("distill_jax.runs.checkpoint.os.replace", killed)
        if renames == 1:
            with pytest.raises(KeyboardInterrupt):
                place.save(7, arrays, {"n": 2})
        else:
            place.save(7, arrays, {"n": 2})
    assert place.steps() == [7]
    assert place.restore(arrays)[1] == {"n": renames}
    assert place.steps() == [7] and [p.name for p in place.folder.iterdir()] == ["7"]


def test_what_orbax_tells_of_its_threads_is_not_said_and_what_others_tell_is(tmp_path, caplog):
    Checkpoints(tmp_path / "progress").save(1, {"w": np.zeros(3, np.float32)}, {})
    absl = logging.getLogger("absl")
    for place in (ocp.__file__, __file__):
        absl.handle(absl.makeRecord("absl", logging.WARNING, place, 1, "%s waits", (place,), None))
    assert f"{__file__} waits" in caplog.text and f"{ocp.__file__} waits" not in caplog.text
