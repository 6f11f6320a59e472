"""Teachers that come with their weights: read, never trained, and as good as those that were."""

import itertools

import jax
import numpy as np
import pytest
from marks import slow

import distill_jax
from distill_jax import ConfigError, data, models
from distill_jax.interop.files import load_variables, save_variables
from distill_jax.runs.given import network_of
from distill_jax.train.reporter import Reporter

ENDINGS = (".safetensors", ".npz", ".pth")
TINY = {
    "dataset": {"name": "synthetic:8x8x3:4:64:32", "valid_fraction": 0.5},
    "networks": ("plane4", "plane2"),
    "students": ("plane4", "plane2"),
    "guidance": "direct",
    "recipe": {"epochs": 2, "batch_size": 16},
}


class Recorder(Reporter):
    """Who was trained, who ended, and what was noted before the first step."""

    def __init__(self):
        self.started, self.ended, self.lines = [], [], []

    def stage_started(self, jobs, step, steps, histories):
        self.started += [job.network.name for job in jobs]

    def stage_ended(self, job, record):
        self.ended.append((job.network.name, record["epochs"]))

    def notice(self, lines):
        self.lines += lines


def random_variables(name, classes=4, seed=0):
    """A network and variables of it that nobody trained, from NumPy."""
    network, rng = models.build(name, classes, (8, 8, 3)), np.random.default_rng(seed)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return network, jax.tree.map(
        lambda x: rng.uniform(0.1, 1.0, x.shape).astype(np.float32), shapes
    )


def run(**changes):
    recorder = Recorder()
    return distill_jax.run({**TINY, **changes}, reporter=recorder), recorder


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.fixture(scope="module")
def trained():
    return run()[0]


@pytest.fixture(scope="module")
def files(trained, tmp_path_factory):
    """The trained teacher's weights in every format."""
    folder = tmp_path_factory.mktemp("weights")
    _, variables = trained.networks["direct", "plane4", 0]
    paths = {ending: folder / f"teacher{ending}" for ending in ENDINGS}
    for path in paths.values():
        save_variables(path, variables)
    return {ending: str(path) for ending, path in paths.items()}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_teacher_read_from_a_file_teaches_to_the_bit_as_the_one_it_was(trained, files, ending):
    results, recorder = run(teacher_weights=files[ending])
    assert recorder.started == ["plane2"]
    assert recorder.ended == [("plane4", 0), ("plane2", 2)]
    for name in ("plane4", "plane2"):
        network, variables = results.networks["direct", name, 0]
        expected = trained.networks["direct", name, 0]
        assert network == expected[0] and same(variables, expected[1])
    given, student = results.rows
    before, taught = trained.rows
    for key in ("test_accuracy", "valid_accuracy", "parameters", "ece", "network", "teachers"):
        assert given[key] == before[key], key
    assert (given["epochs"], given["best_epoch"], given["seconds"]) == (0, 0, 0.0)
    assert given["last_test_accuracy"] == given["test_accuracy"]
    assert results.histories["direct", "plane4", 0] == []
    for key in ("state_digest", "test_accuracy", "agreement", "kl", "preflight", "teachers"):
        assert student[key] == taught[key], key
    assert student["stage"] != taught["stage"] and given["stage"] != before["stage"]


def test_a_network_in_the_middle_is_named_with_its_file(files):
    row = ("plane6", "plane4", "plane2")
    path = files[".npz"]
    results, recorder = run(
        networks=row,
        students="plane2",
        guidance="plane4>plane2",
        teacher_weights=f"plane4={path}",
    )
    assert recorder.started == ["plane2"]
    assert results.rows[0]["teachers"] == ["plane4"]
    spaced, _ = run(teacher_weights=f" plane4 = {path} ")
    assert spaced.rows[1]["state_digest"] == results.rows[0]["state_digest"]


def test_what_is_in_the_file_decides_and_not_its_name(trained, files, tmp_path):
    path = tmp_path / "teacher.npz"
    network, other = random_variables("plane4")
    save_variables(path, other)
    assert same(load_variables(path, network), other)
    # The student trained alone comes first, so that it is known that the teacher is worse.
    results, recorder = run(
        teacher_weights=str(path), guidance=("none", "direct"), students="plane2"
    )
    alone, taught = results.rows
    assert taught["state_digest"] != trained.rows[1]["state_digest"]
    assert recorder.started == ["plane2", "plane2"]
    assert alone["teachers"] == [] and taught["teachers"] == ["plane4"]
    worse = [line for line in recorder.lines if "trained alone" in line]
    assert len(worse) == 1 and worse[0].startswith("  warning: teacher plane4 (")
    assert f"({100 * alone['valid_accuracy']:.2f} %)" in worse[0]
    assert taught["preflight"]["warnings"] == [worse[0].removeprefix("  warning: ")]


