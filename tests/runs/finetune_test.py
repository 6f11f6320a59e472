"""Networks that start from weights in a file: what is taken, what is drawn, and what is refused."""

import hashlib
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen, traverse_util
from marks import slow
from PIL import Image

import distill_jax
from distill_jax import ConfigError, data, models, rng
from distill_jax.interop.files import load_variables, save_variables, write_state_dict
from distill_jax.runs import initial
from distill_jax.runs.export import export
from distill_jax.runs.prepare import prepare
from distill_jax.train.optim import OptimOptions
from distill_jax.train.reporter import Reporter
from distill_jax.train.step import init_state

CONFIG = {
    "dataset": {"name": "synthetic:8x8x3:3:48:24", "valid_fraction": 0.25},
    "networks": ("resnet14", "resnet8"),
    "guidance": ("direct",),
    "recipe": {"epochs": 2, "batch_size": 12, "learning_rate": 0.01},
    "devices": 1,
}
WIDTHS = (64, 128, 256, 512)
DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class Recorder(Reporter):
    """What was trained, and what was noted."""

    def __init__(self):
        self.trained, self.lines = [], []

    def stage_started(self, stages, step, steps, histories):
        self.trained += [stage.network.name for stage in stages]

    def notice(self, lines):
        self.lines += lines


def torchvision(depth, classes=1000, seed=0):
    """A state dict under the names and in the shapes of torchvision's, of random numbers."""
    state, draw = {}, np.random.default_rng(seed)

    def conv(name, inputs, outputs, size):
        state[f"{name}.weight"] = draw.normal(0, 0.05, (outputs, inputs, size, size))

    def norm(name, width):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{leaf}"] = draw.uniform(0.5, 1.5, width)
        state[f"{name}.num_batches_tracked"] = np.asarray(7)

    conv("conv1", 3, 64, 7)
    norm("bn1", 64)
    inputs, expansion = 64, 4 if depth >= 50 else 1
    for stage, (blocks, width) in enumerate(zip(DEPTHS[depth], WIDTHS, strict=True), 1):
        for block in range(blocks):
            at, wide = f"layer{stage}.{block}", width * expansion
            sizes = (1, 3, 1) if expansion > 1 else (3, 3)
            widths = (inputs, *(width for _ in sizes[1:]), wide)
            for i, size in enumerate(sizes, 1):
                conv(f"{at}.conv{i}", widths[i - 1], widths[i], size)
                norm(f"{at}.bn{i}", widths[i])
            if block == 0 and (stage > 1 or inputs != wide):
                conv(f"{at}.downsample.0", inputs, wide, 1)
                norm(f"{at}.downsample.1", wide)
            inputs = wide
    state["fc.weight"] = draw.normal(0, 0.05, (classes, inputs))
    state["fc.bias"] = draw.normal(0, 0.05, classes)
    return {k: x if x.dtype == np.int64 else x.astype(np.float32) for k, x in state.items()}


def drawn(name, classes, seed=0):
    """A network and variables of it from NumPy."""
    network, draw = models.build(name, classes, (8, 8, 3)), np.random.default_rng(seed)

    def fill(leaf):
        return draw.uniform(0.2, 1.0, leaf.shape).astype(np.float32) / max(1, leaf.ndim**2)

    return network, jax.tree.map(fill, network.shapes)


