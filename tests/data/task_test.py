"""Tasks: inputs that are no uint8 images, trained, measured and refused through the public API."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import marks
import numpy as np
import pytest

import distill_jax
from distill_jax import data, models
from distill_jax.data import sources
from distill_jax.runs.ids import digest_of
from distill_jax.runs.workdir import WorkdirError
from distill_jax.train import trainer
from distill_jax.train.reporter import Reporter

COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **about: COMPILED.append(event) if "backend_compile" in event else None
)
CLASSES = 3
SPEC = {
    "ids": jax.ShapeDtypeStruct((4,), np.int32),
    "pair": (jax.ShapeDtypeStruct((2, 3), np.float32), jax.ShapeDtypeStruct((), np.float32)),
}
CONFIG = {
    "networks": ("task_teacher", "task_student"),
    "guidance": ("direct",),
    "recipe": {"epochs": 2, "batch_size": 8, "learning_rate": 0.1, "temperature": 2.0},
}
MEASURED = {"seconds", "preflight"}


def examples(count, seed=0):
    """Inputs of SPEC's structure and labels that they decide."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 8, (count, 4), np.int32)
    grid = rng.standard_normal((count, 2, 3)).astype(np.float32)
    number = rng.standard_normal(count).astype(np.float32)
    labels = (ids.sum(1) + (grid.sum((1, 2)) > 0) + (number > 0)) % CLASSES
    return {"ids": ids, "pair": (grid, number)}, labels


def flat(inputs, key, train):
    """One vector of 14: half of the ids as they are scaled, the rest as it is."""
    del key, train
    grid, number = inputs["pair"]
    return {"all": jnp.concatenate([inputs["ids"] / 8.0, grid.ravel(), number[None]])}


def noisy(inputs, key, train):
    """As `flat`, under noise while it is trained on."""
    seen = flat(inputs, key, train)["all"]
    return {"all": seen + 0.3 * jax.random.normal(key, seen.shape) if train else seen}


def mlp(width):
    """A registered pair (init, apply) on {"all": (B, F)}."""

    def build(classes, inputs):
        size = inputs["all"].shape[1]

        def init(key):
            one, two = jax.random.split(key)
            a = jax.random.normal(one, (size, width)) / math.sqrt(size)
            b = jax.random.normal(two, (width, classes)) / math.sqrt(width)
            return {"params": {"a": a, "b": b}}

        def apply(variables, inputs):
            return jnp.tanh(inputs["all"] @ variables["params"]["a"]) @ variables["params"]["b"]

        return init, apply

    return build


def second(logits, labels):
    """Top-2 accuracy."""
    best = np.argsort(-logits, -1)[:, :2]
    return (best == labels[:, None]).any(-1).sum(), len(labels)


def margin_of_0(logits, labels):
    """The mean logit of class 0 among the examples of class 0, in JAX."""
    own = labels == 0
    return jnp.sum(jnp.where(own, logits[:, 0], 0.0)), jnp.sum(own)


def logit_of_1(logits, labels):
    """The mean logit of class 1, which leaves no example out unseen."""
    return logits[:, 1].sum(), len(labels)


def task(preprocess=flat, metrics=None):
    return data.Task(SPEC, CLASSES, preprocess, metrics or {})


def dataset(preprocess=flat, metrics=None, **options):
    given = {"valid_fraction": 0.25} | options
    pairs = examples(44), examples(21, seed=1)
    return data.from_arrays(*pairs, task=task(preprocess, metrics), **given)


