"""Streamed data: the same examples and the same training whatever the chunks, nothing to save."""

import importlib
import io

import jax
import numpy as np
import pytest
from PIL import Image

import distill_jax
from distill_jax import data, models
from distill_jax.data import streamed
from distill_jax.runs import ids
from distill_jax.train import fit, inference, sharding, trainer
from distill_jax.train.reporter import Reporter

N, CLASSES = 40, 4
CONFIG = {
    "networks": ("plane2",),
    "guidance": ("none",),
    "recipe": {"epochs": 2, "batch_size": 8, "last_batch": "keep", "augment": "flip"},
}


def encoded(n, start=0):
    """JPEGs of different sizes."""
    files = []
    for i in range(start, start + n):
        file = io.BytesIO()
        rng = np.random.default_rng(i)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        coarse.resize((20 + i % 9, 34 - i % 7)).save(file, "JPEG")
        files.append(file.getvalue())
    return files


class Records(list):
    """Encoded images that note which of them are read."""

    def __init__(self, files):
        super().__init__(files)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(streamed, "SIZE", 16)
    monkeypatch.setattr(streamed, "MARGIN", 4)


def steps_of_chunks(monkeypatch, steps, batch=8):
    monkeypatch.setattr(streamed, "CHUNK_BYTES", steps * batch * 16 * 16 * 3)


def images_of(n=N, start=0, name="many"):
    return streamed.Streamed(Records(encoded(n, start)), name, np.arange(n))


def dataset_of(**changes):
    train, test = images_of(), images_of(18, start=N, name="others")
    pairs = ((images, np.arange(len(images)) % CLASSES) for images in (train, test))
    return data.from_arrays(
        *pairs, classes=CLASSES, name="tiny", **{"valid_fraction": 0.3, **changes}
    )


# -------------------------------------------------------------------------------------- one image
def test_a_random_box_is_inside_and_as_asked():
    boxes = [streamed.random_box(300, 200, 0, 1, record) for record in range(500)]
    left, top, width, height = np.array(boxes).T
    assert (left >= 0).all() and (top >= 0).all()
    assert (left + width <= 300).all() and (top + height <= 200).all()
    share, ratio = width * height / 60000, width / height
    assert share.min() > 0.075 and share.max() > 0.8 and share.min() < 0.15
    assert 0.73 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.36
    assert streamed.random_box(1000, 10, 0, 0, 0) == (493, 0, 13, 10)
    assert streamed.random_box(10, 1000, 0, 0, 0) == (0, 493, 10, 13)


def test_a_random_box_is_a_function_of_seed_epoch_and_record():
    # Resumed runs rest on these numbers.
    assert streamed.random_box(500, 375, 7, 3, 11) == streamed.random_box(500, 375, 7, 3, 11)
    others = [(8, 3, 11), (7, 4, 11), (7, 3, 12)]
    boxes = {streamed.random_box(500, 375, *of) for of in [(7, 3, 11), *others]}
    assert len(boxes) == 4


def test_the_centre_is_that_of_the_resized_image():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 26, 3), np.uint8)
    (got,) = np.asarray(streamed.Streamed([pixels], "one", np.arange(1)))
    np.testing.assert_array_equal(got, pixels[2:18, 5:21])  # the shorter side is 20 already
    gray = streamed.Streamed([pixels[..., :1]], "gray", np.arange(1), channels=1)
    np.testing.assert_array_equal(np.asarray(gray)[0], pixels[2:18, 5:21, :1])


def test_an_image_depends_on_its_record_and_not_on_its_place():
    split = data.Split(images_of(12), np.zeros(12, np.int32))
    for images in (split.images, data.at_epoch(split, 3, 1).images):
        whole = np.asarray(images)
        assert whole.shape == images.shape == (12, 16, 16, 3) and whole.dtype == images.dtype
        np.testing.assert_array_equal(np.asarray(images[[7, 2, 7]]), whole[[7, 2, 7]])
        np.testing.assert_array_equal(np.asarray(images[4:][[1, 0]]), whole[[5, 4]])
    views = [np.asarray(data.at_epoch(split, *of).images) for of in ((3, 1), (3, 2), (4, 1))]
    np.testing.assert_array_equal(views[0], whole)
    for other in views[1:]:
        assert (other != whole).any((1, 2, 3)).all()