def file_of(path, name="resnet8", classes=5, seed=0):
    save_variables(path, drawn(name, classes, seed)[1])
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Weights of the two networks for five classes."""
    return {name: file_of(tmp_path / f"{name}.pth", name) for name in CONFIG["networks"]}


def init(files, anew="classifier"):
    return {"weights": ",".join(f"{k}={v}" for k, v in files.items()), "anew": anew}


def prepared(**changes):
    return prepare(distill_jax.resolve({**CONFIG, **changes}))


def ids(**changes):
    """(network, guidance) -> id."""
    plan = prepared(**changes).plan
    return {(name, label): stage_id for (label, name, _), stage_id in plan.results.items()}


def refused(*parts, **changes):
    with pytest.raises(ConfigError) as caught:
        prepared(**changes)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


# ------------------------------------------------------------------------------------ what is taken
@pytest.mark.parametrize("depth", [18, 50, *slow(34)])
def test_torchvisions_state_dicts_are_taken_but_for_the_classifier(tmp_path, depth):
    state = torchvision(depth)
    write_state_dict(tmp_path / "theirs.pth", state)
    name = f"imagenet_resnet{depth}"
    config = {
        "dataset": {"name": "synthetic:32x32x3:3:48:24", "valid_fraction": 0.25},
        "networks": (name,),
        "guidance": ("none",),
        "init": {"weights": str(tmp_path / "theirs.pth"), "anew": "classifier"},
    }
    got = prepared(**config)
    (beginning,) = got.beginnings.values()
    flat = traverse_util.flatten_dict(beginning.variables, sep="/")
    weights = sum(not key.startswith("fc.") and not key.endswith("tracked") for key in state)
    assert len(flat) == weights and not any("/fc/" in path for path in flat)
    for theirs, ours in (
        ("conv1.weight", "params/conv1/kernel"),
        ("layer4.1.conv2.weight", "params/layer4.1/conv2/kernel"),
        ("layer2.0.downsample.0.weight", "params/layer2.0/downsample.0/kernel"),
    ):
        np.testing.assert_array_equal(flat[ours], state[theirs].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(
        flat["batch_stats/layer3.1/bn1/var"], state["layer3.1.bn1.running_var"]
    )
    (line,) = initial.lines(got.plan.stages.values(), got.beginnings)
    assert line == (
        f"  {name} starts from {tmp_path / 'theirs.pth'}; classifier (3 classes) drawn anew; the "
        "file has 1000"
    )


def test_what_is_not_there_is_drawn_from_the_seed_and_the_rest_is_the_files():
    network, whole = drawn("resnet8", 3)
    flat = traverse_util.flatten_dict(whole)
    part = traverse_util.unflatten_dict({k: x for k, x in flat.items() if "fc" not in k})
    for seed in (0, 1):
        fresh = network.init(rng.stream(jax.random.key(seed), "init"))["params"]["fc"]
        state = init_state(network, OptimOptions(), jax.random.key(seed), start=part)
        got = traverse_util.flatten_dict(state.variables("resnet8"))
        assert got.keys() == flat.keys()
        for path, leaf in got.items():
            expected = fresh[path[-1]] if "fc" in path else flat[path]
            np.testing.assert_array_equal(leaf, expected, err_msg=str(path))
    state = init_state(network, OptimOptions(), jax.random.key(0), start=whole)
    assert jax.tree.all(jax.tree.map(np.array_equal, state.variables("resnet8"), whole))


def test_branches_are_drawn_beside_a_backbone_that_is_taken(tmp_path):
    path = file_of(tmp_path / "w.npz", classes=3)
    got = prepared(
        networks=("evolving:resnet8",), guidance=("none",), init={"weights": path, "anew": ""}
    )
    (beginning,) = got.beginnings.values()
    network = models.build("evolving:resnet8", 3, (8, 8, 3))
    state = init_state(network, OptimOptions(), jax.random.key(0), start=beginning.variables)
    own = state.variables("evolving:resnet8")
    assert jax.tree.structure(own) == jax.tree.structure(network.shapes)
    kept = models.deploy(network, own)
    assert jax.tree.all(jax.tree.map(np.array_equal, kept, drawn("resnet8", 3)[1]))


# --------------------------------------------------------------------------------------- training
def run(workdir=None, stop=None, **changes):
    recorder = Recorder()
    config = {**CONFIG, **changes}
    return distill_jax.run(config, workdir=workdir, reporter=recorder, stop=stop), recorder


def test_a_teacher_and_a_student_are_fine_tuned_and_the_one_teaches_the_other(files):
    recipe = {**CONFIG["recipe"], "trainable": ("fc.*",)}
    seeds, students = (0, 1), CONFIG["networks"]
    common = {"recipe": recipe, "init": init(files), "students": students}
    results, recorder = run(**common, seeds=seeds, population=2)  # both seeds at once
    assert recorder.trained == ["resnet14", "resnet14", "resnet8", "resnet8"]
    for (name, path), seed in itertools.product(files.items(), seeds):
        line = f"  {name} starts from {path}; classifier (3 classes) drawn anew; the file has 5"
        assert recorder.lines.count(line) == 1
        network, variables = results.networks["direct", name, seed]
        assert network.classes == 3 and variables["params"]["fc"]["kernel"].shape == (64, 3)
        theirs = load_variables(path, models.build(name, 5, (8, 8, 3)))["params"]
        for module in theirs.keys() - {"fc"}:  # these do not move
            same = jax.tree.map(np.array_equal, variables["params"][module], theirs[module])
            assert jax.tree.all(same), module
    assert [row["teachers"] for row in results.rows] == 2 * [[], ["resnet14"]]
    drawn = [results.networks["direct", "resnet8", x][1]["params"]["fc"]["kernel"] for x in seeds]
    assert np.abs(drawn[0] - drawn[1]).max() > 0.05


def test_with_as_many_classes_the_whole_file_is_taken_unless_the_word_is_said(tmp_path):
    path = file_of(tmp_path / "w.npz", classes=3)
    alone = {"networks": ("resnet8",), "guidance": ("none",)}
    kept = prepared(**alone, init={"weights": path, "anew": ""})
    (beginning,) = kept.beginnings.values()
    assert jax.tree.all(jax.tree.map(np.array_equal, beginning.variables, drawn("resnet8", 3)[1]))
    (line,) = initial.lines(kept.plan.stages.values(), kept.beginnings)
    assert line == f"  resnet8 starts from {path}"
    anew = prepared(**alone, init={"weights": path, "anew": "classifier"})
    (beginning,) = anew.beginnings.values()
    assert beginning.classes == 3 and "fc" not in beginning.variables["params"]


def test_a_run_that_was_stopped_goes_on_from_there_and_ends_with_the_same_bytes(tmp_path, files):
    alone = {
        "networks": ("resnet8",),
        "guidance": ("none",),
        "init": init({"resnet8": files["resnet8"]}),
        "recipe": {**CONFIG["recipe"], "augment": "crop_flip"},
    }
    whole, _ = run(**alone)
    asked = itertools.count()
    with pytest.raises(KeyboardInterrupt, match="stopped and saved"):
        run(tmp_path / "run", stop=lambda: next(asked) >= 2, **alone)
    resumed, recorder = run(tmp_path / "run", **alone)
    assert recorder.trained == ["resnet8"]
    assert resumed.rows[0]["state_digest"] == whole.rows[0]["state_digest"]
    again, recorder = run(tmp_path / "run", **alone)
    assert not recorder.trained and not any("starts from" in line for line in recorder.lines)
    file = export(str(tmp_path / "run"), "none", out=str(tmp_path / "student.safetensors")).path
    card = file.with_name(f"{file.name}.md").read_text()
    digest = hashlib.sha256(Path(files["resnet8"]).read_bytes()).hexdigest()
    began = f"`resnet8={files['resnet8']}`, digest {digest}, classifier drawn anew"
    assert f"| fine-tuned from | {began} |" in card
    # The weights of that run, of three classes, start one of four.
    wider = {**CONFIG["dataset"], "name": "synthetic:8x8x3:4:48:24"}
    normalised = data.load(**CONFIG["dataset"])
    wider |= {"mean": normalised.mean, "std": normalised.std}
    row = f"{tmp_path / 'run'}:none/resnet8/0"
    refused(
        "is resnet8 with 3 classes",
        **alone | {"dataset": wider, "init": init({"resnet8": row}, "")},
    )
    got = prepared(**alone | {"dataset": wider, "init": init({"resnet8": row})})
    (beginning,) = got.beginnings.values()
    _, trained = again.networks["none", "resnet8", 0]
    assert beginning.classes == 3
    np.testing.assert_array_equal(
        beginning.variables["params"]["conv1"]["kernel"], trained["params"]["conv1"]["kernel"]
    )


# -------------------------------------------------------------------------------------------- ids
def test_an_id_is_of_what_is_in_the_file_and_of_what_is_drawn(tmp_path):
    path, same = file_of(tmp_path / "a.npz", classes=3), file_of(tmp_path / "b.npz", classes=3)
    other = file_of(tmp_path / "c.npz", classes=3, seed=1)

    def of(path, anew=""):
        config = {"guidance": ("none", "direct"), "init": init({"resnet8": path}, anew)}
        return ids(**config)

    fresh, first = ids(guidance=("none", "direct")), of(path)
    assert of(same) == first
    for changed in (fresh, of(other), of(path, "classifier")):
        assert changed.keys() == first.keys()
        assert not set(changed.values()) & set(first.values())


def test_a_teachers_file_makes_another_student(tmp_path, files):
    teacher = {"resnet14": files["resnet14"]}
    other = {"resnet14": file_of(tmp_path / "other.pth", "resnet14", seed=1)}
    one, two = (ids(guidance=("none", "direct"), init=init(x)) for x in (teacher, other))
    assert one["resnet8", "none"] == two["resnet8", "none"]  # alone it is the same
    assert one["resnet8", "direct"] != two["resnet8", "direct"]


def test_the_first_phase_starts_from_the_file_and_the_next_from_that(tmp_path):
    phases = ({"epochs": 1},)

    def of(seed):
        path = file_of(tmp_path / f"{seed}.npz", classes=3, seed=seed)
        return prepared(phases=phases, init=init({"resnet8": path}, ""))

    got = of(0)
    first, last = (x for x in got.plan.stages.values() if x.network.name == "resnet8")
    assert first.phase and last.start == first.id
    assert list(got.beginnings) == [first.id]
    assert "initial" in got.plan.specs[first.id] and "initial" not in got.plan.specs[last.id]
    assert not set(of(1).plan.results.values()) & set(got.plan.results.values())
    # Alone it would start from the file too.
    path = str(tmp_path / "0.npz")
    alone = ids(guidance=("none",), init=init({"resnet8": path}, ""))
    assert got.plan.plain[last.id] == alone["resnet8", "none"]


def test_the_card_says_which_weights_the_first_phase_began_with(tmp_path):
    path = file_of(tmp_path / "w.npz", "plane2", classes=3)
    row = {"networks": ("plane4", "plane2"), "phases": ({"epochs": 1},)}
    run(
        tmp_path / "run",
        **row,
        recipe={"epochs": 1, "batch_size": 12},
        init=init({"plane2": path}, ""),
    )
    file = export(str(tmp_path / "run"), "direct", out=str(tmp_path / "w.safetensors")).path
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert f"`plane2={path}`, digest {digest} |" in file.with_name(f"{file.name}.md").read_text()


def test_a_config_that_names_no_file_has_the_ids_that_it_had():
    plan = prepared().plan
    assert not any("initial" in spec for spec in plan.specs.values())


# --------------------------------------------------------------------------------- what is refused
def test_another_number_of_classes_is_refused_with_both_and_the_word(files):
    refused(
        f"init.weights: {files['resnet14']} is resnet14 with 5 classes, and",
        "has 3: expected as many, or init.anew='classifier'",
        init=init(files, anew=""),
    )


def test_weights_of_another_architecture_are_refused_in_one_line(tmp_path):
    path = file_of(tmp_path / "deep.pth", "resnet20")
    for anew in ("", "classifier"):
        refused(
            f"init.weights: {path}: these weights are not those of resnet14 with 5 classes",
            "unexpected layer1.2.",
            " more",
            init={"weights": path, "anew": anew},
        )
    plain = file_of(tmp_path / "plain.npz", "plane2")
    refused(
        "not those of resnet14", "missing bn1.running_mean", init={"weights": plain, "anew": ""}
    )


def test_one_of_several_weights_in_a_file_is_chosen(tmp_path):
    states = {kind: np.load(file_of(tmp_path / f"{i}.npz", seed=i)) for i, kind in enumerate("ab")}
    names = {f"{kind}.{name}": x for kind, state in states.items() for name, x in state.items()}
    np.savez(tmp_path / "both.npz", **names)
    path = str(tmp_path / "both.npz")
    refused("holds several weights, under a, b", init=init({"resnet8": path}))
    for place, kind in enumerate("ab"):
        got = prepared(init=init({"resnet8": f"{path}#{kind}"}))
        (beginning,) = got.beginnings.values()
        expected = drawn("resnet8", 5, place)[1]["params"]["conv1"]["kernel"]
        np.testing.assert_array_equal(beginning.variables["params"]["conv1"]["kernel"], expected)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"anew": "classifier"}, ["init.anew is 'classifier', and init.weights is empty"]),
        ({"weights": "gone.pth"}, ["init.weights cannot be read: gone.pth does not exist"]),
        ({"weights": "resnet9=gone.pth"}, ["init.weights: unknown 'resnet9'"]),
        ({"weights": "logits:x.npz"}, ["init.weights names logits for resnet14"]),
        ({"weights": "a.pth", "anew": "head"}, ["init.anew is 'head': expected 'classifier'"]),
    ],
)
def test_fields_that_say_nothing_that_can_be_done(values, parts):
    refused(*parts, init=values)


def test_a_network_is_fine_tuned_or_given_not_both(files):
    weights = {"teacher_weights": files["resnet14"], "init": {"weights": files["resnet14"]}}
    refused("resnet14 stands in teacher_weights", "expected one of both", **weights)


class Fixed(linen.Module):
    """A network of three classes, whatever it is asked for."""

    @linen.compact
    def __call__(self, x, train):
        return linen.Dense(3)(x.mean((1, 2)))


def test_a_network_of_so_many_classes_and_no_more_has_no_classifier_to_draw(tmp_path):
    models.register_network("always_three", lambda classes, inputs: Fixed())
    path = file_of(tmp_path / "w.npz", "always_three", 3)
    alone = {"networks": ("always_three",), "guidance": ("none",)}
    assert prepared(**alone, init={"weights": path, "anew": ""}).beginnings
    refused(
        "nothing in always_three has another shape for another number of classes",
        **alone,
        init={"weights": path, "anew": "classifier"},
    )


# ---------------------------------------------------------------------------------- a whole folder
def birds(folder, sides=((20, 31), (40, 25), (16, 16))):
    """Pictures of three classes in the shape of CUB-200, JPEG and PNG of several sizes."""
    draw = np.random.default_rng(0)
    for part, label, i in itertools.product(("train", "test"), range(3), range(6)):
        pixels = draw.integers(0, 120, (*sides[i % 3], 3)).astype(np.uint8)
        pixels[..., label] += 130
        ending = ("jpg", "png")[i % 2]
        path = folder / part / f"{label + 1:03d}.Bird_{label}" / f"{i}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def test_the_config_fine_tunes_on_a_folder_of_pictures(tmp_path):
    names = ("plane4", "plane2")
    config = distill_jax.load_config(f"finetune_folder:{':'.join(names)}")
    config.dataset.data_dir = str(birds(tmp_path / "birds"))
    config.dataset.options = {"size": 8}
    config.seeds, config.devices = (0,), 1
    config.recipe.update(epochs=2, batch_size=6, warmup_epochs=0.0, augment="flip")
    config.init.weights = ",".join(f"{name}={tmp_path / name}.npz" for name in names)
    for name in names:
        file_of(tmp_path / f"{name}.npz", name)
    recorder = Recorder()
    results = distill_jax.run(config, reporter=recorder)
    assert sorted(recorder.trained) == ["plane2", "plane2", "plane4"]
    assert sum("(3 classes) drawn anew; the file has 5" in line for line in recorder.lines) == 2
    assert {row["guidance"] for row in results.rows} == {"none", "direct"}
    network, _ = results.networks["direct", "plane2", 0]
    assert (network.classes, network.image_shape) == (3, (8, 8, 3))


def test_the_config_without_a_file_says_what_it_needs(tmp_path):
    config = distill_jax.load_config("finetune_folder")
    config.dataset.data_dir = str(birds(tmp_path / "birds"))
    config.dataset.options = {"size": 8}
    with pytest.raises(ConfigError, match="init.weights is empty: expected the file that the rest"):
        prepare(distill_jax.resolve(config))