@pytest.fixture(scope="module", autouse=True)
def registries():
    """Registers the networks, and leaves the names that there were."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.registry, "_REGISTERED", dict(models.registry._REGISTERED))
        patch.setattr(sources, "_registered", dict(sources._registered))
        models.register_network("task_teacher", mlp(8))
        models.register_network("task_student", mlp(4))
        yield


def run(of, *, workdir=None, stop=None, reporter=None, **changes):
    config = {**CONFIG, **changes, "recipe": {**CONFIG["recipe"], **changes.get("recipe", {})}}
    return distill_jax.run(config, dataset=of, workdir=workdir, stop=stop, reporter=reporter)


def timeless(results):
    rows = [{k: v for k, v in row.items() if k not in MEASURED} for row in results.rows]
    histories = [
        [{k: v for k, v in epoch.items() if k != "images_per_second"} for epoch in history]
        for history in results.histories.values()
    ]
    return rows, histories


# ------------------------------------------------------------------------------------ the data set
def test_splits_keep_examples_whole():
    """The ids and the pair of an example stay with its label, in every split and limit."""
    inputs, labels = examples(44)
    whole = dataset()
    known = {ids.tobytes(): i for i, ids in enumerate(inputs["ids"])}
    seen = []
    for split in (whole.train, whole.valid, whole.limited(3, seed=1).train):
        rows = [known[ids.tobytes()] for ids in split.images["ids"]]
        np.testing.assert_array_equal(split.images["pair"][0], inputs["pair"][0][rows])
        np.testing.assert_array_equal(split.images["pair"][1], inputs["pair"][1][rows])
        np.testing.assert_array_equal(split.labels, labels[rows])
        seen.append(rows)
    assert sorted(seen[0] + seen[1]) == list(range(44))
    assert len(seen[1]) == sum(round(0.25 * n) for n in np.bincount(labels))
    assert len(seen[2]) == 3 * CLASSES and set(seen[2]) < set(seen[0])


def test_what_networks_see_is_what_preprocessing_gives():
    whole = dataset()
    assert whole.inputs == {"all": jax.ShapeDtypeStruct((1, 11), jnp.float32)}
    inputs = examples(5)[0]
    got = whole.preprocessing.evaluate(inputs)["all"]
    parts = inputs["ids"] / 8, inputs["pair"][0].reshape(5, -1), inputs["pair"][1][:, None]
    np.testing.assert_allclose(got, np.concatenate(parts, 1), rtol=1e-6)


def test_a_digest_is_of_all_that_is_learned_from():
    def scaled(inputs, key, train):
        return {"all": 2 * flat(inputs, key, train)["all"]}

    def moved(split):
        inputs = {**split.images, "ids": split.images["ids"].copy()}
        inputs["ids"][0, 0] ^= 1
        return data.Split(inputs, split.labels)

    def renamed(split):
        return data.Split({"idz": split.images["ids"], "pair": split.images["pair"]}, split.labels)

    def first_leaf(inputs, key, train):
        return jax.tree.leaves(inputs)[0]

    first, plain = dataset(), dataset(first_leaf)
    other_names = dataclasses.replace(
        plain,
        task=data.Task({"idz": SPEC["ids"], "pair": SPEC["pair"]}, CLASSES, first_leaf),
        **{name: renamed(getattr(plain, name)) for name in ("train", "valid", "test")},
    )
    moved_bit = dataclasses.replace(first, test=moved(first.test))
    others = [dataset(scaled), dataset(split_seed=1), moved_bit, plain, other_names]
    digests = [digest_of(one) for one in (first, *others)]
    assert len(set(digests)) == len(digests)
    assert digest_of(dataset()) == digests[0]
    assert digest_of(dataset(metrics={"second": second})) == digests[0]  # retrains nothing


_doubled, _kept = (
    jax.jit(lambda x, by=by: x * jnp.asarray(by)) for by in (np.full(4, 2), np.ones(4, int))
)


def _long(constants):
    """Adds up as many entries of a table as there are in all."""
    return jax.jit(lambda x: x + jnp.asarray(constants)[x])


@pytest.mark.parametrize(
    ("preprocess", "fixed"),
    [
        (flat, True),
        (noisy, False),
        (lambda x, key, train: x["ids"] * (2 if train else 1), False),
        (
            lambda x, key, train: x["ids"] * np.arange(4) if train else x["ids"] * np.ones(4, int),
            False,
        ),
        (lambda x, key, train: jax.random.bits(key), False),
        # Texts of traced programs leave out what is in these.
        (lambda x, key, train: (_doubled if train else _kept)(x["ids"]), False),
        (lambda x, key, train: _long(np.arange(4000) % (7 if train else 5))(x["ids"]), False),
        (lambda x, key, train: _long(np.arange(4000) % 7)(x["ids"]), True),
        (lambda x, key, train: jax.pure_callback(np.asarray, x["ids"], x["ids"]), False),
        (lambda x, key, train: jnp.where(x["ids"] > 2, jax.nn.relu(x["ids"]), 0), True),
    ],
)
def test_preprocessing_that_never_changes_is_known(preprocess, fixed):
    assert data.Task(SPEC, CLASSES, preprocess).is_fixed is fixed


# --------------------------------------------------------------------------------- as it is trained
def on_images(classes, inputs):
    """A registered pair (init, apply) on images: one dense layer."""
    size = math.prod(inputs.shape[1:])

    def init(key):
        return {"params": {"w": jax.random.normal(key, (size, classes)) / size}}

    return init, lambda variables, x: x.reshape(len(x), -1) @ variables["params"]["w"]


def numbers(results):
    return [
        [[v for k, v in sorted(epoch.items()) if k != "images_per_second"] for epoch in history]
        for history in results.histories.values()
    ]


def as_signed_floats(images):
    """The same images from -1 to 1, whose range is told."""
    parts = {name: getattr(images, name) for name in ("train", "valid", "test")}
    signed = {n: ((x.images / 127.5 - 1).astype(np.float32), x.labels) for n, x in parts.items()}
    return data.from_arrays(
        **signed, classes=4, mean=images.mean, std=images.std, value_range=(-1, 1)
    )


def as_a_task(images):
    """The same images as the examples of a task that preprocesses them itself."""

    def preprocess(image, key, train):
        return (image.astype(jnp.float32) / 255 - images.mean[0]) / images.std[0]

    own = data.Task(jax.ShapeDtypeStruct((8, 8, 1), np.uint8), 4, preprocess)
    return data.from_arrays(images.train, images.test, valid=images.valid, task=own)


@pytest.mark.parametrize(
    ("otherwise", "augment", "guidance"),
    [(as_signed_floats, "crop_flip", "none"), (as_a_task, "none", "direct")],
)
def test_the_same_images_otherwise_given_train_to_the_same_numbers(otherwise, augment, guidance):
    models.register_network("task_images", on_images)
    images = data.load("synthetic:8x8x1:4:96:32", valid_fraction=0.25)
    config = {
        "networks": ("task_images", "task_images#2"),
        "guidance": (guidance,),
        "recipe": {"epochs": 2, "batch_size": 24, "augment": augment},
    }
    one, two = (distill_jax.run(config, dataset=x) for x in (images, otherwise(images)))
    np.testing.assert_allclose(numbers(two), numbers(one), rtol=2e-5)
    assert two.rows[0]["test_accuracy"] == one.rows[0]["test_accuracy"]
    assert two.rows[0]["stage"] != one.rows[0]["stage"]
    # A task whose networks see images is one for the library's networks too.
    assert models.build("plane2", 4, otherwise(images).inputs).image_shape == (8, 8, 1)


def test_float_images_have_a_mean_and_std_of_their_range():
    floats = np.random.default_rng(0).uniform(-3, 5, (40, 4, 4, 2))
    labels = np.arange(40) % 2
    got = data.from_arrays((floats, labels), (floats, labels), classes=2, value_range=(-3, 5))
    unit = (got.train.images.astype(np.float64) + 3) / 8
    np.testing.assert_allclose(got.mean, unit.mean((0, 1, 2)), atol=5.1e-5)
    np.testing.assert_allclose(got.std, unit.std((0, 1, 2)), atol=5.1e-5)
    seen = got.preprocessing.evaluate(jnp.asarray(got.train.images))
    np.testing.assert_allclose(seen, (unit - got.mean) / got.std, rtol=1e-4, atol=1e-5)
    assert got.train.images.dtype == np.float32


def test_metrics_are_those_of_numpy_on_every_example_once():
    whole = dataset(metrics={"second": second, "margin": margin_of_0, "logit": logit_of_1})
    results = run(whole)
    network, variables = results.networks["direct", "task_student", 0]
    (row,), history = results.rows, results.histories["direct", "task_student", 0]
    assert 1 <= row["best_epoch"] <= 2
    for part, found in (("test", row), ("valid", row), ("valid", history[row["best_epoch"] - 1])):
        split = getattr(whole, part)
        inputs = {"all": np.float64(whole.preprocessing.evaluate(split.images)["all"])}
        params = jax.tree.map(np.float64, variables["params"])
        logits = np.tanh(inputs["all"] @ params["a"]) @ params["b"]
        own = split.labels == 0
        assert found[f"{part}_second"] == pytest.approx(np.divide(*second(logits, split.labels)))
        assert found[f"{part}_margin"] == pytest.approx(logits[own, 0].mean(), rel=1e-5)
        assert found[f"{part}_logit"] == pytest.approx(logits[:, 1].mean(), rel=1e-5)
        assert found[f"{part}_accuracy"] == np.mean(logits.argmax(-1) == split.labels)


def test_a_metric_counts_on_images_too():
    models.register_network("task_images", on_images)
    images = data.load("synthetic:8x8x1:4:48:32", valid_fraction=0.25)
    config = {"networks": ("task_images",), "guidance": ("none",), "recipe": {"epochs": 1}}
    config["recipe"]["batch_size"] = 12
    first = distill_jax.run(config, dataset=images).rows[0]
    measured = dataclasses.replace(images, metrics={"second": second})
    row = distill_jax.run(config, dataset=measured).rows[0]
    assert row["state_digest"] == first["state_digest"] and row["stage"] == first["stage"]
    assert 1 >= row["test_second"] > row["test_accuracy"]


@pytest.mark.parametrize(
    "modes",
    [{"devices": 2}, *marks.slow({"devices": 2, "parallel": "pmap"})],
    ids=["jit", "pmap"],
)
def test_devices_see_the_same_noise(modes):
    """Preprocessing draws by the place in the whole batch, however many devices share it."""
    whole = dataset(noisy, {"second": second})
    alone, shared = run(whole), run(whole, **modes)
    np.testing.assert_allclose(numbers(shared), numbers(alone), rtol=1e-4, atol=1e-6)
    quiet = run(dataset(flat))
    key = ("direct", "task_student", 0)
    losses = [one.histories[key][0]["train_loss"] for one in (alone, quiet)]
    assert abs(losses[0] - losses[1]) > 1e-3  # the noise is there


@pytest.mark.parametrize(
    "recipe", [{}, *marks.slow({"train_limit": 6, "batch_size": 6})], ids=["shared", "limited"]
)
def test_a_population_is_its_members_alone(recipe):
    whole = dataset(noisy, {"second": second})
    alone, at_once = (run(whole, seeds=(0, 1), population=n, recipe=recipe) for n in (1, 2))
    assert timeless(at_once) == timeless(alone)


class Stopper(Reporter):
    """Stops after so many dispatches."""

    def __init__(self, dispatches):
        self.left = dispatches

    def progress(self, step, images_per_second):
        self.left -= 1


def test_a_run_that_was_stopped_ends_with_the_bytes_of_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "DISPATCH_SECONDS", 0.0)  # one step a dispatch
    whole = dataset(noisy, {"second": second})
    straight = run(whole, workdir=tmp_path / "straight")
    for dispatches in (3, 4):
        reporter = Stopper(dispatches)
        with pytest.raises(distill_jax.train.fit.Interrupted):
            run(
                whole,
                workdir=tmp_path / "stopped",
                reporter=reporter,
                stop=lambda reporter=reporter: reporter.left <= 0,
            )
    assert timeless(run(whole, workdir=tmp_path / "stopped")) == timeless(straight)


def test_the_cache_of_logits_is_what_the_graph_computes():
    table, graph = (run(dataset(), teacher_logits=how) for how in ("table", "graph"))
    np.testing.assert_allclose(numbers(table), numbers(graph), rtol=1e-5, atol=1e-6)


def test_a_new_metric_is_measured_of_what_was_trained(tmp_path):
    bare = run(dataset(), workdir=tmp_path).rows[0]
    both = {"second": second, "margin": margin_of_0}
    begun = []

    class Started(Reporter):
        def stage_started(self, stages, step, steps, histories):
            begun.append(stages)

    row = run(dataset(metrics=both), workdir=tmp_path, reporter=Started()).rows[0]
    assert not begun and row["state_digest"] == bare["state_digest"]
    fresh = run(dataset(metrics=both)).rows[0]
    for name in ("test_second", "valid_second", "test_margin", "valid_margin"):
        assert row[name] == pytest.approx(fresh[name]) and name not in bare
    with pytest.raises(WorkdirError, match=r"registered\.metrics\.second\.repr is"):
        run(dataset(metrics={"second": margin_of_0}), workdir=tmp_path)


# ---------------------------------------------------------------------------------------- by name
def shapes(count=44, seed=0, valid_fraction=0.1, split_seed=0):
    return data.from_arrays(
        examples(count, seed),
        examples(21, seed=1),
        task=task(),
        valid_fraction=valid_fraction,
        split_seed=split_seed,
    )


def named(workdir=None, **fields):
    config = {**CONFIG, "dataset": {"name": "my_shapes", "valid_fraction": 0.25, **fields}}
    return distill_jax.run(config, workdir=workdir)


def test_a_registered_data_set_is_loaded_by_name_with_its_options(tmp_path):
    distill_jax.register_dataset("my_shapes", shapes)
    row = named(tmp_path, options={"count": 44}).rows[0]
    assert row["state_digest"] == run(dataset()).rows[0]["state_digest"]
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["dataset"]["options"] == {"count": 44}
    assert saved["resolved"]["registered"]["datasets"]["my_shapes"]["version"] == "1"
    named(tmp_path, options={"count": 44})
    distill_jax.register_dataset("my_shapes", shapes, version="2")
    with pytest.raises(WorkdirError, match=r"datasets\.my_shapes\.version is '1' there and '2'"):
        named(tmp_path, options={"count": 44})


# ------------------------------------------------------------------------------------ what is wrong
def refused(message, make):
    """Fails unless that is refused in one line, before anything is compiled."""
    before = len(COMPILED)
    with pytest.raises((data.DataError, distill_jax.ConfigError), match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert len(COMPILED) == before


INPUTS, LABELS = examples(20)
GRID, NUMBER = INPUTS["pair"]


def given(inputs=INPUTS, labels=LABELS, **options):
    return data.from_arrays((inputs, labels), examples(9), **{"task": task(), **options})


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda x, y: 0.5, r"'mine' gives float: expected \(sum, count\)"),
        (lambda x, y: (x[:, 0], 5), r"'mine' gives \(float32 \(8,\), int\): expected"),
        (lambda x, y: (x.sum(), len(y), 1), r"'mine' gives \(float32 \(\), int, int\): expected"),
        (lambda x, y: (x.sum(), 0), "'mine' gives a count of 0.0 for 8 examples of all classes"),
        (lambda x, y: (x.sum(), np.nan), "'mine' gives a count of nan"),
        (lambda x, y: x.nothing, "'mine' cannot be computed of logits .8, 3. .*AttributeError"),
        (0.5, "'mine' is 0.5: expected a function"),
    ],
)
def test_metrics_that_give_no_sum_and_count(metric, message):
    refused(message, lambda: task(metrics={"mine": metric}))
    images = np.zeros((12, 4, 4, 1), np.uint8), np.arange(12) % 3
    by_hand = data.from_arrays(images, images, classes=3, valid=images)
    by_hand = dataclasses.replace(by_hand, metrics={"mine": metric})
    refused(message, lambda: run(by_hand))


@pytest.mark.parametrize("name", ["accuracy", "loss", "branch1_accuracy", "top 5", "", 5])
def test_names_that_a_metric_cannot_have(name):
    refused(f"metric {name!r}: expected a name", lambda: task(metrics={name: second}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: given({"ids": INPUTS["ids"]}), "train inputs are .*expected .*'pair'"),
        (lambda: given([INPUTS["ids"], (GRID, NUMBER)]), r"train inputs are \[int32"),
        (lambda: given(INPUTS["ids"]), r"inputs are int32 \(20, 4\): expected \{'ids'"),
        (
            lambda: given({**INPUTS, "ids": INPUTS["ids"].astype(np.int64)}),
            r"inputs\['ids'\] are int64 \(20, 4\): expected int32 \(N, 4\)",
        ),
        (
            lambda: given({**INPUTS, "pair": (GRID[:, :1], NUMBER)}),
            r"inputs\['pair'\]\[0\] are float32 \(20, 1, 3\): expected float32 \(N, 2, 3\)",
        ),
        (lambda: given({**INPUTS, "pair": (GRID, NUMBER[:7])}), "7.*expected as many of each"),
        (lambda: given({**INPUTS, "pair": (GRID, NUMBER[0])}), r"float32 \(\): expected .*\(N\)"),
        (lambda: given(labels=LABELS[:3]), "20 examples and 3 labels"),
        (lambda: given(labels=LABELS + 1), "label 3 at index .*expected 0 to 2"),
        (lambda: given(data.take(INPUTS, slice(0)), LABELS[:0]), "0 examples: expected at least"),
        (lambda: given(classes=3), "classes given beside a task"),
        (lambda: given(mean=(0.5,), std=(1.0,)), "mean, std given beside a task"),
        (lambda: given(task=SPEC), "task is a dict: expected a distill_jax.data.Task"),
        (lambda: data.Task(4, 3), "spec is int: expected jax.ShapeDtypeStruct"),
        (lambda: data.Task({}, 3), "spec is {}: expected"),
        (lambda: data.Task(np.zeros(3), 3), r"spec has float64 \(3,\): expected float32"),
        (lambda: data.Task(SPEC, 1), "classes is 1: expected an integer of at least 2"),
        (lambda: task(lambda inputs, key: inputs), "preprocess cannot be run on .*TypeError"),
        (lambda: task(lambda inputs, key, train: None), "preprocess gives no array"),
        (
            lambda: task(lambda x, key, train: x["ids"] if train else x["ids"][:2]),
            r"gives int32 \(4,\) to train on and int32 \(2,\) to evaluate",
        ),
    ],
)
def test_inputs_of_another_structure_and_tasks_that_cannot_be(make, message):
    refused(message, make)


@pytest.mark.parametrize(
    ("images", "value_range", "message"),
    [
        (np.full((4, 2, 2, 1), 1.5), (0, 1), r"train images hold 1.5 \(16 such values\): expected"),
        (np.full((4, 2, 2, 1), np.nan), (0, 1), "train images hold nan"),
        (np.zeros((4, 2, 2, 1), np.uint8), (0, 1), "images are uint8 and value_range is"),
        (np.zeros((4, 2, 2, 1)), (1, 0), "expected low < high"),
        (np.zeros((4, 2, 2, 1)), 1.0, "value_range is 1.0: expected two numbers"),
        (np.zeros((4, 2, 2, 1)), None, r"float64 : expected uint8.*value_range=\(0.0, 1.0\)"),
    ],
)
def test_float_images_out_of_their_range(images, value_range, message):
    pair = images, np.arange(4) % 2
    refused(message, lambda: data.from_arrays(pair, pair, classes=2, value_range=value_range))


@pytest.mark.parametrize(
    ("changes", "preprocess", "message"),
    [
        ({"networks": ("plane2",), "guidance": ("none",)}, flat, "plane2 takes images, float32"),
        ({"recipe": {"augment": "crop_flip"}}, flat, "augment is 'crop_flip': expected 'none'"),
        (
            {"recipe": {"mixup": 0.2}},
            flat,
            "mixup is 0.2: expected 0 for .* are mixed",
        ),
        ({"recipe": {"cutmix": 1.0}}, flat, "cutmix is 1: expected 0 for .* images alone"),
        ({"methods": {"ddgsd": 1.0}}, flat, "'ddgsd' compares two views .* does not use its key"),
        ({"teacher_logits": "table"}, noisy, "images that never change, but the task's preproc"),
        ({}, lambda x, key, train: x["ids"], "build of task_teacher .*int32 .1, 4.*TypeError"),
    ],
)
def test_runs_that_a_task_cannot_have(changes, preprocess, message):
    of = dataset(preprocess)
    refused(message, lambda: run(of, **changes))


@pytest.mark.parametrize(
    ("load", "fields", "message"),
    [
        (
            shapes,
            {"options": {"length": 3}},
            "dataset.options are {'length': 3}: expected .*count=44",
        ),
        (shapes, {"options": {"count": object()}}, "dataset.options are plain values"),
        (shapes, {"mean": (0.5,)}, r"dataset.mean is \(0.5,\): expected \(\), as the function"),
        (lambda: dataset(), {}, "dataset.valid_fraction is 0.25: expected 0.1"),
        (lambda valid_fraction: examples(4), {}, "'my_shapes' gives a tuple: expected what"),
        (shapes, {"name": "my_shape"}, "did you mean 'my_shapes'"),
        (shapes, {"name": "digits", "options": {"a": 1}}, "expected none for 'digits'"),
    ],
)
def test_data_sets_by_name_that_are_refused(load, fields, message):
    distill_jax.register_dataset("my_shapes", load)
    refused(message, lambda: named(**fields))


@pytest.mark.parametrize(
    ("name", "load", "version", "message"),
    [
        ("a b", shapes, "1", "is an identifier"),
        ("digits", shapes, "1", "is a data set of the library"),
        ("fine", None, "1", "expected a function"),
        ("fine", shapes, 2, "version of fine is a text"),
    ],
)
def test_what_cannot_be_registered(name, load, version, message):
    with pytest.raises(ValueError, match=message):
        distill_jax.register_dataset(name, load, version)