# ----------------------------------------------------------------------------------------- chunks
@pytest.mark.parametrize("steps, sizes", [(2, [2, 2, 1]), (9, [5]), (0, [1] * 5)])
def test_chunks_hold_every_step_once_within_their_bound(monkeypatch, steps, sizes):
    steps_of_chunks(monkeypatch, steps)
    split = data.at_epoch(data.Split(images_of(), np.arange(N, dtype=np.int32)), 0, 0)
    order, _ = data.epoch_order(N, 8, seed=0, epoch=0)
    whole = np.asarray(split.images)
    got = list(data.chunks(split, order))
    assert [chunk.steps for chunk in got] == sizes
    assert len({chunk.images.shape for chunk in got}) == 1  # one program for all
    for chunk in got:
        assert chunk.images.nbytes <= max(streamed.CHUNK_BYTES, whole[:8].nbytes)
        local, rows = chunk.order[: chunk.steps], order[chunk.start : chunk.start + chunk.steps]
        np.testing.assert_array_equal(chunk.images[local], whole[rows])
        np.testing.assert_array_equal(chunk.labels[local], rows)
    again = list(data.chunks(split, order, skip=3))
    assert again[0].start == 3 and again[0].images.shape == got[0].images.shape
    np.testing.assert_array_equal(again[0].images[again[0].order[0]], whole[order[3]])
    assert not list(data.chunks(split, order, skip=5))


def test_at_most_one_chunk_is_decoded_ahead(monkeypatch):
    steps_of_chunks(monkeypatch, 1)
    images = images_of()
    order, _ = data.epoch_order(N, 8, seed=0, epoch=0)
    for done, chunk in enumerate(data.chunks(data.Split(images, np.zeros(N, int)), order), 1):
        assert chunk.start == done - 1
        assert 8 * done <= len(images.source.read) <= 8 * (done + 1)
    assert sorted(images.source.read) == list(range(N))


def test_a_resident_split_is_one_chunk_as_it_is():
    split, order = data.Split(np.zeros((4, 2, 2, 1), np.uint8), np.zeros(4)), np.zeros((2, 2))
    (chunk,) = data.chunks(split, order, skip=1)
    assert chunk.images is split.images and chunk.order is order
    assert data.at_epoch(split, 0, 0) is split


# ---------------------------------------------------------------------------------------- dataset
def test_a_dataset_is_split_and_limited_without_decoding():
    dataset = dataset_of()
    assert [len(s.labels) for s in (dataset.train, dataset.valid, dataset.test)] == [28, 12, 18]
    rows = np.concatenate([dataset.train.images.rows, dataset.valid.images.rows])
    assert sorted(rows) == list(range(N))
    np.testing.assert_array_equal(dataset.valid.images.rows % CLASSES, dataset.valid.labels)
    few = dataset.limited(2, seed=0)
    np.testing.assert_array_equal(np.bincount(few.train.labels), [2] * CLASSES)
    assert set(few.train.images.rows) < set(dataset.train.images.rows)
    assert dataset.image_shape == (16, 16, 3)
    assert (dataset.mean, dataset.std) == data.NORMALISATION["imagenet"]
    assert ids.digest_of(dataset) == ids.digest_of(dataset_of())
    assert ids.digest_of(dataset) != ids.digest_of(dataset_of(split_seed=1))
    assert not dataset.train.images.source.read and not dataset.test.images.source.read


@pytest.mark.parametrize(
    "labels, message",
    [(np.arange(39) % 4, "40 images and 39 labels"), (np.arange(40), "4.*expected 0 to 3")],
)
def test_wrong_labels_are_refused(labels, message):
    test = images_of(4), np.arange(4)
    with pytest.raises(data.DataError, match=message):
        data.from_arrays((images_of(), labels), test, classes=4)