def test_a_given_teacher_and_what_it_taught_are_found_again_by_the_files_content(trained, tmp_path):
    path = tmp_path / "teacher.npz"

    def run_with(variables):
        save_variables(path, variables)
        recorder = Recorder()
        changed = {**TINY, "teacher_weights": str(path)}
        rows = distill_jax.run(changed, workdir=tmp_path / "run", reporter=recorder).rows
        return rows, recorder.started

    own, other = trained.networks["direct", "plane4", 0][1], random_variables("plane4")[1]
    rows, started = run_with(own)
    assert started == ["plane2"]
    assert run_with(own) == (rows, [])
    others, started = run_with(other)
    assert started == ["plane2"]
    assert {row["stage"] for row in others}.isdisjoint(row["stage"] for row in rows)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        *itertools.product(["evolving:plane4", "evolving:plane4#2"], ["whole", "backbone"]),
        ("okddip:plane4#2", "whole"),
    ],
)
def test_a_network_with_branches_is_given_as_its_backbone(tmp_path, name, given):
    whole, variables = random_variables(name.partition("#")[0])
    backbone = models.deploy(whole, variables)
    path = tmp_path / "w.pth"
    save_variables(path, variables if given == "whole" else backbone)
    changes = {"networks": (name, "plane2"), "students": (name, "plane2")}
    results, recorder = run(teacher_weights=f"{name}={path}", **changes)
    assert recorder.started == ["plane2"]
    network, found = results.networks["direct", name, 0]
    assert network.branches == 0 and same(found, backbone)
    first, second = results.rows
    assert first["network"] == name and second["teachers"] == [name]
    assert first["parameters"] == models.count_parameters(network)
    assert "branch" not in " ".join(first)
    plain, _ = run(teacher_weights=f"plane4={path}", networks=("plane4", "plane2"))
    assert [row["state_digest"] for row in plain.rows] == [r["state_digest"] for r in results.rows]


@pytest.mark.parametrize("name", ["one1:plane4", *slow("evolving:plane4")])
def test_a_network_with_branches_of_an_earlier_run_is_given(tmp_path, name):
    changes = {"networks": (name, "plane2"), "students": (name, "plane2")}
    before = distill_jax.run({**TINY, **changes}, workdir=tmp_path / "run")
    (folder,) = tmp_path.glob(f"run/stages/{name.replace(':', '-')}-*")
    assert network_of(folder) == name
    for source in (f"{tmp_path / 'run'}:direct/{name}/0", folder):
        results, recorder = run(teacher_weights=f"{name}={source}", **changes)
        assert recorder.started == ["plane2"]
        for key, (network, variables) in before.networks.items():
            assert results.networks[key][0] == network
            assert same(results.networks[key][1], variables)


# ------------------------------------------------------------------------------- what is refused
def refused(tmp_path, *messages, **changes):
    """Fails unless the run is refused with all of `messages`, before anything starts."""
    recorder = Recorder()
    with pytest.raises(ConfigError) as caught:
        distill_jax.run({**TINY, **changes}, workdir=tmp_path / "run", reporter=recorder)
    for message in messages:
        assert message in str(caught.value)
    assert recorder.started == recorder.ended == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ending", ENDINGS)
def test_weights_of_other_classes_are_refused_with_every_shape(tmp_path, ending):
    path = tmp_path / f"five{ending}"
    save_variables(path, random_variables("plane4", classes=5)[1])
    refused(
        tmp_path,
        str(path),
        "not those of plane4 with 4 classes on (8, 8, 3) images",
        "fc_layers.0.weight has shape (5, 128), expected (4, 128)",
        "fc_layers.0.bias has shape (5,), expected (4,)",
        teacher_weights=str(path),
    )


def test_weights_of_another_network_are_refused_with_every_entry(tmp_path):
    path = tmp_path / "others.safetensors"
    save_variables(path, random_variables("plane2")[1])
    refused(
        tmp_path,
        "not those of plane4",
        "missing conv_layers.7.weight",
        "missing conv_layers.11.running_var",
        "fc_layers.0.weight has shape (4, 64), expected (4, 128)",
        teacher_weights=str(path),
    )
    save_variables(path, random_variables("plane6")[1])
    refused(
        tmp_path,
        "not those of plane4",
        "unexpected conv_layers.14.weight",
        "unexpected conv_layers.18.running_mean",
        networks=("plane6", "plane4", "plane2"),
        guidance="dense",
        teacher_weights=f"plane4={path}",
    )


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "damaged", "text", "nan"])
def test_a_file_that_is_none_is_refused_by_name(tmp_path, files, kind):
    path = tmp_path / ("weights.txt" if kind == "text" else "weights.npz")
    if kind == "folder":
        path.mkdir()
    elif kind in ("empty", "text"):
        path.write_bytes(b"no weights" if kind == "text" else b"")
    elif kind == "damaged":
        with open(files[".npz"], "rb") as file:
            path.write_bytes(file.read()[:2000])
    elif kind == "nan":
        state = dict(np.load(files[".npz"]))
        state["fc_layers.0.bias"][0] = np.nan
        np.savez(path, **state)
    message = {
        "missing": "cannot be read",
        "folder": "cannot be read",
        "empty": "is empty",
        "damaged": "damaged or cut short",
        "text": "starts with 6e6f2077",
        "nan": "not finite",
    }[kind]
    refused(tmp_path, str(path), message, teacher_weights=str(path))


def test_names_that_are_not_in_the_row_and_names_given_twice_are_refused(tmp_path, files):
    path = files[".npz"]
    refused(tmp_path, "teacher_weights", "plane9", teacher_weights=f"plane9={path}")
    refused(tmp_path, "did you mean 'plane4'", teacher_weights=f"plan4={path}")
    for text in (f"{path},plane4={path}", f"plane4={path},plane4={path}", "plane4="):
        refused(tmp_path, "one file for each network", teacher_weights=text)


def test_the_data_of_these_tests_has_a_split_to_compare_on():
    dataset = data.load(**TINY["dataset"])
    assert len(dataset.valid.labels) == len(dataset.train.labels) == len(dataset.test.labels) == 32