def test_a_damaged_image_is_named():
    images = images_of(6)
    list.__setitem__(images.source, 4, images.source[4][:100])
    with pytest.raises(data.DataError, match="image 4 of many cannot be read"):
        np.asarray(images)
    with pytest.raises(data.DataError, match="image 4 of many cannot be read"):
        list(data.chunks(data.Split(images, np.zeros(6, int)), np.arange(6).reshape(3, 2)))
    np.asarray(images[:4])


# --------------------------------------------------------------------------------------- training
class Stopper(Reporter):
    def __init__(self, dispatches):
        self.left = dispatches

    def progress(self, step, images_per_second):
        self.left -= 1


def digests(results):
    return [row["state_digest"] for row in results.rows]


@pytest.fixture(scope="module")
def reference():
    """Trained with the whole epoch in one chunk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed, "SIZE", 16)
        patch.setattr(streamed, "MARGIN", 4)
        return distill_jax.run(CONFIG, dataset=dataset_of())


@pytest.mark.parametrize("steps", [1, 2])
def test_chunks_do_not_change_the_training(monkeypatch, reference, steps):
    steps_of_chunks(monkeypatch, steps)
    results = distill_jax.run(CONFIG, dataset=dataset_of())
    assert digests(results) == digests(reference)
    for row, expected in zip(results.rows, reference.rows, strict=True):
        assert row["test_accuracy"] == expected["test_accuracy"]
        assert row["preflight"] == expected["preflight"]


@pytest.mark.slow
def test_a_memory_of_the_examples_is_theirs_whatever_the_chunks(monkeypatch):
    options = {"crd": {"embedding_size": 4, "negatives": 6}}
    config = {**CONFIG, "networks": ("plane4", "plane2"), "guidance": ("direct",)}
    config |= {"methods": {"crd": 0.8}, "method_options": options}
    whole = digests(distill_jax.run(config, dataset=dataset_of()))
    steps_of_chunks(monkeypatch, 1)
    assert digests(distill_jax.run(config, dataset=dataset_of())) == whole


@pytest.mark.slow
def test_views_and_mixtures_are_the_same_whatever_the_chunks(monkeypatch):
    recipe = {**CONFIG["recipe"], "epochs": 1, "mixup": 0.4, "cutmix": 1.0}
    config = {**CONFIG, "recipe": recipe, "methods": {"ddgsd": 1.0}}
    whole = digests(distill_jax.run(config, dataset=dataset_of()))
    steps_of_chunks(monkeypatch, 1)
    assert digests(distill_jax.run(config, dataset=dataset_of())) == whole


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("cs_kd", "'cs_kd' needs another example of the same class .* streamed .*expected images"),
        ("ddgsd", "'ddgsd' compares two views .*augment is 'none', which makes them equal"),
    ],
)
def test_what_a_method_needs_and_streamed_images_cannot_give_is_refused(method, message):
    config = {**CONFIG, "methods": {method: 1.0}, "recipe": {"epochs": 1, "batch_size": 8}}
    with pytest.raises(distill_jax.ConfigError, match=message):
        distill_jax.run(config, dataset=dataset_of())


@pytest.mark.parametrize("dispatches", [3, 6])
def test_a_resumed_run_ends_with_the_same_bytes(monkeypatch, reference, tmp_path, dispatches):
    steps_of_chunks(monkeypatch, 2)  # of 4 steps an epoch, the last a smaller batch
    monkeypatch.setattr(trainer, "DISPATCH_SECONDS", 0.0)  # one step a dispatch
    stopper = Stopper(dispatches)
    with pytest.raises(fit.Interrupted):
        distill_jax.run(
            CONFIG,
            dataset=dataset_of(),
            workdir=tmp_path,
            reporter=stopper,
            stop=lambda: stopper.left <= 0,
        )
    results = distill_jax.run(CONFIG, dataset=dataset_of(), workdir=tmp_path)
    assert digests(results) == digests(reference)


def test_what_is_left_out_is_not_decoded():
    images = images_of()
    order, _ = data.epoch_order(N, 8, seed=0, epoch=0)
    list(data.chunks(data.Split(images, np.zeros(N, int)), order, skip=3))
    assert sorted(images.source.read) == sorted(order[3:].ravel())


def test_few_examples_a_class_are_those_that_are_chosen():
    dataset = dataset_of(valid_fraction=0.0)
    recipe = {**CONFIG["recipe"], "epochs": 1, "batch_size": 2, "train_limit": 2}
    distill_jax.run({**CONFIG, "recipe": recipe, "selection": "last"}, dataset=dataset)
    few = dataset.limited(2, seed=0).train
    assert set(dataset.train.images.source.read) == set(few.images.rows)


@pytest.mark.devices
@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_it_is_split_over_devices(monkeypatch, parallel):
    steps_of_chunks(monkeypatch, 2)
    recipe = {**CONFIG["recipe"], "epochs": 1, "last_batch": "drop"}
    config = {**CONFIG, "recipe": recipe, "parallel": parallel, "devices": 2}
    (row,) = distill_jax.run(config, dataset=dataset_of()).rows
    (one,) = distill_jax.run({**config, "devices": 1}, dataset=dataset_of()).rows
    assert abs(row["test_accuracy"] - one["test_accuracy"]) <= 1 / 18


def test_evaluation_counts_every_example_once(monkeypatch):
    monkeypatch.setitem(inference.PART, "cpu", 4)
    monkeypatch.setattr(inference, "DISPATCH_BYTES", 8 * 16 * 16 * 3)
    dataset = dataset_of()
    network = models.build("plane2", CLASSES, dataset.image_shape)
    variables = network.init(jax.random.key(0))
    resident = data.Split(np.asarray(dataset.test.images), dataset.test.labels)
    seen = dataset.test.images.source.read
    del seen[:]
    pairs, topology = [(network, variables)] * 2, sharding.Topology()  # decoded once for both
    logits = inference.teacher_outputs(pairs, dataset.test, dataset, topology).logits[:, 1]
    # 18 examples fill 4 parts of 4 and half of a fifth, which nothing is read to fill up.
    assert sorted(seen) == [*range(18)]
    (expected,) = inference.predict_logits(pairs[:1], resident, dataset)[0]
    np.testing.assert_allclose(logits, expected, rtol=1e-6)
    got, whole = (
        inference.evaluate([(network, variables)], s, dataset)[0] for s in (dataset.test, resident)
    )
    assert got["accuracy"] == whole["accuracy"]
    assert got["accuracy"] == np.mean(np.argmax(expected, -1) == resident.labels)
    np.testing.assert_allclose(got["loss"], whole["loss"], rtol=1e-6)


# ------------------------------------------------------------------------------------------- TFDS
@pytest.fixture
def prepared(tmp_path):
    tfds = importlib.import_module("tensorflow_datasets")

    class ManySizes(tfds.core.GeneratorBasedBuilder):
        """JPEGs of different sizes."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(num_classes=CLASSES),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples(24, 0),
                "validation": self._generate_examples(8, 24),
                "test": self._generate_examples(2, 32, labelled=False),
            }

        def _generate_examples(self, n, start, labelled=True):
            for i, file in enumerate(encoded(n, start)):
                label = i % CLASSES if labelled else -1
                yield i, {"image": io.BytesIO(file), "label": label}

    ManySizes(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    return tmp_path


def test_tfds_images_of_different_sizes_are_streamed(prepared):
    dataset = data.load("tfds:many_sizes", data_dir=str(prepared), valid_fraction=0.34)
    assert isinstance(dataset.train.images, data.Streamed)
    assert dataset.train.images.name == "tfds:many_sizes/1.0.0[train]"
    assert [len(s.labels) for s in (dataset.train, dataset.valid, dataset.test)] == [16, 8, 8]
    files = encoded(8, 24)  # the "test" split has no labels
    bytes_of = {dataset.test.images.source[i]: dataset.test.labels[i] for i in range(8)}
    assert bytes_of == {file: i % CLASSES for i, file in enumerate(files)}
    recipe = {"epochs": 2, "batch_size": 6, "train_limit": 3}
    config = {"networks": ("plane4", "plane2"), "guidance": "direct", "recipe": recipe}
    results = distill_jax.run(config, dataset=dataset)
    assert results.histories["direct", "plane2", 0][-1]["step"] == 4
    assert set(results.rows[0]["agreement"]) == {"plane4"}
